"""Packets between the tun and a side, both ways."""

import errno
import logging
from collections import Counter

import pytest
import trio
import trio.testing

from tests.craft import fragments, tcp, udp
from tests.fakes.devices import FAR4, HOST4, ROUTER4, ROUTER_MAC, TCP, TUN4, WG0, FakeTun, Side, nat, opened
from tests.fakes.judges import as_real
from tunsplit.tasks import inbound, mishap, outbound
from tunsplit.tasks.pump import Pump

FLOW, OUTSIDE = f"{TUN4}:5000 > {FAR4}:53", f"{HOST4}:50000 > {FAR4}:53"
REPLY, BACK = f"{FAR4}:53 > {HOST4}:50000", f"{FAR4}:53 > {TUN4}:5000"


class Pumps:
    """Both pumps between a fake tun and a fake device."""

    def __init__(self, side, table=None):
        self.side = side
        self.tun = FakeTun()
        self.table = nat() if table is None else table
        self.counters: Counter[str] = Counter()
        self.passed_by: list[bytes] = []
        side.neighbour(ROUTER4, ROUTER_MAC)
        if table is None:
            self.flow = opened(self.table, FLOW, side.way())
        self.opened: list[Pump] = []
        self.pump = self.pump_with(lambda _, packet, __: self.passed_by.append(packet))

    def pump_with(self, passed_by):
        pump = Pump(as_real(self.tun), self.table, passed_by, self.counters)
        pump.attach(self.side.device)
        self.opened.append(pump)
        return pump

    def close(self):
        for pump in self.opened:
            pump.close()
        self.tun.close()
        self.side.close()


@pytest.fixture(params=["uplink", "tunnel"])
def pumps(request):
    side = Side() if request.param == "uplink" else Side("tunnel", WG0)
    made = Pumps(side)
    yield made
    made.close()


# Out


async def test_a_known_flow_leaves_translated(pumps, nursery):
    nursery.start_soon(pumps.pump.run)
    pumps.tun.sends(udp(FLOW, b"1"), udp(FLOW, b"2"))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(OUTSIDE, b"1"), udp(OUTSIDE, b"2")] == pumps.side.socket.packets
    assert 2 == pumps.flow.original.packets


async def test_what_no_flow_takes_is_passed_by_as_it_is(pumps, nursery):
    stranger = udp(f"{TUN4}:5001 > {FAR4}:53")
    nursery.start_soon(pumps.pump.run)
    pumps.tun.sends(stranger, udp(FLOW))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [stranger] == pumps.passed_by
    assert [udp(OUTSIDE)] == pumps.side.socket.packets


class Turns(trio.abc.Instrument):
    """How often the tun has been read when a task's turn ends."""

    def __init__(self, tun):
        self.tun = tun
        self.reads = [0]

    def after_task_step(self, task):
        if self.tun.reads > self.reads[-1]:
            self.reads.append(self.tun.reads)


async def turns(pumps, packet, count, nursery):
    pumps.tun.sends(*[packet] * count)
    seen = Turns(pumps.tun)
    trio.lowlevel.add_instrument(seen)
    nursery.start_soon(pumps.pump.run)
    await trio.testing.wait_all_tasks_blocked(0.01)
    trio.lowlevel.remove_instrument(seen)
    return seen.reads


async def test_a_batch_gives_way_to_others(pumps, nursery):
    """Of TCP: a datagram of each further batch is another socket's until it is known to be the same one's."""
    opened(pumps.table, FLOW, pumps.side.way(), protocol=TCP)
    assert [0, outbound.BATCH, outbound.BATCH + 22] == await turns(pumps, tcp(FLOW), outbound.BATCH + 20, nursery)
    assert outbound.BATCH + 20 == len(pumps.side.socket.frames)


async def test_an_app_that_knocks_at_closed_doors_gives_way_sooner(pumps, nursery):
    stranger = udp(f"{TUN4}:5001 > {FAR4}:53")
    assert [0, outbound.MOST_SLOW, 2 * outbound.MOST_SLOW] == (await turns(pumps, stranger, 20, nursery))[:3]
    assert 20 == len(pumps.passed_by)


async def test_a_packet_that_we_fail_on_ends_nothing(pumps, nursery, caplog):
    def fail(*_):
        raise ZeroDivisionError

    nursery.start_soon(pumps.pump_with(fail).run)
    pumps.tun.sends(udp(f"{TUN4}:1 > {FAR4}:2"), udp(f"{TUN4}:1 > {FAR4}:2"), udp(FLOW))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(OUTSIDE)] == pumps.side.socket.packets
    assert {"failed_ZeroDivisionError": 2} == pumps.counters
    assert 1 == len(caplog.records)


async def test_a_read_that_fails_ends_nothing(pumps, nursery):
    pumps.tun.errors = [OSError(errno.EINVAL, "no such offload")]
    nursery.start_soon(pumps.pump.run)
    pumps.tun.sends(udp(FLOW))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(OUTSIDE)] == pumps.side.socket.packets
    assert {f"failed_OSError_{errno.EINVAL}": 1} == pumps.counters


async def test_without_its_tun_nothing_leaves_and_it_says_so(pumps, nursery, caplog):
    pumps.tun.errors = [OSError(errno.EBADFD, "gone")]
    pumps.tun.sends(udp(FLOW))
    nursery.start_soon(pumps.pump.run)
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert ["the tun is gone: restart tunsplit"] == [record.message for record in caplog.records]
    assert 0 == pumps.pump.carry_out()
    assert [] == pumps.side.socket.frames


