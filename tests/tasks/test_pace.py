"""How often the network task may look at the host."""

import pytest

from tunsplit.tasks.pace import MOST_OWED_S, REST, Pace


class Clock:
    """Time passes when the test says so."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def look(clock, pace, took_s):
    clock.now += took_s
    return pace.looked(took_s)


def test_after_a_long_quiet_there_may_be_several_looks_at_once(clock):
    pace = Pace(clock)

    assert [0, 0, 0] == [look(clock, pace, MOST_OWED_S / 20) for _ in range(3)]


def test_who_looks_without_end_leaves_packets_four_fifths_of_the_time(clock):
    pace = Pace(clock)
    looks = 0
    while clock.now < 200.0:
        rest = look(clock, pace, 0.05)
        looks += 1
        clock.now += rest

    assert looks * 0.05 == pytest.approx(100.0 / (1 + REST), rel=0.05)


def test_what_is_owed_is_paid_by_time(clock):
    pace = Pace(clock)
    assert look(clock, pace, MOST_OWED_S) > 0
    clock.now += REST * MOST_OWED_S

    assert 0 == look(clock, pace, MOST_OWED_S / REST)
