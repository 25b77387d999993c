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
from tunsplit.engine.slowpath import SlowPath
from tunsplit.tasks import inbound, mishap, outbound

FLOW, OUTSIDE = f"{TUN4}:5000 > {FAR4}:53", f"{HOST4}:50000 > {FAR4}:53"
REPLY, BACK = f"{FAR4}:53 > {HOST4}:50000", f"{FAR4}:53 > {TUN4}:5000"


class Pumps:
    """Both pumps between a fake tun and a fake device."""

    def __init__(self, side):
        self.side = side
        self.tun = FakeTun()
        self.table = nat()
        self.counters: Counter[str] = Counter()
        self.passed_by: list[bytes] = []
        side.neighbour(ROUTER4, ROUTER_MAC)
        self.flow = opened(self.table, FLOW, side.way())

    async def out(self):
        await outbound.pump(
            as_real(self.tun), self.table, lambda _, packet, __: self.passed_by.append(packet), self.counters
        )

    async def back(self):
        direction = self.table.inbound(self.side.device)
        slow = SlowPath(direction, self.counters, outbound=False)
        await inbound.pump(self.side.device, as_real(self.tun), direction, slow, self.counters)


@pytest.fixture(params=["uplink", "tunnel"])
def pumps(request):
    side = Side() if request.param == "uplink" else Side("tunnel", WG0)
    made = Pumps(side)
    yield made
    made.tun.close()
    side.close()


# Out


async def test_a_known_flow_leaves_translated(pumps, nursery):
    nursery.start_soon(pumps.out)
    pumps.tun.sends(udp(FLOW, b"1"), udp(FLOW, b"2"))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(OUTSIDE, b"1"), udp(OUTSIDE, b"2")] == pumps.side.socket.packets
    assert 2 == pumps.flow.original.packets


async def test_what_no_flow_takes_is_passed_by_as_it_is(pumps, nursery):
    stranger = udp(f"{TUN4}:5001 > {FAR4}:53")
    nursery.start_soon(pumps.out)
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
    nursery.start_soon(pumps.out)
    await trio.testing.wait_all_tasks_blocked(0.01)
    trio.lowlevel.remove_instrument(seen)
    return seen.reads


async def test_a_batch_gives_way_to_others(pumps, nursery):
    """Of TCP: a datagram of each further batch is another socket's until it is known to be the same one's."""
    opened(pumps.table, FLOW, pumps.side.way(), protocol=TCP)
    assert [0, outbound.BATCH, outbound.BATCH + 21] == await turns(pumps, tcp(FLOW), outbound.BATCH + 20, nursery)
    assert outbound.BATCH + 20 == len(pumps.side.socket.frames)


async def test_an_app_that_knocks_at_closed_doors_gives_way_sooner(pumps, nursery):
    stranger = udp(f"{TUN4}:5001 > {FAR4}:53")
    assert [0, outbound.MOST_SLOW, 2 * outbound.MOST_SLOW] == (await turns(pumps, stranger, 20, nursery))[:3]
    assert 20 == len(pumps.passed_by)


async def test_a_packet_that_we_fail_on_ends_nothing(pumps, nursery, caplog):
    def fail(*_):
        raise ZeroDivisionError

    nursery.start_soon(outbound.pump, pumps.tun, pumps.table, fail, pumps.counters)
    pumps.tun.sends(udp(f"{TUN4}:1 > {FAR4}:2"), udp(f"{TUN4}:1 > {FAR4}:2"), udp(FLOW))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(OUTSIDE)] == pumps.side.socket.packets
    assert {"failed_ZeroDivisionError": 2} == pumps.counters
    assert 1 == len(caplog.records)


async def test_a_read_that_fails_ends_nothing(pumps, nursery):
    pumps.tun.errors = [OSError(errno.EINVAL, "no such offload")]
    nursery.start_soon(pumps.out)
    pumps.tun.sends(udp(FLOW))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(OUTSIDE)] == pumps.side.socket.packets
    assert {f"failed_OSError_{errno.EINVAL}": 1} == pumps.counters


async def test_without_its_tun_the_pump_ends_and_says_so(pumps, caplog):
    pumps.tun.errors = [OSError(errno.EBADFD, "gone")]
    pumps.tun.sends(udp(FLOW))
    with trio.fail_after(5):
        await pumps.out()

    assert ["the tun is gone: restart tunsplit"] == [record.message for record in caplog.records]


# Back


async def test_a_reply_finds_its_way_back(pumps, nursery):
    nursery.start_soon(pumps.back)
    pumps.side.socket.delivers(udp(REPLY, b"!"))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(BACK, b"!")] == pumps.tun.answers


@pytest.mark.parametrize("data", [b"", b"1234", bytes(17)])
async def test_padding_stays_behind(pumps, nursery, data):
    nursery.start_soon(pumps.back)
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
    nursery.start_soon(pumps.back)
    for packet in (*others, first):
        pumps.side.socket.delivers(packet)
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert fragments(udp(BACK, bytes(3000)), 1280) == pumps.tun.answers


async def test_what_belongs_to_no_flow_is_dropped_and_counted(pumps, nursery):
    nursery.start_soon(pumps.back)
    pumps.side.socket.delivers(tcp(REPLY))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [] == pumps.tun.answers
    assert {"inbound_no_flow": 1} == pumps.counters


async def test_the_other_side_has_no_say_in_a_flow(pumps, nursery):
    other = Pumps(Side("tunnel", WG0))
    other.table = pumps.table
    nursery.start_soon(other.back)
    other.side.socket.delivers(udp(REPLY))
    await trio.testing.wait_all_tasks_blocked(0.01)
    other.tun.close()
    other.side.device.close()

    assert [] == other.tun.answers


async def test_a_device_that_goes_down_is_counted_and_waited_for(pumps, nursery):
    pumps.side.socket.errors = [OSError(errno.ENETDOWN, "down")]
    nursery.start_soon(pumps.back)
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
    nursery.start_soon(pumps.back)
    pumps.side.socket.delivers(udp(REPLY, b"1"))
    pumps.side.socket.delivers(udp(REPLY, b"2"))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [udp(BACK, b"2")] == pumps.tun.answers
    assert {"failed_ZeroDivisionError": 1} == pumps.counters


async def test_a_pump_ends_with_its_device(pumps):
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pumps.back)
            await trio.testing.wait_all_tasks_blocked(0.01)
            pumps.side.device.close()


async def test_also_if_a_packet_woke_it_in_that_moment(pumps):
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pumps.back)
            await trio.testing.wait_all_tasks_blocked(0.01)
            pumps.side.socket.delivers(udp(REPLY))
            await trio.lowlevel.checkpoint()  # the pump is told that it may read; it is not its turn yet
            pumps.side.device.close()


async def test_a_device_closed_before_its_pump_starts_has_none(pumps):
    pumps.side.device.close()
    with trio.fail_after(5):
        await pumps.back()


# Mishaps


def test_failures_are_counted_by_kind_and_the_first_of_each_is_logged(caplog):
    counters: Counter[str] = Counter()
    for error in (KeyError(1), KeyError(2), OSError(errno.EIO, "io")):
        mishap.note(counters, error)

    assert {"failed_KeyError": 2, f"failed_OSError_{errno.EIO}": 1} == counters
    assert [logging.ERROR, logging.ERROR] == [record.levelno for record in caplog.records]
    assert all(record.exc_info for record in caplog.records)