# Back


async def test_a_reply_finds_its_way_back(pumps, nursery):
    nursery.start_soon(pumps.pump.run)
    pumps.side.socket.delivers(udp(REPLY, b"!"))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(BACK, b"!")] == pumps.tun.answers


@pytest.mark.parametrize("data", [b"", b"1234", bytes(17)])
async def test_padding_stays_behind(pumps, nursery, data):
    nursery.start_soon(pumps.pump.run)
    pumps.side.socket.delivers(udp(REPLY, data), padding=46 - 28 - len(data))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(BACK, data)] == pumps.tun.answers


async def test_a_padded_ipv6_packet_loses_its_padding_too(pumps):
    packet = udp("[2001:db8::1]:1 > [2001:db8::2]:2", b"1")

    assert len(packet) == inbound.without_padding(memoryview(packet + b"pad"), len(packet) + 3)


@pytest.mark.parametrize("packet", [b"", b"\x45", b"\x60" + bytes(38), b"\x00" * 30])
async def test_what_is_too_short_for_a_length_keeps_its_own(packet):
    assert len(packet) == inbound.without_padding(memoryview(packet or b"\0"), len(packet))


async def test_fragments_follow_their_first(pumps, nursery):
    first, *others = fragments(udp(REPLY, bytes(3000)), 1280)
    nursery.start_soon(pumps.pump.run)
    for packet in (*others, first):
        pumps.side.socket.delivers(packet)
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert fragments(udp(BACK, bytes(3000)), 1280) == pumps.tun.answers


async def test_what_belongs_to_no_flow_is_dropped_and_counted(pumps, nursery):
    nursery.start_soon(pumps.pump.run)
    pumps.side.socket.delivers(tcp(REPLY))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [] == pumps.tun.answers
    assert {"inbound_no_flow": 1} == pumps.counters


async def test_the_other_side_has_no_say_in_a_flow(pumps, nursery):
    other = Pumps(Side("tunnel", WG0), pumps.table)
    nursery.start_soon(other.pump.run)
    other.side.socket.delivers(udp(REPLY))
    await trio.testing.wait_all_tasks_blocked(0.01)
    other.close()

    assert [] == other.tun.answers


async def test_a_device_that_goes_down_is_counted_and_waited_for(pumps, nursery):
    pumps.side.socket.errors = [OSError(errno.ENETDOWN, "down")]
    nursery.start_soon(pumps.pump.run)
    pumps.side.socket.delivers(udp(REPLY))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert 1 == pumps.side.device.counters[f"receive_{errno.ENETDOWN}"]
    assert [udp(BACK)] == pumps.tun.answers


async def test_a_reply_that_we_fail_on_ends_nothing(pumps, nursery, monkeypatch, caplog):
    write, failures = pumps.tun.write, iter([True, False])

    def fail_once(packet):
        if next(failures):
            raise ZeroDivisionError
        return write(packet)

    monkeypatch.setattr(pumps.tun, "write", fail_once)
    nursery.start_soon(pumps.pump.run)
    pumps.side.socket.delivers(udp(REPLY, b"1"))
    pumps.side.socket.delivers(udp(REPLY, b"2"))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(BACK, b"2")] == pumps.tun.answers
    assert {"failed_ZeroDivisionError": 1} == pumps.counters


async def test_a_device_that_is_closed_is_looked_at_no_more(pumps, nursery):
    nursery.start_soon(pumps.pump.run)
    await trio.testing.wait_all_tasks_blocked(0.01)
    pumps.side.socket.delivers(udp(REPLY))
    pumps.pump.detach(pumps.side.device)
    pumps.side.device.close()
    pumps.tun.sends(udp(FLOW))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [] == pumps.tun.answers
    assert 1 == pumps.flow.original.packets


# Both ways


async def test_an_answer_that_comes_at_once_takes_no_second_wait(pumps, nursery):
    """And so on: the app's next packet, which its answer brought about, leaves in the same turn."""
    opened(pumps.table, FLOW, pumps.side.way(), protocol=TCP)
    answer, write = pumps.side.device.send, pumps.tun.write
    exchanges = 5

    def send(frame, size, rewrite):
        pumps.side.socket.delivers(tcp(REPLY))
        answer(frame, size, rewrite)

    def written(packet):
        if len(pumps.tun.answers) < exchanges - 1:
            pumps.tun.sends(tcp(FLOW))
        return write(packet)

    pumps.side.device.send = send
    pumps.tun.write = written
    seen = Turns(pumps.tun)
    trio.lowlevel.add_instrument(seen)
    nursery.start_soon(pumps.pump.run)
    pumps.tun.sends(tcp(FLOW))
    await trio.testing.wait_all_tasks_blocked(0.01)
    trio.lowlevel.remove_instrument(seen)

    assert exchanges == len(pumps.tun.answers) == len(pumps.side.socket.frames)
    assert 2 == len(seen.reads)


# Mishaps


def test_failures_are_counted_by_kind_and_the_first_of_each_is_logged(caplog):
    counters: Counter[str] = Counter()
    for error in (KeyError(1), KeyError(2), OSError(errno.EIO, "io")):
        mishap.note(counters, error)

    assert {"failed_KeyError": 2, f"failed_OSError_{errno.EIO}": 1} == counters
    assert [logging.ERROR, logging.ERROR] == [record.levelno for record in caplog.records]
    assert all(record.exc_info for record in caplog.records)
