"""The stage of an end-to-end test: a lab, tunsplit running in it, and apps that do what they are told."""

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tunsplit.lab import Lab, addresses
from tunsplit.lab.apps import AGENT, NAMES, PATIENCE_S, App, start_app
from tunsplit.lab.daemon import Daemon

__all__ = ["AGENT", "NAMES", "PATIENCE_S", "App", "start_app"]  # from here, with the stage

SERVER = {version: interface.ip for version, interface in addresses.SERVER.items()}
ROUTER = {version: interface.ip for version, interface in addresses.ROUTER_LAN.items()}
HOST = {version: interface.ip for version, interface in addresses.HOST.items()}
HOST_TUNNEL = {version: interface.ip for version, interface in addresses.HOST_TUNNEL.items()}
RELAY = {version: interface.ip for version, interface in addresses.RELAY.items()}
TUN = "tunsplit0"


@dataclass
class Stage:
    """A lab with tunsplit running in its host; `excluded` and `included` are interpreters."""

    lab: Lab
    daemon: Daemon
    excluded: Path
    included: Path

    def app(self, program: Path) -> Any:
        """Run an app on the host beside the block."""
        return start_app(self.lab.host, program)

    async def where(self, *, direction: str = "", **wanted: Any) -> set[str]:
        """The sides on which such a frame was seen; arguments as for `Record.seen`, and its direction."""
        return await where(self.lab, direction=direction, **wanted)

    def clear(self) -> None:
        """Forget what was seen so far."""
        for observer in (self.lab.uplink, self.lab.tunnel):
            observer.clear()

    async def mac(self) -> bytes:
        """The Ethernet address of the host's uplink."""
        shown = (await self.lab.host.run(["ip", "-json", "link", "show", "eth0"])).stdout
        return bytes.fromhex(json.loads(shown)[0]["address"].replace(":", ""))

    async def counter(self, name: str) -> int:
        """One of tunsplit's counters; 0 if it has never counted."""
        return int((await self.daemon.status())["counters"].get(name, 0))

    async def flow_of(self, app: App) -> dict[str, Any]:
        """The one flow that tunsplit tells of this app."""
        (flow,) = [flow for flow in await self.daemon.flows() if flow["app"] and flow["app"]["pid"] == app.pid]
        return flow


async def where(lab: Lab, *, direction: str = "", **wanted: Any) -> set[str]:
    """The sides on which such a frame was seen so far."""
    sides = set()
    for observer in (lab.uplink, lab.tunnel):
        await observer.settle()
        assert observer.dropped == 0
        if any(seen.direction == direction or not direction for seen in observer.seen(**wanted)):
            sides.add(observer.name)
    return sides


REFUSED = "refused|unreachable|No route|Permission denied|not permitted"  # at once, whatever the protocol's word for it


async def until(condition: Any, what: str) -> Any:
    """Ask again and again, until it is so; give what it came to."""
    with trio.move_on_after(PATIENCE_S):
        while True:
            if answer := await condition():
                return answer
            await trio.sleep(0.01)
    raise AssertionError(f"never so: {what}")


@asynccontextmanager
async def open_stage(
    lab: Lab, excluded: Iterable[str | Path] | None = None, **overrides: Mapping[str, Any]
) -> AsyncIterator[Stage]:
    """Run tunsplit in a lab, with this configuration; its log must show nothing worse than a warning.

    Args:
        excluded: paths of the [[app]] entries, instead of the excluded interpreter's.
        overrides: sections of the configuration, as for `Lab.config`.
    """
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    config = lab.config(programs[:1] if excluded is None else excluded, **overrides)
    async with lab.tunsplit(config) as daemon:
        yield Stage(lab, daemon, *programs)
    assert not complaints(daemon.log), "\n".join(complaints(daemon.log))


def complaints(log: str) -> list[str]:
    """The lines of a log that tell of an error or an exception."""
    return [line for line in log.splitlines() if " error " in line or "Traceback" in line or " critical " in line]
