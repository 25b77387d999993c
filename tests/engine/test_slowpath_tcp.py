"""What TCP must not take along (L30), and what is left of a connection that has lost its side (L1)."""

import pytest

from tests import craft
from tests.craft import ACK, RST, SYN, TCP, tcp
from tests.world import BOTH, NEEDS_CSUM, TUNNEL, UPLINK, V4, World
from tunsplit.engine.flow import FlowState
from tunsplit.engine.slowpath import SlowPath, Unknown
from tunsplit.wire import vnet
from tunsplit.wire.ip import parse_untrusted

APP, OUT, BACK, TO_APP, OUTSIDE = V4

# Options

MSS, SACK, SCALE = bytes((2, 4, 5, 0xB4)), bytes((4, 2)), bytes((1, 3, 3, 7))
TIME = bytes((8, 10)) + bytes(range(1, 9))
COOKIE, OLD_COOKIE = bytes((34, 10)) + b"crumbled", bytes((254, 12, 0xF9, 0x89)) + b"crumbled"
JOIN = bytes((30, 12)) + b"who am I?!"
OTHERS_EXPERIMENT = bytes((254, 6, 0xE2, 0xD4, 0xC3, 0xD9))
KEPT = MSS + SACK + TIME + SCALE


@BOTH
@pytest.mark.parametrize(
    ("option", "left"),
    [
        (COOKIE, bytes((1,)) * 10),
        (OLD_COOKIE, bytes((1,)) * 12),
        (JOIN, bytes((1,)) * 12),
        (OTHERS_EXPERIMENT, OTHERS_EXPERIMENT),
        (bytes((254, 3, 0xF9)), bytes((254, 3, 0xF9))),
        (bytes((0,)) + COOKIE, bytes((0,)) + COOKIE),
        (bytes((34,)), bytes((34,))),
        (bytes((34, 0)), bytes((34, 0))),
        (bytes((34, 200)), bytes((34, 200))),
    ],
)
def test_no_syn_takes_along_what_a_server_gave_on_the_other_side(world, app, out, back, to_app, outside, option, left):
    """L30: Fast Open's cookie in both of its forms, and a join; what is no whole option stays as it is."""
    flow = world.open(app, outside=outside, protocol=TCP)
    padding = bytes(-len(KEPT + option) % 4)

    def passed(flags, option, header=vnet.NONE):
        segment = tcp(app, flags=flags, options=KEPT + option + padding)
        packet = segment if header == vnet.NONE else craft.unfinished(segment)
        headers = parse_untrusted(packet, len(packet))
        packets = [ready.packet for ready in world.outbound.pass_on(
            Unknown(TCP, flow.key, headers, header, packet), flow.original, world.now)]  # fmt: skip
        return [bytes(one) if header == vnet.NONE else craft.finished(bytes(one)) for one in packets]

    assert [tcp(out, flags=SYN, options=KEPT + left + padding)] == passed(SYN, option)
    assert [tcp(out, flags=SYN, options=KEPT + left + padding)] == passed(SYN, option, NEEDS_CSUM)
    syn = tcp(app, flags=SYN, options=KEPT + option + padding)
    first = memoryview(bytearray(syn))
    unknown_syn = Unknown(TCP, flow.key, parse_untrusted(syn, len(syn)), vnet.NONE, syn)
    world.outbound.write_into(first, unknown_syn, flow.original, world.now)
    assert tcp(out, flags=SYN, options=KEPT + left + padding) == first
    assert [tcp(out, flags=SYN | ACK, options=KEPT + option + padding)] == passed(SYN | ACK, option)
    assert [tcp(out, flags=ACK, options=KEPT + option + padding)] == passed(ACK, option)


@pytest.mark.parametrize(
    ("device", "shared", "hidden"), [(TUNNEL, True, True), (UPLINK, True, False), (TUNNEL, False, False)]
)
def test_where_all_connections_share_a_clock_one_side_shows_none(device, shared, hidden):
    """L30: a server that both sides talk to would read the same time."""
    world = World()
    world.outbound = SlowPath(world.nat.outbound, world.counters, outbound=True, shared_clock=shared)
    flow = world.open(APP, outside=OUTSIDE, protocol=TCP, device=device)
    packet = tcp(APP, flags=SYN, options=KEPT)
    first = Unknown(TCP, flow.key, parse_untrusted(packet, len(packet)), vnet.NONE, packet)

    (ready,) = world.outbound.pass_on(first, flow.original, world.now)
    left = MSS + SACK + (bytes((1,)) * 10 if hidden else TIME) + SCALE
    assert tcp(OUT, flags=SYN, options=left) == ready.packet


# The end of a connection


@BOTH
@pytest.mark.parametrize("header", [vnet.NONE, NEEDS_CSUM])
def test_of_a_connection_that_is_being_ended_only_the_reset_leaves(world, app, out, back, to_app, outside, header):
    """L1: and it ends what the peer knows of, so that it counts there (RFC 5961 §3.2), sent before or not."""
    packed = craft.unfinished if header == NEEDS_CSUM else bytes
    flow = world.open(app, outside=outside, protocol=TCP)
    world.nat.let_only_reset_pass(flow)
    for number in (0xFFFF_FFF0, 0xFFFF_FFF5):
        assert world.sent(tcp(app, b"later", seq=number)) is None
        assert [] == world.sent_slowly(tcp(app, b"later", seq=number))
    assert tcp(to_app, b"heard") == world.received(tcp(back, b"heard"))

    assert [packed(tcp(out, flags=RST, seq=number)) for number in (0xFFFF_FFF0, 0x0001_0003)] == world.sent_slowly(
        packed(tcp(app, flags=RST, seq=0x0001_0003)), header
    )
    assert (0xFFFF_FFF0, 0x0001_0003) == flow.resets
    assert FlowState.CLOSING is flow.state
    assert {"sent_after_its_end": 2} == world.counters


def test_of_one_that_has_sent_nothing_more_it_leaves_as_it_is(world):
    world.nat.let_only_reset_pass(world.open(APP, outside=OUTSIDE, protocol=TCP))

    assert [tcp(OUT, flags=RST, seq=7)] == world.sent_slowly(tcp(APP, flags=RST, seq=7))
