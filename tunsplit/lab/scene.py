"""Where promises are shown: a lab with tunsplit in it, an excluded and an included app, what both wires have seen."""

from collections import Counter
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tunsplit.lab import addresses
from tunsplit.lab.apps import App, start_app
from tunsplit.lab.daemon import Daemon
from tunsplit.lab.lab import BOTH, Lab

PROTOCOLS = ("tcp", "udp", "icmp")
SERVERS = frozenset(interface.ip for interface in addresses.SERVER.values())
SEEN_AS = {"uplink": addresses.HOST, "tunnel": addresses.RELAY}  # by servers
RETURN_S = 10.0  # what has gone is back by then, or does not come


class BrokenPromise(Exception):
    """What was promised did not happen; a leak is noted, not raised."""


class Scene:
    """A lab, its daemon, and the two apps.

    Attributes:
        frames: those of apps that were watched, by side.
        leaks: what was seen where it may not be, in words.
    """

    def __init__(self, lab: Lab, daemon: Daemon, programs: dict[str, Path], apps: dict[str, App]) -> None:
        self.lab = lab
        self.daemon = daemon
        self.programs = programs
        self.excluded, self.included = apps["excluded"], apps["included"]
        self.frames: Counter[str] = Counter()
        self.leaks: list[str] = []

    def clear(self) -> None:
        """Forget what was seen so far, but for the leaks."""
        for observer in (self.lab.uplink, self.lab.tunnel):
            observer.clear()

    async def only(self, side: str | None, *, needed: bool = True) -> None:
        """See on which sides frames from or to the internet's server were: a leak, unless it is this side.

        Raises:
            BrokenPromise: on `side` were none, and they are `needed`.
        """
        seen = {}
        for observer in (self.lab.uplink, self.lab.tunnel):
            await observer.settle()
            flows = {flow: n for flow, n in observer.flows().items() if {flow.source, flow.destination} & SERVERS}
            seen[observer.name] = sum(flows.values())
            self.frames[observer.name] += seen[observer.name]
            if observer.name != side:
                self.leaks += [
                    f"{count} × {' '.join(map(str, flow))} on the {observer.name}" for flow, count in flows.items()
                ]
        if needed and side is not None and not seen[side]:
            raise BrokenPromise(f"nothing was seen on the {side}")

    async def talks(
        self, app: App, side: str, protocols: Collection[str] = PROTOCOLS, versions: Collection[int] = BOTH
    ) -> None:
        """Have an app talk to the internet's server, which has to see it as one of this side.

        Raises:
            BrokenPromise: it was seen as somebody else, or nowhere.
            OSError: as the app got it.
        """
        self.clear()
        for version in versions:
            for protocol in protocols:
                told = await app("ask(protocol, address)", protocol=protocol, address=str(self.lab.server(version)))
                expected = "" if protocol == "icmp" else str(SEEN_AS[side][version].ip)
                if told != expected:
                    raise BrokenPromise(f"by {protocol} the server saw {told}, not {expected}")
        await self.only(side)

    async def is_refused(self, app: App, protocols: Collection[str] = ("tcp", "udp")) -> None:
        """Have an app try to talk, and be refused at once; nothing may be seen.

        Raises:
            BrokenPromise: it was answered, or had to wait.
        """
        self.clear()
        for version in BOTH:
            for protocol in protocols:
                try:
                    told = await app("ask(protocol, address)", protocol=protocol, address=str(self.lab.server(version)))
                except TimeoutError:
                    raise BrokenPromise(f"{protocol} over IPv{version} was not refused, but had to wait") from None
                except OSError:
                    continue
                raise BrokenPromise(f"{protocol} over IPv{version} was answered: {told}")
        await self.only(None)

    async def talks_again(self, app: App, side: str) -> None:
        """The same as `talks`, once something that has gone is back.

        Raises:
            BrokenPromise: it does not come back.
        """
        with trio.move_on_after(RETURN_S):
            while True:
                try:
                    return await self.talks(app, side, ("tcp", "udp"))
                except OSError:
                    await trio.sleep(0.05)
        raise BrokenPromise("it does not work again")


@asynccontextmanager
async def open_scene(lab: Lab, daemon: Daemon, programs: dict[str, Path]) -> AsyncGenerator[Scene]:
    """Start the apps beside the block."""
    async with (
        start_app(lab.host, programs["excluded"]) as excluded,
        start_app(lab.host, programs["included"]) as included,
    ):
        yield Scene(lab, daemon, programs, {"excluded": excluded, "included": included})
