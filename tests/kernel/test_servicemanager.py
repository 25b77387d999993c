"""What a service manager is told."""

import os
import socket

import pytest

from tunsplit.kernel import servicemanager


@pytest.mark.parametrize(
    ("told", "period"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_how_often_it_wants_to_hear_of_us(monkeypatch, told, period):
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)

    assert period == servicemanager.watchdog_period()


@pytest.mark.parametrize("abstract", [False, True])
def test_it_is_told(monkeypatch, tmp_path, abstract):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        name = f"{tmp_path}/n"
        systemd.bind("\0" + name if abstract else name)
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        servicemanager.tell("READY=1")

        assert b"READY=1" == systemd.recv(100)


def test_without_one_nobody_is_told(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    servicemanager.tell("READY=1")
