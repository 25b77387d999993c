"""Peers that do not know yet that their connection was ended here."""

from collections import Counter

import dpkt
import pytest

from tests.craft import ACK, RST, TCP, ends, tcp, udp
from tests.fakes.devices import ROUTER4, ROUTER_MAC, Side, nat, opened
from tunsplit.engine.flow import FlowEvent
from tunsplit.engine.slowpath import SlowPath, Unknown
from tunsplit.tasks import halfopen
from tunsplit.tasks.halfopen import HalfOpen
from tunsplit.wire import vnet

APP = "10.128.0.1:5000 > 198.51.100.1:443"
OUT, BACK = "192.168.50.2:50000 > 198.51.100.1:443", "198.51.100.1:443 > 192.168.50.2:50000"


class World:
    """A connection by the uplink, which was ended at 1 s."""

    def __init__(self):
        self.sides = self.uplink, self.other = Side(), Side()
        self.uplink.neighbour(ROUTER4, ROUTER_MAC)
        self.table = nat()
        self.counters: Counter[str] = Counter()
        self.half_open = HalfOpen(self.counters)
        flow = opened(self.table, APP, self.uplink.way(), protocol=TCP)
        self.half_open.remember(flow, 1.0)
        self.table.end(flow, FlowEvent.BLOCK, 1.0)

    def hears(self, packet, now=1.1, side=None):
        """The numbers of the RSTs that answer a packet which comes in."""
        side = side or self.uplink
        unknown = SlowPath(self.table.inbound(side.device), Counter(), outbound=False).translate_untrusted(
            vnet.NONE, packet, now
        )
        assert isinstance(unknown, Unknown)
        self.half_open.answer(side.device, unknown, now)
        answers = [*self.uplink.socket.packets, *self.other.socket.packets]
        for one in self.sides:
            one.socket.frames.clear()
        return [number_of(packet) for packet in answers]


def number_of(packet):
    """The sequence number of what ends this connection."""
    ip = dpkt.ip.IP(packet)
    assert (ends(OUT).key, RST) == (ip.src + ip.dst + packet[20:24], ip.data.flags)
    return ip.data.seq


@pytest.fixture
def world():
    made = World()
    yield made
    for side in made.sides:
        side.close()


def test_a_peer_that_asks_is_told_with_the_number_that_it_expects(world):
    """RFC 5961 §3.2: it believes no other."""
    assert [4711] == world.hears(tcp(BACK, flags=ACK, seq=99, ack=4711))
    assert [4712] == world.hears(tcp(BACK, b"data", flags=ACK, seq=99, ack=4712))
    assert {"half_open_reset": 2} == world.counters


def test_one_that_a_reset_is_under_way_to_is_not_told_twice(world):
    """What it had sent before that comes in now; that the RST was lost shows by an ACK alone, or later."""
    flow = opened(world.table, APP, world.uplink.way(), protocol=TCP)
    flow.resets = 4711, 4800
    world.half_open.remember(flow, 1.0)
    world.table.end(flow, FlowEvent.BLOCK, 1.0)
    assert [] == world.hears(tcp(BACK, b"data", flags=ACK, seq=99, ack=4711))
    assert [4712] == world.hears(tcp(BACK, b"data", flags=ACK, seq=99, ack=4712))
    assert [4711] == world.hears(tcp(BACK, flags=ACK, seq=99, ack=4711))
    assert [4711] == world.hears(tcp(BACK, b"data", flags=ACK, seq=99, ack=4711), 1.1 + halfopen.UNDER_WAY_S)


@pytest.mark.parametrize(
    "packet",
    [
        tcp("198.51.100.1:444 > 192.168.50.2:50000", flags=ACK, ack=1),
        tcp("198.51.100.1:443 > 192.168.50.2:50001", flags=ACK, ack=1),
        tcp(BACK, flags=RST | ACK, ack=1),
        udp(BACK),
    ],
)
def test_nobody_else_is_told(world, packet):
    assert [] == world.hears(packet)
    assert {} == world.counters


def test_on_another_device_nobody_is_told(world):
    assert [] == world.hears(tcp(BACK, ack=1), side=world.other)
    assert [1] == world.hears(tcp(BACK, ack=1))


def test_after_a_while_it_is_forgotten(world):
    assert [] == world.hears(tcp(BACK, ack=1), 1.1 + halfopen.REMEMBERED_S)
    assert {} == world.half_open


def test_only_translated_connections_are_remembered(world):
    """What carries the side's own address comes in to the kernel, which answers itself; datagrams have no end."""
    server = world.table.open_untranslated(
        TCP, b"\x0a" * 12, world.uplink.way(), 0.0, app=None, reason="", attribution=""
    )
    datagrams = opened(world.table, "10.128.0.1:5001 > 198.51.100.1:53", world.uplink.way(), port=50001)
    world.half_open.clear()
    for flow in (server, datagrams):
        world.half_open.remember(flow, 1.0)
    assert {} == world.half_open


def test_the_oldest_is_forgotten_for_a_new_one(world, monkeypatch):
    monkeypatch.setattr(halfopen, "MOST_REMEMBERED", 1)
    flow = opened(world.table, "10.128.0.1:5001 > 198.51.100.1:443", world.uplink.way(), protocol=TCP, port=50001)
    world.half_open.remember(flow, 1.0)
    assert [] == world.hears(tcp(BACK, ack=1))
    assert 1 == len(world.half_open)
