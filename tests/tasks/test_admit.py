"""First packets: sent, refused with an answer, dropped and counted, or held; never guessed, never lost."""

from contextlib import contextmanager
from functools import partial

import dpkt
import pytest
import trio
import trio.testing

from tests.craft import (
    ACK,
    FIN,
    RECORD_ROUTE,
    RST,
    SYN,
    echo,
    ends,
    error,
    fragments,
    tcp,
    transport,
    udp,
    with_options,
)
from tests.fakes.devices import FAR4, FAR6, HOST4, ICMP, ROUTER4, SIGNER, TCP, TUN4, TUN6, UDP
from tests.fakes.judges import EXCLUDED, INCLUDED, RELAY4, Gate, owner
from tunsplit.engine import hold as hold_module
from tunsplit.engine.attribution import Attribution, Certainty
from tunsplit.engine.policy import Verdict
from tunsplit.errors import KernelError
from tunsplit.host import NeighbourState
from tunsplit.tasks import admit as admit_module

WEB = f"{TUN4}:5000 > {FAR4}:80"
WEB6 = f"[{TUN6}]:5000 > [{FAR6}]:80"
COOKIE, OTHER_COOKIE = b"\1" * 8, b"\2" * 8


@contextmanager
def a_gate(**others):
    gate = Gate(**others)
    try:
        yield gate
    finally:
        gate.close()


@pytest.fixture
def gate():
    with a_gate() as made:
        yield made


def syn(text=WEB):
    return tcp(text, flags=SYN)


def answered(gate):
    """What the app was told, in words."""
    return [in_words(answer) for answer in gate.tun.answers]


def in_words(packet):
    parsed = dpkt.ip.IP(packet) if packet[0] >> 4 == 4 else dpkt.ip6.IP6(packet)
    data = parsed.data
    if isinstance(data, dpkt.tcp.TCP):
        return "reset" if data.flags & RST else "segment"
    return f"icmp {data.type}/{data.code} from {'us' if parsed.src == SIGNER[parsed.v] else 'others'}"


# Known owners


@pytest.mark.parametrize(("app", "side"), [(EXCLUDED, "uplink"), (INCLUDED, "tunnel")])
def test_a_known_owner_s_flow_opens_at_once_on_his_side(gate, app, side):
    gate.source.knows(5000, app)

    gate.passes(syn())

    assert side == gate.flow(WEB, TCP).side
    right, wrong = (gate.uplink, gate.tunnel) if side == "uplink" else (gate.tunnel, gate.uplink)
    assert (1, 0) == (len(right.socket.frames), len(wrong.socket.frames))
    assert [] == gate.tun.answers


def test_what_users_are_shown_of_a_flow_is_how_it_was_judged(gate):
    gate.source.knows(5000, EXCLUDED)

    gate.passes(syn())

    flow = gate.flow(WEB, TCP)
    assert (100, EXCLUDED, 1000) == (flow.app.pid, flow.app.exe, flow.app.uid)
    assert ("rule 1: /opt/excluded", "exact") == (flow.reason, flow.attribution)


@pytest.mark.parametrize(
    ("packet", "protocol", "text"),
    [
        (udp(WEB), UDP, WEB),
        (udp(WEB6), UDP, WEB6),
        (tcp(WEB6, flags=SYN), TCP, WEB6),
        (echo(f"{TUN4} > {FAR4}", 5000), ICMP, f"{TUN4}:5000 > {FAR4}:0"),
    ],
)
def test_every_kind_of_flow_opens(gate, packet, protocol, text):
    gate.source.knows(5000, EXCLUDED)

    gate.passes(packet)

    assert 1 == len(gate.uplink.socket.frames)
    assert gate.flow(text, protocol)


def test_a_protocol_that_is_listed_is_translated_by_address(gate):
    with a_gate(protocols=frozenset({47})) as listed:
        listed.source.knows(0, EXCLUDED)
        listed.passes(transport(f"{TUN4} > {FAR4}", 47, b"\0\0\x08\0"))
        listed.passes(transport(f"{TUN4} > {FAR4}", 47, b"\0\0\x08\1"))

        outside = [transport(f"{HOST4} > {FAR4}", 47, b"\0\0\x08" + end) for end in (b"\0", b"\1")]
        assert outside == listed.uplink.socket.packets


