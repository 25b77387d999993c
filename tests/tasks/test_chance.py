"""Random numbers."""

from collections import Counter

import pytest

from tunsplit.tasks.chance import DRAWN, Chance


@pytest.mark.parametrize("limit", [1, 3, 4, 40_000, 0x10000])
def test_numbers_are_below_their_limit(limit):
    chance = Chance()

    assert set(range(limit)) >= {chance.below(limit) for _ in range(DRAWN)}


def test_every_number_is_drawn():
    chance = Chance()
    drawn = Counter(chance.below(3) for _ in range(3000))

    assert {0, 1, 2} == set(drawn)


def test_two_do_not_draw_the_same():
    one, other = Chance(), Chance()

    assert [one.below(0x10000) for _ in range(20)] != [other.below(0x10000) for _ in range(20)]
