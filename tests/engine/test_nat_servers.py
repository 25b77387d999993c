"""Flows of servers: the original direction alone is ours."""

import pytest

from tests.craft import ACK, FIN, RST, SYN, TCP, UDP, ends, tcp, udp
from tests.world import way
from tunsplit.engine import nat
from tunsplit.engine.flow import FlowState
from tunsplit.engine.slowpath import Unknown

SERVER, FROM_SERVER = "192.0.2.7:80 > 1.1.1.1:5000", "192.0.2.9:8000 > 1.1.1.1:5000"


def serve(world, text=SERVER, *, protocol=TCP, **others):
    """Open a flow of a server that was asked."""
    return world.nat.open_untranslated(
        protocol, ends(text).key, way("192.0.2.7"), world.now, app=None, reason="", attribution="", **others
    )


def test_an_answer_leaves_from_where_it_was_asked_for(world):
    """RFC 1122 §4.1.3.5: not from the way's own source, nor from the port that the server is bound to."""
    asked = ends(FROM_SERVER).source, 8000
    serve(world, "10.128.0.1:80 > 1.1.1.1:5000", protocol=UDP, asked=asked)

    assert udp(FROM_SERVER, b"answer") == world.sent(udp("10.128.0.1:80 > 1.1.1.1:5000", b"answer"))


def test_a_new_connection_to_a_server_is_judged_anew(world):
    """L27: a SYN/ACK on a four-tuple that was in use before may be another listener's."""
    serve(world)

    assert world.sent(tcp(SERVER, flags=SYN | ACK)) is None
    assert world.sent(tcp(SERVER, flags=ACK)) is not None


def test_of_what_is_not_translated_one_end_is_all_that_is_seen(world):
    """The other end's FIN comes in by the kernel."""
    flow = serve(world)
    world.sent(tcp(SERVER, flags=FIN | ACK))

    assert FlowState.CLOSING is flow.state
    assert tcp(SERVER, b"rest") == world.sent(tcp(SERVER, b"rest"))
    assert 1 == world.later(11)


@pytest.mark.parametrize("flags", [ACK, FIN | ACK, SYN | ACK])
def test_every_packet_of_a_connection_that_nobody_has_accepted_is_looked_at(world, flags):
    """L27, L38: somebody may have, since the one before."""
    flow = serve(world, unaccepted=True)
    packet = tcp(SERVER, b"x" * 1000, flags=flags)

    assert world.sent(packet) is None
    unknown = world.sent_slowly(packet)
    assert isinstance(unknown, Unknown)
    assert [packet] == [bytes(ready.packet) for ready in world.outbound.pass_on(unknown, flow.original, world.now)]
    assert 1 == world.later(241)
    assert 0 == world.nat.statistics()["from_outside"]


def test_the_end_of_one_that_nobody_takes_any_more_passes(world):
    """The listener is closed, or the connection was ended by a switch: the kernel resets it."""
    flow = serve(world, unaccepted=True)

    assert [tcp(SERVER, flags=RST)] == world.sent_slowly(tcp(SERVER, flags=RST))
    assert FlowState.CLOSING is flow.state


@pytest.mark.parametrize("kind", [{"unaccepted": True}, {"protocol": UDP, "asked": (ends(SERVER).source, 80)}])
def test_a_flood_from_outside_takes_no_room(world, monkeypatch, kind):
    """SYNs and datagrams come from anybody: the oldest gives way, the others' flows stay."""
    monkeypatch.setattr(nat, "MOST_FROM_OUTSIDE", 2)
    accepted = serve(world)
    flows = [serve(world, f"192.0.2.7:80 > 1.1.1.1:{6000 + at}", **kind) for at in range(4)]

    assert {accepted, *flows[2:]} == set(world.nat)
    assert 2 == world.nat.statistics()["from_outside"]
