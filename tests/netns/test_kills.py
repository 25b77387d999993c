"""Killed at any moment, and started again: nothing leaks (L15, L16, L26). `python -m bench.kills` does it 300 times."""

import pytest

from bench.kills import ENDINGS, open_kills
from bench.persist import SIDE

pytestmark = pytest.mark.netns

SEED = 34


@pytest.mark.attack("SIGKILL, at any moment", "all apps send in clear", "included apps are cut off")
async def test_killed_at_whatever_moment_nothing_leaks():
    """Each way to end once, under traffic of both apps; the control is what they send once the way is open."""
    async with open_kills(SEED) as kills:
        for ending in (*ENDINGS, "under traffic"):
            await kills.round(ending)
        restored = await kills.end()

    assert ([], []) == (kills.watch.leaks, kills.complaints)
    assert restored
    for app in SIDE:
        assert kills.watch.watched[app]
        assert kills.watch.open[app]
