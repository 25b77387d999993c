"""Packets between the tun and a side, both ways."""

import errno
import logging
import struct
from collections import Counter
from ipaddress import ip_address

import pytest
import trio
import trio.testing

from tests.craft import error, fragments, tcp, udp
from tests.fakes.devices import FAR4, HOST4, ROUTER4, TCP, TUN4, WG0, Side, opened
from tests.fakes.pumps import BACK, FLOW, OUTSIDE, REPLY, Pumps
from tunsplit.tasks import inbound, mishap, outbound

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
    assert [0, outbound.BATCH, outbound.BATCH + 21] == await turns(pumps, tcp(FLOW), outbound.BATCH + 20, nursery)
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


async def test_what_was_read_before_a_read_fails_is_carried(pumps, monkeypatch):
    reads = [pumps.tun.read_into]

    def read_into(buffer):
        if not reads:
            raise OSError(errno.EBADFD, "")
        return reads.pop()(buffer)

    monkeypatch.setattr(pumps.tun, "read_into", read_into)
    pumps.tun.sends(udp(FLOW))
    pumps.pump.turn()

    assert [udp(OUTSIDE)] == pumps.side.socket.packets


async def test_without_its_tun_nothing_leaves_until_there_is_another(pumps, nursery, caplog):
    pumps.tun.errors = [OSError(errno.EBADFD, "gone")]
    pumps.tun.sends(udp(FLOW))
    nursery.start_soon(pumps.pump.run)
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert ["the tun is gone"] == [record.message for record in caplog.records]
    assert 0 == pumps.pump.carry_out()
    assert [] == pumps.side.socket.frames

    pumps.pump.renewed(pumps.tun)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert [udp(OUTSIDE)] == pumps.side.socket.packets


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


async def test_an_error_about_a_size_is_not_for_the_kernel_to_remember(pumps, nursery):
    nursery.start_soon(pumps.pump.run)
    cause, as_the_app_sent_it = (udp(flow, bytes(1372)) for flow in (OUTSIDE, FLOW))
    pumps.side.socket.delivers(error(f"{FAR4} > {HOST4}", cause[:100], 3, 4, word=1300))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [] == pumps.tun.answers
    ((flow, told, mtu, _),) = pumps.heard
    assert (pumps.flow, 1300, 1300) == (flow, mtu, pumps.side.device.paths.mtu_to(ip_address(FAR4).packed))
    assert error(f"{FAR4} > {TUN4}", as_the_app_sent_it[:100], 3, 4, word=1300) == told


async def test_and_one_about_tcp_is_for_nobody(pumps, nursery):
    nursery.start_soon(pumps.pump.run)
    opened(pumps.table, FLOW, pumps.side.way(), protocol=TCP)
    cause = tcp(OUTSIDE, bytes(1372))
    pumps.side.socket.delivers(error(f"{FAR4} > {HOST4}", cause[:100], 3, 4, word=1300))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert ([], []) == (pumps.tun.answers, pumps.heard)
    assert 1300 == pumps.side.device.narrowest


async def test_what_belongs_to_no_flow_is_dropped_and_counted(pumps, nursery):
    nursery.start_soon(pumps.pump.run)
    pumps.side.socket.delivers(tcp(REPLY))
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert [] == pumps.tun.answers
    assert [tcp(REPLY)] == pumps.unclaimed
    assert {"inbound_no_flow": 1} == pumps.counters


SUPER_PACKET = struct.pack("<BBHHHH", 0, 1, 54, 100, 0, 0)  # VIRTIO_NET_HDR_GSO_TCPV4


class Turn:
    """Who was read, one after the other, in one turn."""

    def __init__(self, pumps):
        self.read: list[str] = []
        self._notes(pumps.tun, "tun")
        self._notes(pumps.side.socket, "side")

    def _notes(self, of, name):
        read = of.read_into

        def read_into(buffer):
            if size := read(buffer):
                self.read.append(name)
            return size

        of.read_into = read_into


@pytest.mark.parametrize(
    ("packet", "taken"),
    [
        (udp(REPLY), inbound.MOST_SPENT // inbound.SINGLE),
        (tcp(REPLY), inbound.MOST_SPENT // inbound.SLOW),
        (error(f"{ROUTER4} > {HOST4}", udp(OUTSIDE), 3, 3), inbound.MOST_SPENT // inbound.SLOW),
    ],
    ids=["of a flow", "of no flow", "errors"],
)
async def test_a_flood_leaves_the_others_their_turn(pumps, packet, taken):
    """Whatever waits, after this many packets others are asked; when nobody else has anything, it goes on at once."""
    opened(pumps.table, f"{TUN4}:5002 > {FAR4}:80", pumps.side.way(), port=50002, protocol=TCP)
    turn = Turn(pumps)
    for _ in range(2 * outbound.BATCH):
        pumps.side.socket.delivers(packet)
    pumps.tun.sends(*[tcp(f"{TUN4}:5002 > {FAR4}:80")] * outbound.BATCH)
    pumps.pump.turn()

    assert taken == turn.read.count("side")
    assert outbound.BATCH == turn.read.count("tun")

    turn.read.clear()
    pumps.pump.turn()
    assert outbound.BATCH == turn.read.count("side")


async def test_super_packets_are_worth_their_time(pumps):
    opened(pumps.table, FLOW, pumps.side.way(), protocol=TCP)
    for _ in range(outbound.BATCH):
        pumps.side.socket.delivers(tcp(REPLY, bytes(200)), header=SUPER_PACKET)
    pumps.tun.sends(tcp(FLOW))
    turn = Turn(pumps)
    pumps.pump.turn()

    assert ["side"] * outbound.BATCH == [name for name in turn.read if name == "side"]
    assert turn.read in (["side"] * outbound.BATCH + ["tun"], ["tun"] + ["side"] * outbound.BATCH)


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
    for failure in (KeyError(1), KeyError(2), OSError(errno.EIO, "io")):
        mishap.note(counters, failure)

    assert {"failed_KeyError": 2, f"failed_OSError_{errno.EIO}": 1} == counters
    assert [logging.ERROR, logging.ERROR] == [record.levelno for record in caplog.records]
    assert all(record.exc_info for record in caplog.records)