def test_two_flows_that_would_look_alike_outside_are_not_both_opened():
    with a_gate(protocols=frozenset({47})) as listed:
        listed.source.knows(0, EXCLUDED)
        listed.passes(transport(f"{TUN4} > {FAR4}", 47, b"\0\0\x08\0"))
        listed.passes(transport(f"{HOST4} > {FAR4}", 47, b"\0\0\x08\0"))

        assert 1 == len(listed.nat)
        assert ["icmp 3/13 from us"] == answered(listed)


# Held


async def test_what_is_held_leaves_in_order_once_its_owner_is_found(gate, nursery, autojump_clock):
    gate.source.finds(5000, EXCLUDED)
    gate.run(nursery)
    packets = [udp(WEB, b"%d" % number) for number in range(20)]
    gate.tun.sends(*packets)
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [packet[28:] for packet in packets] == [packet[28:] for packet in gate.uplink.socket.packets]
    assert [5000] == gate.source.searched
    assert 0 == len(gate.hold)


async def test_a_blocked_owner_s_packets_are_answered_each(gate, nursery, autojump_clock):
    gate.run(nursery)  # nobody is found
    gate.tun.sends(udp(WEB, b"1"), udp(WEB, b"2"), syn())
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert ["icmp 3/13 from us"] * 2 + ["reset"] == answered(gate)
    assert [] == gate.uplink.socket.frames + gate.tunnel.socket.frames


async def test_a_search_gives_way(gate, nursery):
    gate.source.steps = 1000
    gate.run(nursery)
    gate.now = trio.current_time()
    gate.passes(syn())
    turns = 0
    while gate.hold:
        await trio.lowlevel.checkpoint()
        turns += 1

    assert turns > 900


@pytest.mark.parametrize(("packet", "answer"), [(syn(), "reset"), (udp(WEB), "icmp 3/13 from us")])
async def test_what_is_held_for_too_long_is_refused(gate, nursery, autojump_clock, packet, answer):
    nursery.start_soon(gate.admit.release_late)  # and nobody searches
    await trio.testing.wait_all_tasks_blocked()
    gate.now = trio.current_time()
    gate.passes(packet)
    assert [] == gate.tun.answers

    await trio.sleep(1.1)

    assert [answer] == answered(gate)
    assert 1 == gate.admit.counters["held_too_long"]


async def test_what_is_too_late_is_not_searched_for(gate, nursery, autojump_clock):
    nursery.start_soon(gate.admit.release_late)
    gate.now = trio.current_time()
    gate.passes(syn())
    await trio.sleep(1.1)
    gate.run(nursery)
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [] == gate.source.searched


async def test_a_search_that_outlasts_the_hold_is_given_up(gate, nursery, mock_clock):
    mock_clock.rate = 0
    gate.source.steps = 1_000_000
    nursery.start_soon(gate.admit.search)
    nursery.start_soon(gate.admit.release_late)
    gate.now = trio.current_time()
    gate.passes(syn())
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    mock_clock.jump(2.0)
    await trio.testing.wait_all_tasks_blocked()  # the worker waits again

    assert ["reset"] == answered(gate)


async def test_unattributed_may_be_allowed(nursery, autojump_clock):
    with a_gate(unattributed=Verdict.TUNNEL) as gate:
        gate.run(nursery)
        gate.tun.sends(syn())
        await trio.testing.wait_all_tasks_blocked(0.01)

        assert 1 == len(gate.tunnel.socket.frames)


def test_a_full_hold_refuses(gate, monkeypatch):
    monkeypatch.setattr(hold_module, "MOST_FLOWS", 1)
    gate.passes(syn(), syn(f"{TUN4}:5001 > {FAR4}:80"))

    assert ["reset"] == answered(gate)
    assert 1 == gate.admit.statistics()["hold_full"]
    assert 1 == gate.admit.statistics()["held_flows"]


def test_a_flow_that_sends_too_much_while_it_is_held_is_refused_the_rest(gate, monkeypatch):
    monkeypatch.setattr(hold_module, "MOST_PACKETS_A_FLOW", 2)
    gate.passes(*[udp(WEB)] * 3)

    assert ["icmp 3/13 from us"] == answered(gate)


# Refused


@pytest.mark.parametrize(
    ("packet", "answer"),
    [
        (syn(), "reset"),
        (tcp(WEB6, flags=SYN), "reset"),
        (udp(WEB), "icmp 3/13 from us"),
        (udp(WEB6), "icmp 1/1 from us"),
        (echo(f"{TUN4} > {FAR4}", 5000), "icmp 3/13 from us"),
    ],
)
def test_the_app_is_told_of_a_refusal(gate, packet, answer):
    gate.source.at_once[5000] = Attribution("no socket", None)

    gate.passes(packet)

    assert [answer] == answered(gate)
    assert 0 == len(gate.nat)


