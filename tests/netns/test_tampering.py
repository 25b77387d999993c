"""Somebody takes away or changes what is ours: nothing leaks meanwhile, it comes back, and it shows (L34).

`python -m bench.tampering` does it again and again, and prints how long it takes.
"""

import pytest
import trio

from bench.persist import SIDE
from bench.tampering import TAMPERINGS, open_tampering

pytestmark = pytest.mark.netns

STORY = {
    "all of nftables flushed": "tables",
    "the firewall let through": "tables",
    "our rules deleted": "rules",
    "our tables of routes flushed": "routes",
    "sysctls of others": "sysctls",
    "everything at once": "rules",
}


@pytest.mark.attack(
    "somebody flushes nftables, rules, routes", "all apps send in clear", "restored; nothing leaks meanwhile"
)
async def test_whatever_somebody_takes_away_comes_back_and_nothing_leaks_meanwhile():
    """Under traffic of both apps, which name devices, too; the control is what they send when tunsplit has ended."""
    async with open_tampering(rest_s=0.05) as tampering:
        watch, daemon = tampering.watch, tampering.daemon
        for name, kind in STORY.items():
            before = (await daemon.status())["counters"].get(f"restored_{kind}", 0)
            await tampering.tamper(TAMPERINGS[name])
            assert before < (await daemon.status())["counters"][f"restored_{kind}"], name
        assert [] == watch.leaks
        assert "somebody has changed what is ours: restored" in daemon.log
        assert "nft (pid " in daemon.log

        await watch.reopen()
        assert 0 == await daemon.terminate()
        with trio.fail_after(20):
            while not all(watch.open[app] for app in SIDE):
                await watch.look()
    assert all(watch.watched[app] for app in SIDE)
