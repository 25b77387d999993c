"""L11, L27: a UDP datagram is not taken for the next socket's on its port."""

import logging

import pytest

from tests.craft import ends, fragments, udp
from tests.fakes.devices import FAR4, TCP, TUN4, UDP
from tests.fakes.gates import COOKIE, OTHER_COOKIE, WEB, syn
from tests.fakes.judges import EXCLUDED, INCLUDED
from tunsplit.engine.flow import FlowState
from tunsplit.errors import KernelError
from tunsplit.kernel.sockdeaths import BATCH
from tunsplit.tasks.handovers import READS

PORT = ends(WEB).source_port


def carried(gate):
    """Frames on the uplink, frames in the tunnel."""
    return len(gate.uplink.socket.frames), len(gate.tunnel.socket.frames)


def next_batch(gate):
    gate.now += 0.001


def dropped(gate):
    return gate.admit.counters["port_changed_hands"]


@pytest.mark.parametrize("app", [EXCLUDED, INCLUDED])
def test_a_first_datagram_that_may_be_of_a_dead_socket_is_dropped_until_the_tun_was_empty(gate, app):
    gate.source.knows(PORT, app, COOKIE)
    gate.deaths.dies(PORT, OTHER_COOKIE)
    gate.passes(udp(WEB))
    assert ((0, 0), 1, []) == (carried(gate), dropped(gate), gate.tun.answers)
    assert not gate.admit.refused

    gate.handovers.carried(False)
    gate.passes(udp(WEB))
    assert 2 == dropped(gate)

    gate.handovers.carried(True)
    gate.passes(udp(WEB))
    assert 1 == sum(carried(gate))


def test_a_death_on_another_port_or_of_another_protocol_or_the_senders_own_is_none(gate):
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    gate.deaths.dies(PORT + 1, OTHER_COOKIE)
    gate.deaths.dies(PORT, OTHER_COOKIE, TCP)
    gate.deaths.dies(PORT, COOKIE)
    gate.passes(udp(WEB))
    assert (1, 0) == carried(gate)


def test_a_connection_is_known_by_more_than_its_port(gate):
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    gate.deaths.dies(PORT, OTHER_COOKIE)
    gate.passes(syn())
    assert (1, 0) == carried(gate)


def test_the_pieces_of_a_dropped_datagram_go_with_it(gate):
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    gate.deaths.dies(PORT, OTHER_COOKIE)
    first, *others = fragments(udp(WEB, bytes(3000)), 1280)
    gate.passes(*others, first)
    assert ((0, 0), len(others)) == (carried(gate), gate.counters["fragments_refused"])


def test_an_open_flow_of_the_same_socket_is_in_doubt_as_well(gate):
    """Of several sockets on one port the likeliest is asked for within a batch."""
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    gate.passes(udp(WEB))
    next_batch(gate)
    gate.deaths.dies(PORT, OTHER_COOKIE)
    gate.passes(udp(WEB))
    assert ((1, 0), 1) == (carried(gate), dropped(gate))


def test_the_dead_ones_datagrams_pass_where_nobody_has_his_port_since(gate):
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    gate.passes(udp(WEB))
    next_batch(gate)
    gate.source.cookies.clear()
    gate.deaths.dies(PORT, COOKIE)
    gate.passes(udp(WEB))
    assert ((2, 0), 0) == (carried(gate), dropped(gate))


@pytest.mark.parametrize(("app", "passed"), [(EXCLUDED, (2, 0)), (INCLUDED, (1, 0))])
def test_the_next_socket_on_the_same_side_has_the_dead_ones_flow(gate, app, passed):
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    gate.passes(udp(WEB))
    next_batch(gate)
    gate.source.knows(PORT, app, OTHER_COOKIE)
    gate.deaths.dies(PORT, COOKIE)
    gate.passes(udp(WEB))
    assert passed == carried(gate)


