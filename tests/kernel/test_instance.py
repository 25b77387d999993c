"""One daemon a network namespace."""

import socket

import pytest

from tunsplit.errors import TunsplitError
from tunsplit.kernel import instance
from tunsplit.kernel.instance import Instance


@pytest.fixture(autouse=True)
def own_name(monkeypatch):
    """Tests run beside daemons and other tests."""
    monkeypatch.setattr(instance, "LOCK", f"\0tunsplit-test-{id(monkeypatch):x}")


def test_nobody_runs_at_first():
    assert not Instance.is_running()


def test_who_holds_the_lock_runs_until_it_is_let_go():
    with Instance.acquire():
        assert Instance.is_running()

    assert not Instance.is_running()


def test_a_second_one_is_refused_and_the_first_stays():
    with Instance.acquire():
        with (
            pytest.raises(TunsplitError, match="another tunsplit is at work in this network namespace"),
            Instance.acquire(),
        ):
            pass
        assert Instance.is_running()


def test_the_lock_is_let_go_when_its_work_fails():
    with pytest.raises(ZeroDivisionError), Instance.acquire():
        raise ZeroDivisionError

    assert not Instance.is_running()


def test_asking_often_changes_nothing():
    with Instance.acquire():
        assert {True} == {Instance.is_running() for _ in range(1000)}


def test_nobody_can_fill_the_holders_queue():
    with Instance.acquire(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, pytest.raises(BrokenPipeError):
        sender.sendto(b"x", instance.LOCK)


def test_a_socket_of_another_type_has_another_name():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(instance.LOCK)
        assert not Instance.is_running()