def test_a_refusal_is_remembered_and_answered_again(gate):
    gate.source.at_once[5000] = Attribution("no socket", None)
    gate.passes(syn(), syn())

    assert ["reset", "reset"] == answered(gate)
    assert [5000] == gate.source.asked
    assert [("unattributed", "gone", None)] == [
        (one.reason, one.attribution, one.app) for one in gate.admit.refused.values()
    ]


def test_a_refusal_is_forgotten(gate):
    gate.source.at_once[5000] = Attribution("no socket", None)
    gate.passes(syn())
    gate.source.knows(5000, EXCLUDED)
    gate.now += admit_module.REFUSED_S

    gate.passes(syn())

    assert 1 == len(gate.uplink.socket.frames)
    assert {} == gate.admit.refused


def test_a_refusal_is_the_sockets_and_not_the_four_tuples(gate):
    """L27: the next socket may be another app's."""
    gate.source.at_once[5000] = Attribution("nobody found", None, b"one     ")
    gate.source.cookies[5000] = b"one     "
    gate.passes(syn(), syn())
    assert [5000] == gate.source.asked
    gate.source.knows(5000, EXCLUDED, b"another ")

    gate.passes(syn())

    assert 1 == len(gate.uplink.socket.frames)
    assert {} == gate.admit.refused


def test_only_so_many_refusals_are_remembered(gate, monkeypatch):
    monkeypatch.setattr(admit_module, "MOST_REFUSED", 3)
    for port in range(1, 6):
        gate.source.at_once[port] = Attribution("no socket", None)
        gate.passes(syn(f"{TUN4}:{port} > {FAR4}:80"))

    assert [3, 4, 5] == [int.from_bytes(key[-4:-2], "big") for _, key in gate.admit.refused]


def test_what_waits_for_a_refused_first_fragment_is_dropped_with_it(gate):
    gate.source.at_once[5000] = Attribution("no socket", None)
    first, *others = fragments(udp(WEB, bytes(3000)), 1280)

    gate.passes(*others, first)

    assert 1 == len(gate.tun.answers)
    assert len(others) == gate.counters["fragments_refused"]


def test_a_protocol_that_is_not_listed_is_refused(gate):
    gate.passes(transport(f"{TUN4} > {FAR4}", 47, b"\0\0\x08\0"))

    assert ["icmp 3/13 from us"] == answered(gate)
    assert ["protocol not listed"] == [one.reason for one in gate.admit.refused.values()]
    assert [] == gate.source.asked


@pytest.mark.parametrize(("app", "side"), [(EXCLUDED, "uplink"), (INCLUDED, "tunnel")])
def test_a_side_without_a_way_refuses_and_says_so(gate, app, side):
    gate.source.knows(5000, app)
    gate.network.closed = {side}

    gate.passes(syn())

    assert ["reset"] == answered(gate)
    (refusal,) = gate.admit.refused.values()
    assert refusal.reason.endswith(f"; the {side} has no way there")
    assert app == refusal.app.exe
    assert [] == gate.uplink.socket.frames + gate.tunnel.socket.frames


def test_without_a_port_there_is_no_flow(gate):
    gate.source.knows(5000, EXCLUDED)
    gate.ports.room = False

    gate.passes(syn())

    assert ["rule 1: /opt/excluded; no room"] == [one.reason for one in gate.admit.refused.values()]


def test_nor_in_a_full_table(gate, monkeypatch):
    gate.source.knows(5000, EXCLUDED)
    monkeypatch.setattr(gate.nat, "has_room", lambda _: False)

    gate.passes(syn())

    assert ["reset"] == answered(gate)


def test_an_app_of_a_version_that_the_tun_does_not_have_is_not_answered(gate):
    del gate.network.signer[6]
    gate.passes(transport(f"{TUN6} > {FAR6}", 47, b"\0\0\x08\0"))

    assert [] == gate.tun.answers
    assert 1 == gate.answers.counters["unanswered"]


# For nobody


