"""What is too big for a device or for a path: cut, told, or lost and counted."""

import struct

import pytest

from tests.craft import fragments, put_together, tcp, udp
from tests.fakes.devices import (
    HOST6,
    ROUTER4,
    ROUTER6,
    ROUTER_MAC,
    TCP,
    opened,
)
from tests.tasks.sidestage import DF, FLOW, FLOW6, GSO_TCP4, GSO_UDP, OUTSIDE, OUTSIDE6, header, original, send
from tunsplit.engine.paths import UNLIMITED
from tunsplit.engine.slowpath import Ready, TooBig
from tunsplit.wire import vnet
from tunsplit.wire.checksum import internet_checksum, pseudo_header

# Size

JUMBO = 9000  # the tun's


def sizes(side):
    return [len(packet) for packet in side.socket.packets]


@pytest.mark.parametrize("kind", [("uplink", 1500), ("tunnel", 1420)])
def test_the_app_is_told_that_a_packet_is_too_big(kind, uplink, tunnel, table):
    side, mtu = {"uplink": uplink, "tunnel": tunnel}[kind[0]], kind[1]
    side.neighbour(ROUTER4, ROUTER_MAC)
    side.device.measure(mtu, JUMBO)
    rewrite = original(table, side)
    too_big = udp(OUTSIDE, bytes(mtu - 27), flags=DF)

    send(side, rewrite, too_big)
    send(side, rewrite, udp(OUTSIDE, bytes(mtu - 28), flags=DF))

    assert [(too_big, mtu)] == side.too_big
    assert [mtu] == sizes(side)


@pytest.mark.parametrize(("flags", "knows", "told"), [(0, False, 0), (DF, True, 1)])
def test_a_datagram_is_cut_if_any_router_might_or_its_app_has_been_told(uplink, table, flags, knows, told):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    uplink.device.measure(1500, JUMBO)
    uplink.knows = knows
    packet = udp(OUTSIDE, bytes(range(250)) * 20, flags=flags)

    send(uplink, original(table, uplink), packet)

    assert told == len(uplink.too_big)
    assert [1500, 1500, 1500, 588] == sizes(uplink)
    assert udp(OUTSIDE, bytes(range(250)) * 20) == put_together(uplink.socket.packets)
    assert {"cut": 1} == uplink.device.counters


