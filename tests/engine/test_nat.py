"""NAT: what comes out is what dpkt builds for the other addresses, in both directions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import craft
from tests.craft import ACK, RST, SYN, TCP, UDP, ends, tcp, udp
from tests.world import BACK, BOTH, OUT, TUNNEL, UPLINK, V4, V6, World, way
from tunsplit.engine.direction import Direction
from tunsplit.engine.flow import FlowEvent, FlowState

# What is written


@BOTH
@pytest.mark.parametrize("build", [udp, tcp])
@pytest.mark.parametrize("size", [0, 1, 1400])
def test_a_packet_leaves_translated_and_its_reply_finds_its_way_back(
    world, app, out, back, to_app, outside, build, size
):
    world.open(app, outside=outside, protocol=UDP if build is udp else TCP)

    assert build(out, b"?" * size) == world.sent(build(app, b"?" * size))
    assert build(to_app, b"!" * size) == world.received(build(back, b"!" * size))


@BOTH
@pytest.mark.parametrize("build", [udp, tcp])
@given(data=st.binary(max_size=200))
def test_an_unfinished_checksum_is_right_once_it_is_finished(app, out, back, to_app, outside, build, data):
    world = World()
    world.open(app, outside=outside, protocol=UDP if build is udp else TCP)

    sent = world.sent(craft.unfinished(build(app, data)), finished=False)
    assert sent is not None
    assert build(out, data) == craft.finished(sent)
    received = world.received(craft.unfinished(build(back, data)), finished=False)
    assert received is not None
    assert build(to_app, data) == craft.finished(received)


@BOTH
@pytest.mark.parametrize("build", [udp, tcp])
def test_an_apps_datagram_is_asked_for_its_socket_once_a_batch(world, app, out, back, to_app, outside, build):
    """L27, L28: a port may have changed hands since; a segment belongs to its connection, and replies are nobody's."""
    world.open(app, outside=outside, protocol=UDP if build is udp else TCP)

    def passes(direction: Direction, packet: bytes) -> bool:
        return direction.translate(bytearray(packet), len(packet), True, world.now) is not None

    for _ in range(2):
        assert passes(world.nat.outbound, build(app, b"?"))
    world.now += 0.001
    assert (build is tcp) is passes(world.nat.outbound, build(app, b"?"))
    assert passes(world.nat.inbound(UPLINK), build(back, b"!"))


@BOTH
@pytest.mark.parametrize("build", [udp, tcp])
def test_a_super_packet_is_one_packet(world, app, out, back, to_app, outside, build):
    """64 KiB at once, with the checksum of its segments still to be made (VIRTIO_NET_HDR_GSO_*)."""
    world.open(app, outside=outside, protocol=UDP if build is udp else TCP)
    size = 65535 - (20 if app == V4[0] else 0) - (20 if build is tcp else 8)

    sent = world.sent(craft.unfinished(build(app, bytes(size))), finished=False)
    assert sent is not None
    assert build(out, bytes(size)) == craft.finished(sent)


@BOTH
def test_udp_without_a_checksum_stays_without(world, app, out, back, to_app, outside):
    world.open(app, outside=outside)

    assert udp(out, b"?", checksum=False) == world.sent(udp(app, b"?", checksum=False))
    assert udp(to_app, b"?", checksum=False) == world.received(udp(back, b"?", checksum=False))


@BOTH
def test_a_checksum_that_comes_to_zero_is_sent_as_ffff(world, app, out, back, to_app, outside):
    """RFC 768: zero would say that there is none."""
    world.open(app, outside=outside)
    at = 26 if app == V4[0] else 46
    data = udp(out, bytes(2))[at : at + 2]  # what is missing from the sum of all the rest

    assert b"\xff\xff" == udp(out, data)[at : at + 2]
    assert udp(out, data) == world.sent(udp(app, data))
    sent = world.sent(craft.unfinished(udp(app, data)), finished=False)
    assert sent is not None
    assert udp(out, data) == craft.finished(sent)


def test_wrong_checksums_stay_wrong(world):
    """NAT mends nothing: the receiver has to see what the network broke."""
    world.open(OUT, outside=V4[4])
    packet = bytearray(udp(V4[2], b"?"))
    packet[-1] ^= 0x10

    received = world.received(bytes(packet))
    assert received is not None
    assert craft.with_checksum(ends(V4[3]), UDP, received[20:]) != received[20:]


# What is not


@BOTH
def test_only_who_was_asked_may_answer(world, app, out, back, to_app, outside):
    """Address- and port-dependent filtering (RFC 4787 §5)."""
    world.open(app, outside=outside)
    peer, own = back.split(" > ")

    for stranger in (peer.replace("443", "444"), peer.replace("1.1.1.1", "1.1.1.2").replace("db8::1", "db8::2")):
        assert world.received(udp(f"{stranger} > {own}")) is None
    assert world.received(udp(back.replace("40000", "40001"))) is None
    assert world.received(tcp(back)) is None


def test_the_other_sides_reply_does_not_match(world):
    world.open(OUT, outside="192.0.2.7:40000", device=UPLINK)

    assert world.received(udp(BACK), TUNNEL) is None
    assert world.received(udp(BACK), UPLINK) is not None