@pytest.mark.parametrize(
    ("packet", "counter"),
    [
        (tcp(WEB, flags=RST), "reset_of_no_flow"),
        (tcp(WEB, flags=RST | ACK), "reset_of_no_flow"),
        (echo(f"{TUN4} > {FAR4}", 1, reply=True), "icmp_of_no_flow"),
        (error(f"{TUN4} > {FAR4}", udp(f"{FAR4}:1 > {TUN4}:2"), 3, 3), "icmp_of_no_flow"),
        (transport(f"{TUN4} > {FAR4}", ICMP, bytes((13, 0)) + bytes(18)), "icmp_of_no_flow"),
        (udp(f"{TUN4}:5353 > 224.0.0.251:5353"), "multicast"),
        (udp(f"{TUN4}:68 > 255.255.255.255:67"), "multicast"),
        (udp(f"[{TUN6}]:5353 > [ff02::fb]:5353"), "multicast"),
    ],
)
def test_what_the_kernel_makes_is_never_attributed(gate, packet, counter):
    gate.passes(packet)

    assert ([], [], 1) == (gate.source.asked, gate.tun.answers, gate.admit.counters[counter])


@pytest.mark.parametrize("packet", [b"", b"\x45", bytes(40), b"\x60" + bytes(39), udp(WEB)[:27], tcp(WEB)[:30]])
def test_what_is_no_packet_is_counted(gate, packet):
    gate.passes(packet)

    assert {"malformed": 1} == gate.counters


# Flows that are there


def test_a_syn_sent_again_by_the_same_socket_passes(gate):
    gate.source.knows(5000, EXCLUDED, COOKIE)
    gate.passes(syn(), syn())

    assert 2 == len(gate.uplink.socket.frames)
    assert [5000] == gate.source.asked
    assert 1 == gate.nat.counters["opened"]


def test_another_socket_on_the_same_four_tuple_is_judged_anew(gate):
    gate.source.knows(5000, EXCLUDED, COOKIE)
    gate.passes(syn())
    gate.source.knows(5000, INCLUDED, OTHER_COOKIE)
    gate.passes(syn())

    assert (1, 1) == (len(gate.uplink.socket.frames), len(gate.tunnel.socket.frames))
    assert "tunnel" == gate.flow(WEB, TCP).side


def test_so_is_one_that_cannot_be_compared(gate):
    gate.source.knows(5000, EXCLUDED)  # no cookie
    gate.passes(syn(), syn())

    assert 2 == gate.nat.counters["opened"]


def test_if_the_kernel_cannot_compare_them_nothing_is_guessed(gate):
    gate.source.knows(5000, EXCLUDED, COOKIE)
    gate.passes(syn())
    gate.source.error = KernelError("sock_diag: no")
    gate.passes(syn())

    assert ["reset"] == answered(gate)
    assert 1 == len(gate.uplink.socket.frames)
    assert gate.flow(WEB, TCP) is None


def test_the_packets_that_the_fast_path_cannot_take_follow_their_flow(gate):
    gate.source.knows(5000, EXCLUDED)
    gate.passes(udp(WEB), with_options(udp(WEB, b"no options"), RECORD_ROUTE))

    assert b"no options" == gate.uplink.socket.packets[1][28:]


# Untranslated


@pytest.mark.parametrize("source", [HOST4, "192.168.50.3"])
@pytest.mark.parametrize("flags", [SYN | ACK, ACK, FIN | ACK])
def test_what_carries_its_side_s_address_and_opens_nothing_goes_as_it_is(gate, source, flags):
    text = f"{source}:80 > {FAR4}:5000"
    gate.source.knows(80, EXCLUDED)

    gate.passes(tcp(text, flags=flags))

    assert [tcp(text, flags=flags)] == gate.uplink.socket.packets
    assert not gate.flow(text, TCP).translated


def test_of_the_other_side_it_does_not(gate):
    gate.source.knows(80, INCLUDED)

    gate.passes(tcp(f"{HOST4}:80 > {FAR4}:5000", flags=SYN | ACK))

    assert [] == gate.uplink.socket.frames + gate.tunnel.socket.frames
    assert ["reset"] == answered(gate)


def test_a_connection_that_nat_has_forgotten_is_reset(gate):
    gate.source.knows(5000, EXCLUDED)

    gate.passes(tcp(WEB, flags=ACK))

    assert ["reset"] == answered(gate)


# Failures


def test_an_organ_that_fails_blocks(gate, caplog):
    gate.source.error = KernelError("sock_diag: no")

    gate.passes(syn(), udp(WEB))

    assert ["reset", "icmp 3/13 from us"] == answered(gate)
    assert 2 == gate.admit.counters["judgement_failed"]
    assert 1 == len(caplog.records)  # a line a second at most


