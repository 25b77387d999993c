"""First packets: sent, refused with an answer, dropped and counted, or held; never guessed, never lost."""

import pytest
import trio
import trio.testing

from tests.craft import (
    ACK,
    FIN,
    RECORD_ROUTE,
    SYN,
    echo,
    tcp,
    transport,
    udp,
    with_options,
)
from tests.fakes.devices import FAR4, HOST4, ICMP, TCP, TUN4, UDP
from tests.fakes.gates import COOKIE, OTHER_COOKIE, WEB, WEB6, a_gate, answered, syn
from tests.fakes.judges import EXCLUDED, INCLUDED
from tunsplit.engine import hold as hold_module
from tunsplit.engine.flow import FlowEvent
from tunsplit.engine.policy import Verdict
from tunsplit.errors import KernelError
from tunsplit.tasks import admit as admit_module

# Known owners


@pytest.mark.parametrize(("app", "side"), [(EXCLUDED, "uplink"), (INCLUDED, "tunnel")])
def test_a_known_owner_s_flow_opens_at_once_on_his_side(gate, app, side):
    gate.source.knows(5000, app)

    gate.passes(syn())

    assert side == gate.flow(WEB, TCP).side
    right, wrong = (gate.uplink, gate.tunnel) if side == "uplink" else (gate.tunnel, gate.uplink)
    assert (1, 0) == (len(right.socket.frames), len(wrong.socket.frames))
    assert [] == gate.tun.answers


@pytest.mark.parametrize(("port", "sockets"), [(5000, (7,)), (53, ())])
def test_a_sender_is_judged_as_who_asks_by_its_socket_unless_that_takes_questions(gate, port, sockets):
    gate.source.knows(port, EXCLUDED)
    gate.source.at_once[port] = gate.source.at_once[port]._replace(sockets=(7,))

    gate.passes(udp(f"{TUN4}:{port} > {FAR4}:5353"))

    assert sockets == gate.judge.sockets


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


def test_what_loses_its_way_while_it_is_judged_does_not_leave(gate):
    gate.source.knows(5000, EXCLUDED)
    lost = []

    def hear():
        lost.extend(gate.nat)
        for flow in lost:
            gate.nat.end(flow, FlowEvent.BLOCK, gate.now)

    gate.network.hear = hear
    gate.passes(syn())

    assert (1, []) == (len(lost), gate.uplink.socket.frames)


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


def from_port(port):
    return syn(f"{TUN4}:{port} > {FAR4}:80")


async def test_all_who_wait_are_searched_for_at_once_and_users_in_turn(gate, nursery, monkeypatch):
    monkeypatch.setattr(admit_module, "SEARCHED", 3)
    gate.source.users = {5000: 1000, 5001: 1000, 5002: 1000, 5003: 1001}
    gate.now = trio.current_time()
    gate.passes(*(from_port(port) for port in range(5000, 5005)))
    gate.run(nursery)
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [[5000, 5003, 5004], [5001, 5002]] == gate.source.searches
    assert 0 == len(gate.hold)


async def test_who_has_others_waiting_waits_too_and_nobody_else(gate, nursery):
    """To take in what will time out must not cost the time that it takes to find the owners."""
    gate.source.users = {5000: 1000, 5001: 1000, 5002: 1001}
    gate.source.knows(5001, EXCLUDED)
    gate.source.knows(5002, EXCLUDED)
    gate.source.finds(5001, EXCLUDED)
    gate.now = trio.current_time()
    gate.passes(*(from_port(port) for port in (5000, 5001, 5002)))
    assert [5000, 5002] == gate.source.asked
    gate.run(nursery)
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [[5000, 5001]] == gate.source.searches
    assert 2 == len(gate.uplink.socket.frames)


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


