"""The service manager hears that the loop runs, as often as it wants to."""

import logging
import socket

import pytest
import trio
import trio.testing

from tunsplit.tasks import watchdog


@pytest.fixture
def manager(monkeypatch, tmp_path):
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as systemd:
        systemd.bind(f"{tmp_path}/n")
        yield systemd


async def test_it_is_told_twice_in_its_time(manager, autojump_clock):
    with trio.move_on_after(5):
        await watchdog.reassure()

    assert [b"WATCHDOG=1"] * 3 == [manager.recv(100) for _ in range(3)]
    with pytest.raises(BlockingIOError):
        manager.recv(100)


async def test_one_that_has_gone_ends_nothing(manager, monkeypatch, autojump_clock, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    with caplog.at_level(logging.WARNING), trio.move_on_after(3) as scope:
        await watchdog.reassure()

    assert scope.cancelled_caught
    assert 2 == len(caplog.records)


async def test_one_that_does_not_ask_is_not_told(manager, monkeypatch):
    monkeypatch.delenv("WATCHDOG_USEC")
    await watchdog.reassure()

    with pytest.raises(BlockingIOError):
        manager.recv(100)