@pytest.mark.parametrize("failure", [KernelError("procfs: no"), ZeroDivisionError()])
async def test_one_that_fails_in_a_search_does_not_cost_us_the_worker(gate, nursery, failure):
    gate.run(nursery)
    gate.now = trio.current_time()
    gate.passes(syn())
    gate.source.error = failure
    await trio.testing.wait_all_tasks_blocked(0.01)
    gate.source.error = None
    gate.source.finds(5001, EXCLUDED)
    gate.passes(udp(f"{TUN4}:5001 > {FAR4}:80"))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert ["reset"] == answered(gate)
    assert 1 == len(gate.uplink.socket.frames)


@pytest.mark.parametrize("organ", ["network", "ports"])
def test_one_that_fails_after_the_verdict_blocks_too(gate, organ):
    gate.source.knows(5000, EXCLUDED)
    getattr(gate, organ).error = KernelError("rtnetlink: no")

    gate.passes(syn())

    assert ["reset"] == answered(gate)
    assert ["the kernel gave no answer"] == [one.reason for one in gate.admit.refused.values()]


def test_several_holders_on_one_side_are_no_matter(gate):
    gate.source.at_once[5000] = Attribution("udp socket", owner(EXCLUDED, Certainty.SHARED))

    gate.passes(udp(WEB))

    assert "shared" == gate.flow(WEB, UDP).attribution
    assert 1 == gate.admit.counters["attributed_shared"]


# What devices tell


@pytest.mark.parametrize(
    "packet",
    [udp(WEB, b"x" * 30), tcp(WEB, b"x"), udp(WEB6), echo(f"{TUN4} > {FAR4}", 5000)],
)
@pytest.mark.parametrize("kind", ["unreachable", "too_big"])
def test_the_error_quotes_the_packet_as_the_app_sent_it(gate, packet, kind):
    gate.source.knows(5000, EXCLUDED)
    gate.passes(packet if packet[9] != TCP or packet[0] >> 4 == 6 else syn())
    (flow,) = gate.nat
    for sent in gate.admit._slow.translate_untrusted(bytes(10), packet, gate.now):  # noqa: SLF001  # as the pump does
        rewritten = bytes(sent.packet)
    arguments = (1280,) if kind == "too_big" else ()

    getattr(gate.answers, kind)(flow.original, rewritten, *arguments)

    (answer,) = gate.tun.answers
    header = 20 if packet[0] >> 4 == 4 else 40
    quoted = answer[header + 8 :]
    version = packet[0] >> 4
    assert ends_of(packet, header) == ends_of(quoted, header)
    codes = {"unreachable": {4: (3, 1), 6: (1, 3)}, "too_big": {4: (3, 4), 6: (2, 0)}}
    assert codes[kind][version] == tuple(answer[header : header + 2])
    if kind == "too_big":
        assert 1280 == int.from_bytes(answer[header + 4 : header + 8], "big")


def ends_of(packet, header):
    addresses = packet[12:20] if header == 20 else packet[8:40]
    ports = packet[header : header + 4] if packet[9 if header == 20 else 6] != ICMP else packet[24:26]
    return addresses + ports


@pytest.mark.parametrize("kind", ["unreachable", "too_big"])
def test_no_error_without_a_signer(gate, kind):
    gate.source.knows(5000, EXCLUDED)
    gate.passes(udp(WEB))
    (flow,) = gate.nat
    gate.network.signer.clear()

    partial(getattr(gate.answers, kind), flow.original, gate.uplink.socket.packets[0])(*[1280] * (kind == "too_big"))

    assert [] == gate.tun.answers


def test_a_neighbour_that_does_not_answer_is_told_of(gate):
    gate.source.knows(5000, EXCLUDED)
    gate.uplink.device._unreachable = gate.answers.unreachable  # noqa: SLF001  # as app.py wires it
    gate.uplink.neighbour(ROUTER4, None, NeighbourState.FAILED)
    gate.passes(udp(WEB))
    gate.uplink.neighbour(ROUTER4, None, NeighbourState.FAILED)

    assert ["icmp 3/1 from us"] == answered(gate)


def test_the_relay_is_no_part_of_an_excluded_flow(gate):
    gate.source.knows(5000, EXCLUDED)
    gate.passes(udp(WEB))

    assert RELAY4.packed not in b"".join(gate.uplink.socket.frames)
    assert ends(f"{HOST4}:1 > {FAR4}:80").source in gate.uplink.socket.frames[0]
