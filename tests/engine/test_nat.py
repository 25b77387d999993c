"""NAT: what comes out is what dpkt builds for the other addresses, in both directions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import craft
from tests.craft import ACK, FIN, ICMP, ICMPV6, RST, SYN, TCP, UDP, ends, tcp, udp
from tests.world import TUNNEL, UPLINK, World, way
from tunsplit.engine.direction import destination_of, reversed_key, source_of
from tunsplit.engine.flow import FlowEvent, FlowState

# What the app sends, the same outside; what comes back, the same inside.
V4 = (
    "10.128.0.1:5000 > 1.1.1.1:443", "192.0.2.7:40000 > 1.1.1.1:443",
    "1.1.1.1:443 > 192.0.2.7:40000", "1.1.1.1:443 > 10.128.0.1:5000", "192.0.2.7:40000",
)  # fmt: skip
V6 = (
    "[fd75::1]:5000 > [2001:db8::1]:443", "[2001:db8:50::2]:40000 > [2001:db8::1]:443",
    "[2001:db8::1]:443 > [2001:db8:50::2]:40000", "[2001:db8::1]:443 > [fd75::1]:5000", "[2001:db8:50::2]:40000",
)  # fmt: skip
BOTH = pytest.mark.parametrize(("app", "out", "back", "to_app", "outside"), [V4, V6], ids=["v4", "v6"])
OUT, BACK = V4[0], V4[2]


@pytest.fixture
def world():
    return World()


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

    for stranger in (peer.replace("53", "54"), peer.replace("1.1.1.1", "1.1.1.2").replace("db8::1", "db8::2")):
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


# The end


@BOTH
def test_after_its_end_no_packet_of_a_flow_passes(world, app, out, back, to_app, outside):
    flow = world.open(app, outside=outside)

    world.nat.end(flow, FlowEvent.BLOCK, world.now)
    assert world.sent(udp(app)) is None
    assert world.received(udp(back)) is None
    assert 0 == len(world.nat)
    assert [] == list(world.nat)
    with pytest.raises(KeyError):
        world.nat.end(flow, FlowEvent.BLOCK, world.now)
    with pytest.raises(KeyError):
        world.nat.close(flow)


@pytest.mark.parametrize(
    ("protocol", "seconds"), [(UDP, 300), (ICMP, 60), (TCP, 240), (craft.GRE, 600)], ids=["udp", "icmp", "tcp", "gre"]
)
def test_an_idle_flow_ends_at_its_time_and_not_before(world, protocol, seconds):
    text = "10.128.0.1:5000 > 1.1.1.1:0" if protocol in (ICMP, craft.GRE) else OUT
    world.open(text, outside="192.0.2.7:40000", protocol=protocol)

    assert 0 == world.later(seconds - 1)
    assert 1 == world.later(2)
    assert 0 == len(world.nat)


def test_packets_of_either_direction_keep_a_flow_alive(world):
    world.open(OUT, outside="192.0.2.7:40000")
    for _ in range(5):
        assert 0 == world.later(200)
        assert world.sent(udp(OUT)) is not None
        assert 0 == world.later(200)
        assert world.received(udp(BACK)) is not None
    assert 1 == world.later(302)


def test_an_established_connection_stays_for_two_hours_and_a_closed_one_for_its_last_packets(world):
    for flags in (ACK, ACK, FIN | ACK):
        flow = world.nat.outbound.find(TCP, ends(OUT).key)
        if flow is None:
            world.open(OUT, outside="192.0.2.7:40000", protocol=TCP)
            world.sent(tcp(OUT))
            world.received(tcp(BACK))
        world.sent(tcp(OUT, flags=flags))

    assert 0 == world.later(7000)
    assert world.received(tcp(BACK, flags=FIN | ACK)) is not None
    assert 0 == world.later(9)
    assert world.sent(tcp(OUT)) is not None  # the last ACK
    assert 0 == world.later(9)
    assert 1 == world.later(2)


def test_what_has_ended_is_kept_nowhere(world):
    """2,000 connections a second, each closed at once, must not pile up until they would have been idle."""
    for number in range(3000):
        port = 40000 + number % 200
        if number >= 200 and number % 200 == 0:
            world.later(70)
        world.open(OUT, outside=f"192.0.2.7:{port}", protocol=TCP)
        world.sent(tcp(OUT, flags=RST))
        (flow,) = world.nat
        world.nat.end(flow, FlowEvent.TIMEOUT, world.now)
        for pool in world.nat.pools.values():
            pool.rested(world.now + 100)

    assert [{}, {}] == [world.nat._due, world.nat._closing]  # noqa: SLF001  # what would pile up


def test_the_clock_may_start_anywhere_and_time_without_flows_costs_nothing(world):
    assert 0 == world.nat.expire(1e12)
    world.now = 1e12
    world.open(OUT, outside="192.0.2.7:40000")
    assert 0 == world.later(299)
    assert 1 == world.later(2)


# The bounds


def test_a_full_table_takes_the_place_of_what_closed_first():
    world = World(most_flows=2)
    texts = [f"10.128.0.1:{port} > 1.1.1.1:80" for port in (5001, 5002)]
    flows = [world.open(text, outside=f"192.0.2.7:{40001 + at}", protocol=TCP) for at, text in enumerate(texts)]
    assert not world.nat.has_room(world.now)
    assert not world.nat.end_oldest_closing(world.now)
    assert 1 == world.nat.statistics()["table_full"]

    world.sent(tcp(texts[1], flags=RST))
    world.sent(tcp(texts[0], flags=RST))
    assert world.nat.has_room(world.now)
    assert [flows[0]] == list(world.nat)
    assert world.nat.has_room(world.now)


def test_flows_are_found_by_their_device(world):
    first = world.open(OUT, outside="192.0.2.7:40000")
    second = world.open("10.128.0.1:5001 > 1.1.1.1:443", outside="10.64.0.2:40001", device=TUNNEL)

    assert [first] == world.nat.flows_of([UPLINK])
    assert {first, second} == set(world.nat.flows_of([UPLINK, TUNNEL]))
    world.nat.end(second, FlowEvent.BLOCK, world.now)
    world.nat.forget_device(TUNNEL)
    world.nat.forget_device(TUNNEL)
    assert [] == world.nat.flows_of([TUNNEL])


def test_statistics_count_what_grows(world):
    world.open(OUT, outside="192.0.2.7:40000")
    statistics = world.nat.statistics()

    assert (1, 1, 1, 0, 1) == tuple(
        statistics[name] for name in ("flows", "opened", "mappings", "closing", "ports_udp_live")
    )


@pytest.mark.parametrize("protocol", [ICMP, ICMPV6])
def test_echo_never_takes_the_fast_path(world, protocol):
    text = "10.128.0.1 > 1.1.1.1" if protocol == ICMP else "fd75::1 > 2001:db8::1"
    world.echo(text, 7, outside="192.0.2.7:40000" if protocol == ICMP else "[2001:db8:50::2]:40000")

    assert world.sent(craft.echo(text, 7)) is None


@given(st.sampled_from((12, 36)).flatmap(lambda size: st.binary(min_size=size, max_size=size)))
def test_a_four_tuple_turned_twice_is_itself(key):
    assert key == reversed_key(reversed_key(key))
    assert (source_of(key), key[-4:-2]) == (destination_of(reversed_key(key)), reversed_key(key)[-2:])


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