@BOTH
@pytest.mark.parametrize(("build", "header"), [(tcp, 20), (udp, 8)])
def test_a_short_packet_in_a_used_buffer_is_nobodys(world, app, out, back, to_app, outside, build, header):
    world.open(app, outside=outside, protocol=UDP if build is udp else TCP)
    whole = build(app)
    first = len(whole) - header

    for size in range(len(whole)):
        length = (size if first == 20 else max(size - 40, 0)).to_bytes(2, "big")
        at = 2 if first == 20 else 4
        assert world.sent((whole[:at] + length + whole[at + 2 :])[:size]) is None


def test_what_the_fast_path_leaves_to_the_slow_one(world):
    world.open(OUT, outside="192.0.2.7:40000")
    datagram = udp(OUT, bytes(64))

    assert world.sent(datagram) is not None
    assert world.sent(craft.with_options(datagram, b"\x01\x01\x01\0")) is None
    assert [None, None] == [world.sent(piece) for piece in craft.fragments(datagram, 40)]
    assert world.sent(b"\x55" + datagram[1:]) is None
    assert world.sent(datagram + b"padding") is None
    assert world.sent(craft.ip(ends(OUT), 136, datagram[20:])) is None
    assert world.sent(craft.with_extensions(udp(V6[0]), (craft.DESTINATION_OPTIONS, craft.PADDING))) is None
    assert world.sent(udp(V6[0]) + b"padding") is None


# TCP


def test_a_new_connection_on_an_open_four_tuple_is_judged_anew(world):
    """Another socket may send it (SPEC.md, L27)."""
    world.open(OUT, outside="192.0.2.7:40000", protocol=TCP)

    assert world.sent(tcp(OUT, flags=SYN)) is None
    assert world.sent(tcp(OUT, flags=SYN | ACK)) is not None
    assert world.received(tcp(BACK, flags=SYN | ACK)) is not None
    assert world.received(tcp(BACK, flags=SYN)) is not None  # both open at once (RFC 9293 §3.5)


# Mapping


def test_one_socket_keeps_one_port_towards_all(world):
    """Endpoint-independent mapping (RFC 4787 REQ-1)."""
    world.open("10.128.0.1:5000 > 1.1.1.1:443", outside="192.0.2.7:40000")
    other = ends("10.128.0.1:5000 > 8.8.8.8:443").key

    assert 40000 == world.nat.mapped_port(UDP, other, way("192.0.2.7"))
    assert world.nat.mapped_port(TCP, other, way("192.0.2.7")) is None
    assert world.nat.mapped_port(UDP, ends("10.128.0.1:5001 > 8.8.8.8:443").key, way("192.0.2.7")) is None
    assert world.nat.mapped_port(UDP, ends("192.168.50.2:5000 > 8.8.8.8:443").key, way("192.0.2.7")) is None
    assert world.nat.mapped_port(UDP, other, way("192.0.2.8")) is None
    assert world.nat.mapped_port(UDP, other, way("192.0.2.7", TUNNEL)) is None


def test_a_port_is_live_while_a_flow_of_its_mapping_lives(world):
    first = world.open("10.128.0.1:5000 > 1.1.1.1:443", outside="192.0.2.7:40000")
    second = world.open("10.128.0.1:5000 > 8.8.8.8:443", outside="192.0.2.7:40000")
    pool, other = world.nat.pools["udp"], ends("10.128.0.1:5000 > 9.9.9.9:443").key

    world.nat.end(first, FlowEvent.TIMEOUT, world.now)
    assert (1, 0) == (pool.statistics()["live"], pool.statistics()["resting"])
    assert 40000 == world.nat.mapped_port(UDP, other, way("192.0.2.7"))

    world.nat.end(second, FlowEvent.TIMEOUT, world.now)
    assert (0, 1) == (pool.statistics()["live"], pool.statistics()["resting"])
    assert world.nat.mapped_port(UDP, other, way("192.0.2.7")) is None
    assert 0 == world.nat.statistics()["mappings"]


def test_when_ports_run_out_one_serves_several_destinations(world):
    """TCP tells the flows apart by their four-tuples; the first mapping of an inside port stays its mapping."""
    shared = world.open("10.128.0.1:5000 > 1.1.1.1:80", outside="192.0.2.7:40000", protocol=TCP)
    first = world.open("10.128.0.1:6000 > 8.8.8.8:80", outside="192.0.2.7:40000", protocol=TCP)
    key = ends("10.128.0.1:6000 > 1.1.1.1:80").key

    assert not world.nat.is_free(TCP, key, way("192.0.2.7"), 40000)
    assert world.nat.mapped_port(TCP, key, way("192.0.2.7")) is None
    second = world.open("10.128.0.1:6000 > 1.1.1.1:80", outside="192.0.2.7:40001", protocol=TCP)

    assert tcp("1.1.1.1:80 > 10.128.0.1:5000") == world.received(tcp("1.1.1.1:80 > 192.0.2.7:40000"))
    assert tcp("1.1.1.1:80 > 10.128.0.1:6000") == world.received(tcp("1.1.1.1:80 > 192.0.2.7:40001"))
    assert tcp("8.8.8.8:80 > 10.128.0.1:6000") == world.received(tcp("8.8.8.8:80 > 192.0.2.7:40000"))

    world.nat.end(second, FlowEvent.TIMEOUT, world.now)
    third = ends("10.128.0.1:6000 > 9.9.9.9:80").key
    assert 40000 == world.nat.mapped_port(TCP, third, way("192.0.2.7"))
    world.nat.end(first, FlowEvent.TIMEOUT, world.now)
    assert world.nat.mapped_port(TCP, third, way("192.0.2.7")) is None
    assert [40000] == world.nat.pools["tcp"].taken()[:1]
    world.nat.end(shared, FlowEvent.TIMEOUT, world.now)
    assert 2 == world.nat.pools["tcp"].statistics()["resting"]


