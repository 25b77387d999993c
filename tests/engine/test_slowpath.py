"""The slow path: all that is not plain TCP or UDP, in both directions; any bytes at all."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import craft
from tests.craft import (
    ACK,
    DCCP,
    DESTINATION_OPTIONS,
    GRE,
    HOP_BY_HOP,
    ICMP,
    LOOSE_SOURCE_ROUTE,
    PADDING,
    RECORD_ROUTE,
    ROUTING,
    SYN,
    TCP,
    UDPLITE,
    echo,
    ends,
    tcp,
    transport,
    udp,
    with_extensions,
    with_options,
)
from tests.strategies import untrusted
from tests.world import BOTH, NEEDS_CSUM, TUNNEL, UPLINK, V4, V6, World, unknown
from tunsplit.engine.flow import FlowEvent
from tunsplit.wire import vnet

APP, OUT, BACK, TO_APP, OUTSIDE = V4


def hosts(text: str) -> str:
    """The two ends without their ports."""
    return " > ".join(end.rpartition(":")[0].strip("[]") for end in text.split(" > "))


# Options and extension headers


@pytest.mark.parametrize("options", [RECORD_ROUTE, b"\x01\x01\x01\0"])
def test_packets_leave_without_options(world, options):
    world.open(APP, outside=OUTSIDE)

    assert [udp(OUT, b"?")] == world.sent_slowly(with_options(udp(APP, b"?"), options))
    (answer,) = world.received_slowly(with_options(udp(BACK, b"!"), options))
    assert with_options(udp(TO_APP, b"!"), options) == answer


def test_the_virtio_header_follows_when_options_go(world):
    """A super-packet: where its headers end and where the checksum starts is counted from the front."""
    world.open(APP, outside=OUTSIDE, protocol=TCP)
    header = struct.pack("<BBHHHH", vnet.NEEDS_CSUM, 1, 52, 1448, 32, 16)
    packet = with_options(craft.unfinished(tcp(APP, bytes(3000))), RECORD_ROUTE)

    (ready,) = world.outbound.translate_untrusted(header, packet, world.now)
    assert struct.pack("<BBHHHH", vnet.NEEDS_CSUM, 1, 40, 1448, 20, 16) == ready.vnet
    assert tcp(OUT, bytes(3000)) == craft.finished(bytes(ready.packet))


def test_source_routes_go_nowhere(world):
    world.open(APP, outside=OUTSIDE)
    world.open(V6[0], outside=V6[4])

    assert [] == world.sent_slowly(with_options(udp(APP), LOOSE_SOURCE_ROUTE))
    assert [] == world.sent_slowly(with_extensions(udp(V6[0]), (ROUTING, PADDING)))
    assert [] == world.received_slowly(with_options(udp(BACK), LOOSE_SOURCE_ROUTE))
    assert [] == world.received_slowly(with_extensions(udp(V6[2]), (ROUTING, PADDING)))
    assert 4 == world.counters["source_route"]


def test_extension_headers_travel_along(world):
    app, out, back, to_app, outside = V6
    world.open(app, outside=outside, protocol=TCP)
    headers = (HOP_BY_HOP, PADDING), (DESTINATION_OPTIONS, PADDING)

    assert [with_extensions(tcp(out, b"?"), *headers)] == world.sent_slowly(with_extensions(tcp(app, b"?"), *headers))
    answer = world.received_slowly(with_extensions(tcp(back, b"!"), *headers))
    assert [with_extensions(tcp(to_app, b"!"), *headers)] == answer


@BOTH
@pytest.mark.parametrize("build", [udp, tcp])
def test_an_unfinished_checksum_stays_one(world, app, out, back, to_app, outside, build):
    world.open(app, outside=outside, protocol=17 if build is udp else 6)

    (sent,) = world.sent_slowly(craft.unfinished(build(app, b"?")), NEEDS_CSUM)
    assert build(out, b"?") == craft.finished(sent)


def test_a_new_connection_with_options_is_judged_anew(world):
    world.open(APP, outside=OUTSIDE, protocol=TCP)

    assert tcp(APP, flags=SYN) == unknown(world.sent_slowly(with_options(tcp(APP, flags=SYN), RECORD_ROUTE))).packet
    assert [tcp(OUT, flags=SYN | ACK)] == world.sent_slowly(with_options(tcp(APP, flags=SYN | ACK), RECORD_ROUTE))


def test_padding_does_not_leave(world):
    world.open(APP, outside=OUTSIDE)

    assert [udp(OUT)] == world.sent_slowly(udp(APP) + b"padding")


# Echo


@BOTH
def test_echo_is_asked_and_answered_under_another_identifier(world, app, out, back, to_app, outside):
    world.echo(hosts(app), 7, outside=outside)

    assert [echo(hosts(out), 40000, b"?")] == world.sent_slowly(echo(hosts(app), 7, b"?"))
    assert [echo(hosts(to_app), 7, b"?", reply=True)] == world.received_slowly(
        echo(hosts(back), 40000, b"?", reply=True)
    )


@BOTH
def test_only_the_answer_of_that_host_to_that_identifier_on_that_side_comes_in(world, app, out, back, to_app, outside):
    world.echo(hosts(app), 7, outside=outside)

    for packet in (
        echo(hosts(back), 40000),
        echo(hosts(back), 40001, reply=True),
        echo(hosts(back).replace("1.1.1.1", "1.1.1.2").replace("db8::1 ", "db8::2 "), 40000, reply=True),
    ):
        unknown(world.received_slowly(packet))
    unknown(world.received_slowly(echo(hosts(back), 40000, reply=True), TUNNEL))


@BOTH
def test_other_icmp_is_of_no_flow_whatever_its_identifier(world, app, out, back, to_app, outside):
    world.echo(hosts(app), 0, outside=outside)
    protocol = ICMP if app == APP else craft.ICMPV6

    for kind in (5, 13, 42, 133, 137, 160):
        message = bytes((kind, 0, 0, 0, 0, 0, 0, 0))
        unknown(world.sent_slowly(transport(hosts(app), protocol, message)))
        unknown(world.received_slowly(transport(hosts(back), protocol, message)))


# Other protocols


@BOTH
@pytest.mark.parametrize("protocol", [GRE, DCCP, UDPLITE, 50, 132])
def test_other_protocols_are_translated_by_address(world, app, out, back, to_app, outside, protocol):
    world.open(app.replace(":5000", ":0").replace(":443", ":0"), outside=outside, protocol=protocol)
    body = bytes(range(40))

    assert [transport(hosts(out), protocol, body)] == world.sent_slowly(transport(hosts(app), protocol, body))
    assert [transport(hosts(to_app), protocol, body)] == world.received_slowly(transport(hosts(back), protocol, body))


def test_udp_lites_checksum_is_never_zero(world):
    """RFC 3828 §3.1: a packet without one is thrown away."""
    world.open(APP.replace(":5000", ":0").replace(":443", ":0"), outside=OUTSIDE, protocol=UDPLITE)
    body = bytes(10)
    missing = transport(hosts(OUT), UDPLITE, body)[26:28]
    body = bytes(8) + missing

    assert b"\xff\xff" == transport(hosts(OUT), UDPLITE, body)[26:28]
    assert [transport(hosts(OUT), UDPLITE, body)] == world.sent_slowly(transport(hosts(APP), UDPLITE, body))


# Fragments


def in_both_orders(pieces: list[bytes]) -> list[list[bytes]]:
    return [pieces, pieces[::-1], [pieces[1], pieces[0], *pieces[2:]]]


@BOTH
@pytest.mark.parametrize("build", [udp, tcp])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_fragments_follow_their_first_in_any_order(world, app, out, back, to_app, outside, build, order):
    world.open(app, outside=outside, protocol=17 if build is udp else 6)
    data = bytes(range(256)) * 16

    sent: list[bytes] = []
    for piece in in_both_orders(craft.fragments(build(app, data)))[order]:
        sent += world.sent_slowly(piece)
    assert build(out, data) == craft.put_together(sent)

    received: list[bytes] = []
    for piece in in_both_orders(craft.fragments(build(back, data)))[order]:
        received += world.received_slowly(piece)
    assert build(to_app, data) == craft.put_together(received)
    assert {"fragments_known": 1, "fragments_held": 0} == world.outbound.fragments.statistics()


@BOTH
def test_fragments_of_an_echo(world, app, out, back, to_app, outside):
    world.echo(hosts(app), 7, outside=outside)
    data = bytes(4000)

    sent: list[bytes] = []
    for piece in reversed(craft.fragments(echo(hosts(app), 7, data))):
        sent += world.sent_slowly(piece)
    assert echo(hosts(out), 40000, data) == craft.put_together(sent)


@BOTH
def test_later_fragments_wait_while_their_first_is_judged(world, app, out, back, to_app, outside):
    data = bytes(4000)
    first, *others = craft.fragments(udp(app, data))
    waiting = unknown(world.sent_slowly(first))
    for piece in others:
        assert [] == world.sent_slowly(piece)

    flow = world.open(app, outside=outside)
    ready = world.outbound.pass_on(waiting, flow.original, world.now)
    assert udp(out, data) == craft.put_together([bytes(one.packet) for one in ready])
    assert len(data) + 8 <= flow.original.octets


def test_a_name_that_comes_round_does_not_lead_to_the_old_flow(world):
    """An included app's later fragments must not follow the excluded one's first of half a minute ago."""
    world.open(APP, outside=OUTSIDE)
    for piece in craft.fragments(udp(APP, bytes(64)), 32):
        world.sent_slowly(piece)

    first, *others = craft.fragments(udp("10.128.0.1:6000 > 1.1.1.1:53", bytes(64)), 32)
    unknown(world.sent_slowly(first))
    assert [[], []] == [world.sent_slowly(piece) for piece in others]


def test_a_refused_datagram_goes_nowhere_whole(world):
    first, second, third = craft.fragments(udp(APP, bytes(64)), 32)
    assert [] == world.sent_slowly(second)
    refused = unknown(world.sent_slowly(first))
    world.outbound.refuse_fragments(refused, world.now)

    assert [] == world.sent_slowly(third)
    assert (2, 0) == (world.counters["fragments_refused"], world.outbound.fragments.statistics()["fragments_held"])
    world.outbound.refuse_fragments(unknown(world.sent_slowly(udp(APP))), world.now)
    assert 2 == world.counters["fragments_refused"]


def test_what_comes_in_for_no_flow_is_not_waited_for(world):
    first, second, third = craft.fragments(udp(BACK, bytes(64)), 32)
    assert [] == world.received_slowly(second)
    unknown(world.received_slowly(first))

    assert [] == world.received_slowly(third)
    assert (2, 0) == (world.counters["fragments_refused"], world.inbound().fragments.statistics()["fragments_held"])


@BOTH
def test_fragments_of_a_flow_that_has_ended_go_nowhere(world, app, out, back, to_app, outside):
    flow = world.open(app, outside=outside)
    first, second, _ = craft.fragments(udp(app, bytes(64)), 32)
    assert 1 == len(world.sent_slowly(first))

    world.nat.end(flow, FlowEvent.BLOCK, world.now)
    assert [] == world.sent_slowly(second)
    assert 1 == world.counters["fragments_refused"]


@BOTH
@pytest.mark.parametrize(("build", "header"), [(tcp, 20), (udp, 8)])
def test_a_first_fragment_too_small_for_its_header_is_dropped(world, app, out, back, to_app, outside, build, header):
    """RFC 1858, RFC 7112: what is judged has to be in the first fragment."""
    world.open(app, outside=outside, protocol=17 if build is udp else 6)
    protocol, body = (6, tcp(app)[-20:]) if build is tcp else (17, udp(app)[-8:])
    pieces = [craft.fragments(craft.ip(ends(app), protocol, body + bytes(8)), size)[0] for size in range(8, header, 8)]
    pieces.append(craft.ip(ends(app), protocol, body[:-1]))

    for piece in pieces:
        assert [] == world.sent_slowly(piece)
    assert len(pieces) == world.counters["malformed"]


# Bytes


def everything() -> World:
    """A world in which many packets of the strategies find a flow."""
    world = World()
    for number, (peer, peer6) in enumerate((("1.1.1.1", "2001:db8::1"), ("8.8.8.8", "2001:db8::2"))):
        port = 40000 + 2 * number
        for protocol in (6, 17):
            world.open(f"10.128.0.1:5000 > {peer}:53", outside=f"192.0.2.7:{port}", protocol=protocol)
            world.open(
                f"[fd75::1]:5000 > [{peer6}]:53", outside=f"[2001:db8:50::2]:{port}", protocol=protocol, device=TUNNEL
            )
        world.echo(f"10.128.0.1 > {peer}", 5000, outside=f"192.0.2.7:{port + 1}")
        world.echo(f"fd75::1 > {peer6}", 5000, outside=f"[2001:db8:50::2]:{port + 1}", device=TUNNEL)
        for protocol in (GRE, DCCP, UDPLITE):
            world.open(f"10.128.0.1:0 > {peer}:0", outside="192.0.2.7:0", protocol=protocol)
    return world


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(untrusted, st.booleans(), st.binary(min_size=10, max_size=10)), min_size=1, max_size=6))
def test_any_bytes_end_as_a_packet_or_as_a_count(steps):
    world = everything()
    for packet, outbound, header in steps:
        assert world.sent(packet) is None or len(packet) >= 28
        outcome = (
            world.sent_slowly(packet, header)
            if outbound
            else world.received_slowly(packet, TUNNEL if packet[:1] > b"\x50" else UPLINK, header)
        )
        if not isinstance(outcome, list):
            world.outbound.refuse_fragments(outcome, world.now)
            continue
        for one in outcome:
            assert len(one) <= len(packet)
            assert not outbound or one[12:16] == craft.address("192.0.2.7") or one[0] >> 4 == 6
        world.now += 1
        world.outbound.fragments.expire(world.now)
