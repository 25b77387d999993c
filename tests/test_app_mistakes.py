"""Mistakes of ours in a daemon at work: what hangs on them is closed, and they are over with what they were about."""

import os
from socket import AF_INET, SOCK_DGRAM, socket

import pytest
import trio

from tests.hosts import FAR4, open_host, run
from tests.test_app import a_config
from tunsplit.app import open_daemon
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.liveflows import LiveFlows
from tunsplit.tasks.network import Network
from tunsplit.tasks.pump import Pump


@pytest.fixture
def host():
    with open_host() as made:
        yield made


@pytest.fixture
def config(tmp_path):
    return a_config(tmp_path / "control.sock")


@pytest.mark.netns
async def test_a_task_that_fails_blocks_and_begins_anew(host, config, monkeypatch):
    """L21: a mistake of ours in following processes, over one event."""
    monkeypatch.setattr("tunsplit.tasks.organs.RETRY_S", 0.3)
    mistakes = [ZeroDivisionError("by zero")]
    real = Judge.tell

    def tell(judge):
        if mistakes:
            raise mistakes.pop()
        real(judge)

    async with open_daemon(config) as (report, *_):
        # Looked at as it happens: any packet that asks for judgement has all processes looked at anew, and opens again.
        closed = []
        monkeypatch.setattr(LiveFlows, "holders_unknown", lambda _: closed.append(report.status()))
        monkeypatch.setattr(Judge, "tell", tell)
        run("true")
        with trio.fail_after(20):
            while not closed or report.status()["state"] != "active":  # noqa: ASYNC110 -- nobody tells
                await trio.sleep(0.01)
        (status,) = closed
        assert "blocked" == status["state"]
        assert str(status["failure"]).endswith("ZeroDivisionError: by zero")
        # That of the task which came first: two wait for the event, and the pump looks before it carries a packet.
        assert 1 == sum(number for name, number in report.counters().items() if name.startswith("failed_"))


@pytest.fixture
def news(monkeypatch):
    """There is some with every packet."""
    made, hear_first = [], Pump.hear_first

    def hear_this_first(pump, _):
        made.append(os.eventfd(1))
        hear_first(pump, made[-1])

    monkeypatch.setattr(Pump, "hear_first", hear_this_first)
    yield
    for descriptor in made:
        os.close(descriptor)


async def rest(_):
    """Leave it to the others."""
    await trio.sleep_forever()


@pytest.mark.netns
@pytest.mark.parametrize("hearer", [Judge, Network])
async def test_a_mistake_over_news_heard_before_a_batch_blocks_too(host, news, config, monkeypatch, hearer):
    """L21: the news are gone with it, and the pump alone would go on as if there had been none."""
    monkeypatch.setattr("tunsplit.tasks.organs.RETRY_S", 0.3)
    monkeypatch.setattr(Judge, "tell_of_others", rest)
    mistakes = [ZeroDivisionError("by zero")]
    real = hearer.hear

    def hear(self):
        if mistakes:
            raise mistakes.pop()
        real(self)

    async with open_daemon(config) as (report, *_):
        closed = []

        def close(do, *given):
            do(*given)
            closed.append(report.status())

        for kind, name in ((Judge, "fail"), (Network, "close_sides")):
            real_close = getattr(kind, name)
            monkeypatch.setattr(kind, name, lambda *given, do=real_close: close(do, *given))
        monkeypatch.setattr(hearer, "hear", hear)
        with socket(AF_INET, SOCK_DGRAM) as sender:
            sender.sendto(b"any", (FAR4, 9))
        with trio.fail_after(20):
            while not closed or report.status()["state"] != "active":  # noqa: ASYNC110 -- nobody tells
                await trio.sleep(0.01)
        assert [("blocked", "what has happened is not known: ZeroDivisionError: by zero")] == [
            (status["state"], status["failure"]) for status in closed
        ]
        assert 1 == report.counters()["failed_pump"]


@pytest.mark.netns
async def test_a_mistake_over_news_heard_while_heirs_are_looked_for_blocks_too(host, news, config, monkeypatch):
    """L21: packets are carried out of the tun then as well, and the same news are gone."""
    monkeypatch.setattr("tunsplit.tasks.organs.RETRY_S", 0.3)
    monkeypatch.setattr(Pump, "run", rest)
    mistakes = [ZeroDivisionError("by zero")]
    real_hear, real_close = Network.hear, Network.close_sides
    closed = []

    def hear(network):
        if mistakes:
            raise mistakes.pop()
        real_hear(network)

    def close_sides(network, why):
        real_close(network, why)
        closed.append(why)

    async with open_daemon(config) as (report, *_):
        monkeypatch.setattr(Network, "close_sides", close_sides)
        monkeypatch.setattr(Network, "hear", hear)
        with trio.fail_after(20):
            while not closed or report.status()["state"] != "active":
                with socket(AF_INET, SOCK_DGRAM) as sender:
                    sender.sendto(b"any", (FAR4, 9))
                run("true")  # somebody is born, and dies
                await trio.sleep(0.01)
    assert ["what has happened is not known: ZeroDivisionError: by zero"] == closed