def test_its_checksum_is_finished_before(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    uplink.device.measure(1500, JUMBO)
    packet = bytearray(udp(OUTSIDE, bytes(2000)))
    packet[26:28] = pseudo_sum(packet)

    send(uplink, original(table, uplink), bytes(packet), header(0, 0, offset=6))

    assert udp(OUTSIDE, bytes(2000)) == put_together(uplink.socket.packets)


def pseudo_sum(packet):
    covered = pseudo_header(bytes(packet[12:20]), packet[9], len(packet) - 20)
    return (-internet_checksum(covered) % 0xFFFF).to_bytes(2, "big")


def test_a_checksum_that_would_go_over_the_addresses_is_a_packet_lost_and_counted(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    uplink.device.measure(1500, JUMBO)

    send(uplink, original(table, uplink), udp(OUTSIDE, bytes(2000)), header(0, 0, start=0, offset=0))

    assert [] == uplink.socket.frames
    assert {"send_malformed": 1} == uplink.device.counters


def test_what_cannot_be_cut_is_a_packet_lost_and_counted(uplink, table):
    uplink.device.measure(1500, JUMBO)
    uplink.knows = True
    rewrite = opened(table, FLOW6, uplink.way(ROUTER6, version=6, source=HOST6)).original
    uplink.neighbour(ROUTER6, ROUTER_MAC)

    send(uplink, rewrite, fragments(udp(OUTSIDE6, bytes(2000)), 1600)[0])
    send(uplink, rewrite, udp(OUTSIDE6, bytes(9000)), header(GSO_UDP, 1453, start=40, offset=6))

    assert [] == uplink.socket.frames
    assert {"too_big": 2} == uplink.device.counters


@pytest.mark.parametrize(("gso_size", "leaves"), [(1400, 1400), (1460, 1460), (8000, 1460)])
def test_a_super_packet_of_tcp_leaves_in_segments_that_fit(uplink, table, gso_size, leaves):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    uplink.device.measure(1500, JUMBO)

    send(uplink, tcp_flow(table, uplink), tcp(OUTSIDE, bytes(9000)), header(GSO_TCP4, gso_size))

    assert header(GSO_TCP4, leaves, start=34, length=54) == uplink.socket.frames[0][:10]
    assert [] == uplink.too_big


def tcp_flow(table, side):
    return opened(table, FLOW, side.way(), protocol=TCP).original


def test_so_does_a_segment(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    uplink.device.measure(1500, JUMBO)
    rewrite = tcp_flow(table, uplink)

    send(uplink, rewrite, tcp(OUTSIDE, bytes(1461)))
    send(uplink, rewrite, tcp(OUTSIDE, bytes(1460)))

    assert header(GSO_TCP4, 1460, start=34, length=54) == uplink.socket.frames[0][:10]
    assert vnet.NONE == uplink.socket.frames[1][:10]


@pytest.mark.parametrize(("gso_size", "fits"), [(1472, True), (1473, False)])
def test_a_super_packet_of_datagrams_is_as_big_as_they_are(uplink, table, gso_size, fits):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    uplink.device.measure(1500, JUMBO)

    send(uplink, original(table, uplink), udp(OUTSIDE, bytes(9000)), header(GSO_UDP, gso_size, offset=6))

    assert fits == bool(uplink.socket.frames)
    assert fits == (uplink.too_big == [])


def test_nothing_is_measured_while_the_tun_is_the_narrow_one(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    uplink.device.measure(1500, 1500)

    send(uplink, original(table, uplink), udp(OUTSIDE, bytes(2000)))

    assert 1 == len(uplink.socket.frames)


# Paths


def told(flow, mtu, *, size=1500, sequence=None):
    """What the slow path makes of a router's error."""
    return Ready(flow.reply, bytearray(vnet.NONE), bytearray(b"error"), TooBig(mtu, size, sequence))


def test_a_router_is_believed_about_datagrams_at_once(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    rewrite = original(table, uplink)

    assert 1300 == uplink.device.learn(told(rewrite.flow, 1300), 1.0)
    send(uplink, rewrite, udp(OUTSIDE, bytes(1273), flags=DF))
    send(uplink, rewrite, udp(OUTSIDE, bytes(1272), flags=DF))

    assert [(udp(OUTSIDE, bytes(1273), flags=DF), 1300)] == uplink.too_big
    assert [1300] == sizes(uplink)


def test_but_not_that_a_packet_was_too_big_which_was_not(uplink, table):
    rewrite = original(table, uplink)

    assert 0 == uplink.device.learn(told(rewrite.flow, 1300, size=1300), 1.0)
    assert UNLIMITED == uplink.device.narrowest
    assert {"path_mtu_absurd": 1} == uplink.device.counters


def test_about_tcp_when_the_flow_shows_that_it_can_be_true(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    rewrite = tcp_flow(table, uplink)
    assert 0 == uplink.device.learn(told(rewrite.flow, 1300, sequence=5000), 1.0)

    send(uplink, rewrite, tcp(OUTSIDE, bytes(9000), seq=3_000_000_000), header(GSO_TCP4, 1400))
    send(uplink, rewrite, tcp(OUTSIDE, bytes(9000), seq=5000), header(GSO_TCP4, 1400))
    send(uplink, rewrite, tcp(OUTSIDE, bytes(9000), seq=14000), header(GSO_TCP4, 1400))

    assert [1400, 1260, 1260] == [struct.unpack_from("<H", frame, 4)[0] for frame in uplink.socket.frames]


def test_it_is_forgotten_in_time(uplink, table):
    uplink.device.learn(told(original(table, uplink).flow, 1300), 1.0)

    uplink.device.expire(600.9)
    assert 1300 == uplink.device.narrowest
    uplink.device.expire(601.0)
    assert UNLIMITED == uplink.device.narrowest
