"""The kernel's own word for the time that two connections show."""

import pytest

from tunsplit.kernel import tcpclock

pytestmark = pytest.mark.netns


def test_without_offsets_all_connections_show_one_time(host):
    """As on a kernel whose offsets are made of the addresses alone."""
    host.sysctl("net/ipv4/tcp_timestamps", "2")
    assert tcpclock.is_shared()


@pytest.mark.parametrize(("apart", "shared"), [(0, True), (-5, True), (5000, False), (-5000, False)])
def test_a_clock_is_shared_that_shows_almost_the_same_time(monkeypatch, host, apart, shared):
    times = iter((2**32 - 3, (2**32 - 3 + apart) % 2**32))
    monkeypatch.setattr(tcpclock, "time_of", lambda _: next(times))

    assert shared == tcpclock.is_shared()


def test_what_cannot_be_found_out_counts_as_shared(host):
    host.ip("link set lo down")
    assert tcpclock.is_shared()
