"""Storms of nested forks (L4, L6, L7, L29): no leaf is on a wrong side. `python -m bench.forks` does it for longer."""

import pytest

from bench.forks import open_forks

pytestmark = pytest.mark.netns

SEED = 29


@pytest.mark.attack("nested forks, faster than events are read", "all send in clear", "included ones never do")
async def test_whoever_is_born_of_whom_in_a_storm_is_never_on_the_wrong_side(record_testsuite_property):
    """Born while tunsplit looks, and while it stands still; the control is what they send without it, and switched."""
    async with open_forks(SEED) as (lab, forks):
        await forks.round(None, depth=1)
        assert any("included in the uplink" in leak for leak in forks.leaks)
        forks.forget()
        async with lab.tunsplit(forks.config) as daemon:
            for still in (False, True):
                await forks.round(daemon, still=still, depth=2)
            assert 1 <= (await daemon.status())["counters"]["process_events_overrun"]
            leaks, words = list(forks.leaks), forks.words()
            record_testsuite_property(f"forks_arrived_of_{forks.started.total()}", forks.arrived.total())
            await daemon.command("off")
            await forks.round(daemon, depth=1)

    assert [] == leaks, "\n".join(words)
    assert any("excluded in the tunnel" in leak for leak in forks.leaks)
