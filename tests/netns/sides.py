"""On which side an app is, beyond doubt: both wires are watched, and the server says whom it saw."""

from collections.abc import Awaitable, Callable
from typing import Any

from tests.netns.stage import HOST, RELAY, SERVER, Stage
from tunsplit.lab.daemon import Daemon

SEEN_AS = {"uplink": HOST, "tunnel": RELAY}


async def is_on(stage: Stage, app: Callable[[str], Awaitable[Any]], side: str, *, clear: bool = True) -> bool:
    """Whether an app is on this side only, by TCP and UDP, IPv4 and IPv6.

    `clear`: what was seen before is forgotten; else it is only told that the app was seen on its side. Resets do not
    count: what was under way to a connection that has just been ended is answered by one, on the side where it was.
    """
    if clear:
        stage.clear()
    for version in (4, 6):
        for protocol in ("tcp", "udp"):
            seen_as = await app(f"ask('{protocol}', SERVER{version})")
            assert str(SEEN_AS[side][version]) == seen_as
        await stage.where()
        frames = {
            wire.name: [frame for frame in wire.seen(destination=SERVER[version]) if not frame.is_reset]
            for wire in (stage.lab.uplink, stage.lab.tunnel)
        }
        seen = {name for name in frames if frames[name]}
        assert seen == {side} if clear else seen >= {side}, f"v{version} to {side}: {frames}"
    return True


async def listed(stage: Stage, pid: int) -> list[str]:
    """The line that `tunsplit pid list` has for a process, or none."""
    lines = (await stage.daemon.command("pid", "list")).stdout.splitlines()
    return [line for line in lines if line.split()[0] == str(pid)]


def look(daemon: Daemon) -> Callable[[int], Awaitable[Any]]:
    """Have tunsplit look at a process."""

    async def wait_known(pid: int) -> None:
        await daemon.command("explain", "--pid", str(pid))

    return wait_known
