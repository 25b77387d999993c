"""What may follow a connection that its server remembers; the kernel is asked in tests/netns/test_ports.py."""

import pytest

from tests.craft import SYN, tcp
from tunsplit.engine.timewait import Connection

LAST_NUMBER, LAST_TIME, OCTETS = 1000, 70_000, 500
HALF, WHOLE = 1 << 31, 1 << 32


def connection(number, time=None, *, ends=b"ends", opened=0.0, octets=0):
    """A SYN whose clock shows `time`, or that has none."""
    options = b"" if time is None else bytes((1, 1, 8, 10)) + (time % WHOLE).to_bytes(4, "big") + bytes(4)
    packet = tcp("10.0.0.1:900 > 198.51.100.1:80", flags=SYN, seq=number % WHOLE, options=options)
    return Connection(ends, packet[20:], opened, octets)


@pytest.mark.parametrize(
    ("beyond", "may"),
    [(OCTETS + 1, True), (OCTETS, False), (-1, False), (0, False), (HALF - 1, True), (HALF, False)],
)
@pytest.mark.parametrize("last", [LAST_NUMBER, WHOLE - 1, 0, HALF])
@pytest.mark.parametrize(("then", "now"), [(None, None), (LAST_TIME, None), (None, LAST_TIME + 1)])
def test_without_two_times_its_numbers_are_beyond_all_of_the_last_one(beyond, may, last, then, now):
    before = connection(last, then, octets=OCTETS)

    assert may == connection(last + beyond, now).may_follow(before)


@pytest.mark.parametrize(
    ("beyond", "may"), [(2501, True), (2500, False), (-1, False), (0, False), (HALF - 1, True), (HALF, False)]
)
@pytest.mark.parametrize("last", [LAST_TIME, WHOLE - 1, 0, HALF])
@pytest.mark.parametrize("number", [LAST_NUMBER + OCTETS + 1, LAST_NUMBER - 1])
def test_with_times_its_own_is_beyond_what_the_last_one_may_have_shown_since(beyond, may, last, number):
    """It was opened 2.5 s ago, and its clock has a thousand ticks a second."""
    before = connection(LAST_NUMBER, last, octets=OCTETS)

    assert may == connection(number, last + beyond, opened=2.5).may_follow(before)


def test_more_than_half_of_all_numbers_leaves_none_that_is_beyond():
    before = connection(LAST_NUMBER, octets=HALF)

    assert not any(connection(LAST_NUMBER + at).may_follow(before) for at in (HALF - 1, HALF, HALF + 1, -1))


def test_others_are_told_by_their_ends_and_what_was_never_opened_here_is_unknown():
    assert connection(0, ends=b"another").may_follow(connection(LAST_NUMBER, octets=OCTETS))
    assert connection(0).may_follow(Connection(b"ends", b"", 0.0, OCTETS))