def test_a_mapping_lives_as_long_as_one_of_its_flows_whatever_other_ports_the_socket_has(world):
    """Ports have run out: flow 2 has a port of its own, which flow 3 makes the mapping, and flow 2 ends before it."""
    inside = "10.128.0.1:6000"
    flows = [world.open(f"{inside} > 1.1.1.1:80", outside="192.0.2.7:40000", protocol=TCP)]
    flows.append(world.open(f"{inside} > 2.2.2.2:80", outside="192.0.2.7:40001", protocol=TCP))
    world.nat.end(flows[0], FlowEvent.TIMEOUT, world.now)
    flows.append(world.open(f"{inside} > 3.3.3.3:80", outside="192.0.2.7:40001", protocol=TCP))
    world.nat.end(flows[1], FlowEvent.TIMEOUT, world.now)

    assert 40001 == world.nat.mapped_port(TCP, ends(f"{inside} > 4.4.4.4:80").key, way("192.0.2.7"))


def test_protocols_without_ports_have_one_flow_between_two_hosts(world):
    flow = world.open("10.128.0.1:0 > 1.1.1.1:0", outside="192.0.2.7:0", protocol=craft.GRE)
    key = ends("10.128.0.1:0 > 1.1.1.1:0").key

    assert not world.nat.is_free(craft.GRE, key, way("192.0.2.7"), 0)
    world.nat.end(flow, FlowEvent.TIMEOUT, world.now)
    assert world.nat.is_free(craft.GRE, key, way("192.0.2.7"), 0)


def test_two_flows_with_one_four_tuple_are_our_own_bug(world):
    world.open("10.128.0.1:5000 > 1.1.1.1:443", outside="192.0.2.7:40000")
    before = world.nat.statistics()

    with pytest.raises(ValueError, match="one four-tuple"):
        world.nat.open(UDP, ends(OUT).key, way("192.0.2.7"), 40001, world.now)
    with pytest.raises(ValueError, match="one four-tuple"):
        world.nat.open_untranslated(
            UDP, ends(OUT).key, way("192.0.2.7"), world.now, app=None, reason="", attribution=""
        )
    with pytest.raises(ValueError, match="one reply four-tuple"):
        world.nat.open(UDP, ends("10.128.0.1:5001 > 1.1.1.1:443").key, way("192.0.2.7"), 40000, world.now)
    assert before == world.nat.statistics()


# Untranslated


@BOTH
def test_what_carries_its_sides_address_leaves_as_it_is(world, app, out, back, to_app, outside):
    source = outside.rpartition(":")[0].strip("[]")
    flow = world.nat.open_untranslated(TCP, ends(out).key, way(source), world.now, app=None, reason="", attribution="")

    assert tcp(out, b"answer") == world.sent(tcp(out, b"answer"))
    sent = world.sent(craft.unfinished(tcp(out, b"answer")), finished=False)
    assert sent is not None
    assert tcp(out, b"answer") == craft.finished(sent)
    assert world.received(tcp(back)) is None
    world.sent(tcp(out, flags=RST))
    assert FlowState.CLOSING is flow.state
    assert 1 == world.later(11)
    assert world.sent(tcp(out)) is None


def test_a_flow_to_ourselves_changes_both_ends_and_takes_no_port():
    """As questions over TCP do: from a neighbour that does not exist to our own listener."""
    world = World()
    key, outside = ends("10.128.0.1:5000 > 1.1.1.1:53").key, ends("10.128.0.2:2000 > 10.128.0.1:4000").key
    before = world.nat.statistics()

    flow = world.nat.open(TCP, key, way("10.128.0.2"), None, world.now, outside=outside)

    sent = world.sent(tcp("10.128.0.1:5000 > 1.1.1.1:53", b"?"))
    assert tcp("10.128.0.2:2000 > 10.128.0.1:4000", b"?") == sent
    assert tcp("1.1.1.1:53 > 10.128.0.1:5000", b"!") == world.received(tcp("10.128.0.1:4000 > 10.128.0.2:2000", b"!"))
    world.nat.end(flow, FlowEvent.BLOCK, world.now)
    assert {**before, "opened": 1} == world.nat.statistics()