async def test_a_search_goes_by_who_was_born_before_it(gate, nursery, monkeypatch):
    gate.source.finds(5000, EXCLUDED)
    gate.now = trio.current_time()
    gate.passes(from_port(5000))
    searches = []
    monkeypatch.setattr(gate.judge, "prepare", lambda: searches.append(len(gate.source.searches)))
    gate.run(nursery)
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [0, 1] == searches  # before it, and before the owner that it has found is judged


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
    monkeypatch.setattr(hold_module, "SHARE", 1)
    gate.passes(syn(), syn(f"{TUN4}:5001 > {FAR4}:80"))

    assert ["reset"] == answered(gate)
    assert 1 == gate.admit.statistics()["hold_full"]
    assert 1 == gate.admit.statistics()["held_flows"]


def test_a_flow_that_sends_too_much_while_it_is_held_is_refused_the_rest(gate, monkeypatch):
    monkeypatch.setattr(hold_module, "MOST_PACKETS_A_FLOW", 2)
    gate.passes(*[udp(WEB)] * 3)

    assert ["icmp 3/13 from us"] == answered(gate)


# Flows that are there


def test_a_syn_sent_again_by_the_same_socket_passes(gate):
    gate.source.knows(5000, EXCLUDED, COOKIE)
    gate.passes(syn(), syn())

    assert 2 == len(gate.uplink.socket.frames)
    assert [5000] == gate.source.asked
    assert 1 == gate.nat.counters["opened"]


def test_a_reset_of_an_older_connection_does_not_close_the_one_that_follows(gate):
    gate.source.knows(5000, EXCLUDED, COOKIE)
    gate.passes(syn())
    flow = gate.flow(WEB, TCP)
    gate.nat.close(flow)
    gate.passes(syn())

    assert ("open", [flow]) == (flow.state.value, list(gate.nat))
    assert 2 == len(gate.uplink.socket.frames)


def test_another_socket_on_the_same_four_tuple_is_judged_anew(gate):
    gate.source.knows(5000, EXCLUDED, COOKIE)
    gate.passes(syn())
    gate.source.knows(5000, INCLUDED, OTHER_COOKIE)
    gate.passes(syn())

    assert (1, 1) == (len(gate.uplink.socket.frames), len(gate.tunnel.socket.frames))
    assert "tunnel" == gate.flow(WEB, TCP).side


def test_so_is_one_after_both_ends_have_closed_the_connection(gate):
    """L27: it is another connection, whoever's; there is nothing to compare."""
    gate.source.knows(5000, EXCLUDED, COOKIE)
    gate.passes(syn())
    gate.flow(WEB, TCP).closed_ways = 3
    gate.nat.close(gate.flow(WEB, TCP))
    gate.source.knows(5000, INCLUDED, COOKIE)
    gate.passes(syn())

    assert (1, 1) == (len(gate.uplink.socket.frames), len(gate.tunnel.socket.frames))
    assert ("tunnel", 2) == (gate.flow(WEB, TCP).side, gate.nat.counters["opened"])


def test_so_is_one_that_cannot_be_compared(gate):
    gate.source.knows(5000, EXCLUDED)  # no cookie
    gate.passes(syn(), syn())

    assert 2 == gate.nat.counters["opened"]


def test_what_its_holder_has_become_counts_before_the_flow_goes_on(gate, monkeypatch):
    """L27: the judge tells of it, and so ends the flow, before the packet is let pass."""
    gate.source.knows(5000, EXCLUDED, COOKIE)
    gate.passes(syn())

    def tell():
        gate.nat.end(gate.flow(WEB, TCP), FlowEvent.BLOCK, gate.now)
        gate.source.knows(5000, INCLUDED, COOKIE)
        monkeypatch.undo()

    monkeypatch.setattr(gate.judge, "tell", tell)
    gate.passes(syn())

    assert (1, 1) == (len(gate.uplink.socket.frames), len(gate.tunnel.socket.frames))


def test_where_that_cannot_be_known_the_flows_of_others_go_on(gate, monkeypatch):
    """L29: a fork storm, above all."""
    gate.source.knows(5000, EXCLUDED, COOKIE)
    gate.passes(syn())

    def fail():
        raise KernelError("processes are born faster than they can be taken in")

    monkeypatch.setattr(gate.judge, "prepare", fail)
    gate.passes(syn())

    assert 2 == len(gate.uplink.socket.frames)
    assert 1 == gate.admit.counters["judged_late"]


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
