"""Answers to what came in: on the side where it came in, from where it was asked, or not at all."""

import pytest
import trio
import trio.testing

from tests.craft import ACK, FIN, SYN, ends, tcp, udp
from tests.fakes.devices import FAR4, HOST4, TCP, TUN4, UDP
from tests.fakes.gates import answered
from tests.fakes.judges import EXCLUDED, INCLUDED, RELAY4
from tunsplit.engine.attribution import Attribution
from tunsplit.engine.flow import FlowState
from tunsplit.errors import KernelError
from tunsplit.tasks.portchoice import Asked

SERVED = f"{HOST4}:80 > {FAR4}:5000"
EVERYWHERE = f"{TUN4}:80 > {FAR4}:5000"
SECOND4 = "192.168.50.3"


def answer(flags=ACK, data=b""):
    return tcp(SERVED, data, flags=flags)


# Datagrams


def test_a_datagram_that_answers_leaves_from_where_was_asked(gate):
    gate.source.knows(80, EXCLUDED)
    gate.ports.questions[ends(EVERYWHERE).key] = Asked(ends(f"{SECOND4} > {FAR4}").source, 8000)
    gate.passes(udp(EVERYWHERE, b"one"), udp(EVERYWHERE, b"two"))

    outside = f"{SECOND4}:8000 > {FAR4}:5000"
    assert [udp(outside, b"one"), udp(outside, b"two")] == gate.uplink.socket.packets
    assert not gate.flow(EVERYWHERE, UDP).translated


def test_a_datagram_that_answers_the_other_side_does_not_leave(gate):
    """L20, L30: neither there, nor here, where it would tell that both are one host."""
    gate.source.knows(80, EXCLUDED)
    gate.ports.questions[ends(EVERYWHERE).key] = Asked(RELAY4.packed, 80)
    gate.passes(udp(EVERYWHERE))

    assert [] == gate.uplink.socket.frames + gate.tunnel.socket.frames
    assert ["icmp 3/13 from us"] == answered(gate)
    assert ["rule 1: /opt/excluded; it answers what came in on another side"] == [
        one.reason for one in gate.admit.refused.values()
    ]


def test_a_socket_whose_address_the_host_has_lost_is_ended(gate):
    """No answer would reach it, and no error."""
    gate.source.knows(5000, EXCLUDED, b"its cookie")
    stale = f"{SECOND4}:5000 > {FAR4}:443"
    gate.network.lost.add(SECOND4)
    gate.passes(udp(stale))

    assert [(UDP, ends(stale).key, b"its cookie")] == gate.source.ended
    assert [] == gate.uplink.socket.frames
    assert ["rule 1: /opt/excluded; it has an address that this host has no more"] == [
        one.reason for one in gate.admit.refused.values()
    ]
    gate.network.lost.clear()
    gate.admit.refused.clear()
    gate.passes(udp(stale))
    assert 1 == len(gate.source.ended) == len(gate.uplink.socket.frames)


# Connections


def test_a_connection_is_judged_by_its_listener_until_somebody_has_accepted_it(gate):
    gate.source.listens(80, EXCLUDED)
    gate.passes(answer(SYN | ACK), answer(SYN | ACK), answer())
    assert 3 == len(gate.uplink.socket.frames)
    assert (True, None) == (gate.flow(SERVED, TCP).unaccepted, gate.flow(SERVED, TCP).cookie)

    gate.source.accepts(80, EXCLUDED)
    gate.passes(answer(data=b"one"), answer(data=b"two"))
    assert 5 == len(gate.uplink.socket.frames)
    assert (False, b"accepted") == (gate.flow(SERVED, TCP).unaccepted, gate.flow(SERVED, TCP).cookie)
    assert [80] * 3 == gate.source.asked  # two SYN/ACKs, and the first word of who has accepted


def test_who_accepts_may_be_on_the_other_side(gate):
    """L27."""
    gate.source.listens(80, EXCLUDED)
    gate.passes(answer(SYN | ACK))
    gate.source.accepts(80, INCLUDED)
    gate.passes(answer(data=b"not for here"))

    assert [answer(SYN | ACK)] == gate.uplink.socket.packets
    assert [] == gate.tunnel.socket.frames
    assert ["reset"] == answered(gate)
    assert gate.flow(SERVED, TCP) is None


def test_another_listener_on_the_same_four_tuple_is_judged_anew(gate):
    """L27."""
    gate.source.listens(80, EXCLUDED)
    gate.passes(answer(SYN | ACK))
    gate.source.listens(80, INCLUDED)
    gate.passes(answer(SYN | ACK))

    assert [answer(SYN | ACK)] == gate.uplink.socket.packets
    assert ["reset"] == answered(gate)


@pytest.mark.parametrize("is_left", [True, False])
async def test_who_has_accepted_answered_and_ended_is_on_its_listeners_side(gate, nursery, autojump_clock, is_left):
    """It is gone before anybody has looked; who still has the connection, and cannot be found, is nobody's."""
    gate.run(nursery)
    gate.source.listens(80, EXCLUDED)
    gate.passes(answer(SYN | ACK))
    gate.source.accepts(80, EXCLUDED)
    del gate.source.at_once[80]
    gate.source.found[80] = Attribution("tcp socket without a holder", None)
    gate.passes(answer(FIN | ACK, b"short"))
    if is_left:
        gate.source.accepted.clear()
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert (2 if is_left else 1) == len(gate.uplink.socket.frames)
    assert ([] if is_left else ["reset"]) == answered(gate)


def test_a_first_packet_may_be_the_last(gate):
    gate.source.knows(80, EXCLUDED)
    gate.passes(answer(FIN | ACK))

    assert FlowState.CLOSING is gate.flow(SERVED, TCP).state


def test_if_nobody_can_tell_who_has_accepted_nothing_is_guessed(gate):
    gate.source.listens(80, EXCLUDED)
    gate.passes(answer(SYN | ACK))
    gate.source.error = KernelError("sock_diag: no")
    gate.passes(answer())

    assert ["reset"] == answered(gate)
    assert 1 == len(gate.uplink.socket.frames)