def test_what_is_held_is_in_doubt_though_the_tun_was_empty_since(gate):
    gate.passes(udp(WEB))
    gate.deaths.dies(PORT, OTHER_COOKIE)
    gate.handovers.take_in()
    gate.handovers.carried(True)
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    (key,) = gate.admit._waiting.take(1)  # noqa: SLF001  as the search does
    gate.admit.judge(gate.hold.release(key), gate.source.at_once[PORT], gate.now)
    assert ((0, 0), 1) == (carried(gate), dropped(gate))

    gate.passes(udp(WEB))  # what comes now has come after it
    assert (1, 0) == carried(gate)


def lost(gate):
    gate.deaths.overruns += 1


def too_many(gate):
    for number in range(READS * BATCH):
        gate.deaths.dies(6000, number.to_bytes(8, "big"))


def failing(gate):
    gate.deaths.fails = "no more news"


@pytest.mark.parametrize("news", [lost, too_many, failing])
def test_without_the_news_every_port_may_have_changed_hands(gate, news, caplog):
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    news(gate)
    with caplog.at_level(logging.WARNING):
        gate.passes(udp(WEB), udp(f"{TUN4}:{PORT} > {FAR4}:81"))
    assert ((0, 0), 2) == (carried(gate), dropped(gate))
    assert (news is failing) == ("nobody tells of dead sockets" in caplog.text)

    gate.deaths.fails = ""
    gate.handovers.carried(True)
    gate.passes(udp(WEB))
    assert (1, 0) == carried(gate)


def test_the_flows_of_the_dead_are_closed(gate):
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    gate.passes(udp(WEB), syn())
    gate.handovers.close_dead(gate.nat)
    assert FlowState.OPEN is gate.flow(WEB, UDP).state
    gate.deaths.dies(PORT, COOKIE)
    for _ in range(2):
        gate.handovers.close_dead(gate.nat)
    assert (FlowState.CLOSING, FlowState.OPEN) == (gate.flow(WEB, UDP).state, gate.flow(WEB, TCP).state)


@pytest.mark.parametrize("app", [EXCLUDED, INCLUDED])
def test_a_datagram_whose_sender_may_have_been_another_is_dropped(gate, app):
    gate.source.knows(PORT, app, COOKIE)
    gate.heirs.doubted.add(PORT)
    gate.passes(udp(WEB))
    assert ((0, 0), 1, []) == (carried(gate), gate.admit.counters["socket_changed_hands"], gate.tun.answers)
    assert not gate.admit.refused

    gate.heirs.doubted.clear()
    gate.passes(udp(WEB))
    gate.heirs.doubted.add(PORT)
    next_batch(gate)
    gate.passes(udp(WEB))  # of an open flow, too, which stays open
    assert (1, 2) == (sum(carried(gate)), gate.admit.counters["socket_changed_hands"])
    gate.heirs.doubted.clear()
    gate.passes(udp(WEB))
    assert 2 == sum(carried(gate))


def test_a_connections_sender_is_asked_for_by_its_own_rules(gate):
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    gate.heirs.doubted.add(PORT)
    gate.passes(syn())
    assert (1, 0) == carried(gate)


def test_where_nobody_can_tell_how_a_socket_is_held_nothing_passes(gate):
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    gate.passes(udp(WEB))
    next_batch(gate)
    gate.heirs.error = KernelError("too many open files")
    gate.passes(udp(WEB))
    assert ((1, 0), 1) == (carried(gate), gate.admit.counters["judgement_failed"])


def test_of_what_was_held_the_sender_is_asked_for_as_of_then(gate):
    gate.passes(udp(WEB))
    gate.source.knows(PORT, EXCLUDED, COOKIE)
    (key,) = gate.admit._waiting.take(1)  # noqa: SLF001  as the search does
    gate.admit.judge(gate.hold.release(key), gate.source.at_once[PORT], gate.now)
    assert [True] == [asked[-1] for asked in gate.heirs.asked]
