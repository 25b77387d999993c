"""What packets are judged by is heard before they are carried."""

import os

import pytest
import trio.testing

from tests.craft import tcp, udp
from tests.fakes.devices import WG0, Side
from tests.fakes.pumps import FLOW, OUTSIDE, REPLY
from tunsplit.engine.flow import FlowEvent


class News:
    """Can be heard before packets are carried."""

    def __init__(self, pump, heard):
        self.heard = 0
        self._heard = heard
        self._reader, self._writer = os.pipe()
        pump.before_batch = self._hear
        pump.hear_first(self._reader)

    def comes(self):
        os.write(self._writer, b"!")

    def _hear(self):
        self.heard += len(os.read(self._reader, 100))
        self._heard()

    def close(self):
        os.close(self._reader)
        os.close(self._writer)


@pytest.fixture
def news(pumps):
    made = News(pumps.pump, lambda: pumps.flow.passes and pumps.table.end(pumps.flow, FlowEvent.BLOCK, 0.0))
    yield made
    made.close()


async def test_nothing_is_carried_before_the_news_is_heard(pumps, news):
    """What the network task has not heard of yet may have ended the flow."""
    news.comes()
    pumps.tun.sends(udp(FLOW))
    pumps.pump.turn()

    assert ([], [udp(FLOW)], 1) == (pumps.side.socket.frames, pumps.passed_by, news.heard)


async def test_news_comes_first_however_many_have_packets(pumps, news):
    """And also while packets are carried: of what they bring about."""
    others = [Side("tunnel", WG0) for _ in range(12)]
    for other in others:
        pumps.pump.attach(other.device)
        other.socket.delivers(tcp(REPLY))
    answer = pumps.side.device.send

    def send(frame, size, rewrite):
        news.comes()
        pumps.side.socket.delivers(udp(REPLY))
        answer(frame, size, rewrite)

    pumps.side.device.send = send
    pumps.tun.sends(udp(FLOW))
    pumps.pump.turn()
    for other in others:
        other.close()

    assert (1, 1) == (len(pumps.side.socket.frames), news.heard)
    assert [] == pumps.tun.answers


def bring_news_while_packets_are_read(pumps, news):
    """As of whoever has become another, and has sent as such: in this order."""
    read = pumps.tun.read_into

    def read_into(buffer):
        if size := read(buffer):
            news.comes()
        return size

    pumps.tun.read_into = read_into


async def test_what_happened_while_packets_were_read_is_heard_before_they_are_carried(pumps, news):
    bring_news_while_packets_are_read(pumps, news)
    pumps.tun.sends(udp(FLOW), udp(FLOW))
    pumps.pump.turn()

    assert ([], [udp(FLOW)] * 2, 2) == (pumps.side.socket.frames, pumps.passed_by, news.heard)


async def test_packets_that_are_carried_while_news_is_heard_keep_their_order(pumps):
    """As when a flow is ended: what was read already leaves before what is read for that."""
    texts = [b"%d" % number for number in range(10)]
    carried: list[int] = []
    made: list[News] = []

    def hear():
        if not carried:
            carried.append(0)
            carried[0] = pumps.pump.carry_out()

    made.append(News(pumps.pump, hear))
    bring_news_while_packets_are_read(pumps, made[0])
    pumps.tun.sends(*(udp(FLOW, text) for text in texts))
    pumps.pump.turn()
    made[0].close()

    assert len(texts) == carried[0]
    assert [udp(OUTSIDE, text) for text in texts] == pumps.side.socket.packets


async def test_what_happened_is_heard_also_while_others_are_being_ended(pumps, news):
    """L27: whoever sends then may have become another, too."""
    news.comes()
    pumps.tun.sends(udp(FLOW))
    pumps.pump.carry_out()

    assert ([], [udp(FLOW)], 1) == (pumps.side.socket.frames, pumps.passed_by, news.heard)


async def test_where_there_is_no_news_nobody_is_asked(pumps, news):
    pumps.tun.sends(udp(FLOW))
    pumps.pump.turn()

    assert ([udp(OUTSIDE)], 0) == (pumps.side.socket.packets, news.heard)


async def test_news_alone_wakes_nobody(pumps, news, nursery):
    """Others wait for it; while nobody can take it in, it would keep us busy."""
    nursery.start_soon(pumps.pump.run)
    news.comes()
    await trio.testing.wait_all_tasks_blocked(0.01)

    assert 0 == news.heard


async def test_a_device_that_the_news_has_closed_is_not_read(pumps):
    def give_up():
        pumps.pump.detach(pumps.side.device)

    news = News(pumps.pump, give_up)
    news.comes()
    pumps.side.socket.delivers(udp(REPLY))
    pumps.pump.turn()
    news.close()

    assert ([], 1) == (pumps.tun.answers, news.heard)
