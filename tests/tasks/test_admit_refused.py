"""First packets that are refused or concern nobody, organs that fail, and what an app is told."""

from functools import partial

import pytest
import trio
import trio.testing

from tests.craft import (
    ACK,
    RST,
    SYN,
    echo,
    ends,
    error,
    fragments,
    tcp,
    transport,
    udp,
)
from tests.fakes.devices import FAR4, FAR6, HOST4, ICMP, ROUTER4, TCP, TUN4, TUN6, UDP
from tests.fakes.gates import WEB, WEB6, answered, syn
from tests.fakes.judges import EXCLUDED, INCLUDED, RELAY4, owner
from tunsplit.engine.attribution import Attribution, Certainty
from tunsplit.errors import KernelError
from tunsplit.host import NeighbourState
from tunsplit.tasks import refusals

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
    gate.now += refusals.REFUSED_S

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
    monkeypatch.setattr(refusals, "MOST_REFUSED", 3)
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
    monkeypatch.setattr(gate.nat, "has_room", lambda *_: False)

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


async def test_a_mistake_over_what_was_held_for_too_long_does_not_end_the_daemon(
    gate, nursery, autojump_clock, monkeypatch
):
    nursery.start_soon(gate.admit.release_late)
    gate.now = trio.current_time()
    gate.passes(syn())
    with monkeypatch.context() as patch:
        patch.setattr(gate.judge, "judge", lambda _: 1 // 0)
        await trio.sleep(1.1)
    gate.now = trio.current_time()
    gate.passes(udp(f"{TUN4}:5001 > {FAR4}:80"))
    await trio.sleep(1.1)

    assert ["reset", "icmp 3/13 from us"] == answered(gate)


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
@pytest.mark.parametrize("kind", ["unreachable", "too_big", "no_way"])
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
    # A connection outlives "unreachable"; "prohibited" reaches who has sent a datagram.
    codes["no_way"] = codes["unreachable"] if flow.protocol == TCP else {4: (3, 13), 6: (1, 1)}
    assert codes[kind][version] == tuple(answer[header : header + 2])
    if kind == "too_big":
        assert 1280 == int.from_bytes(answer[header + 4 : header + 8], "big")


def ends_of(packet, header):
    addresses = packet[12:20] if header == 20 else packet[8:40]
    ports = packet[header : header + 4] if packet[9 if header == 20 else 6] != ICMP else packet[24:26]
    return addresses + ports


@pytest.mark.parametrize("kind", ["unreachable", "too_big", "no_way"])
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
