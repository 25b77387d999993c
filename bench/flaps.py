"""How soon do included apps flow again when the tunnel is back, and does anything leak or get stuck when it goes?

An excluded and an included app never stop: a TCP stream, connected datagrams, new connections, pings, IPv4 and IPv6.
Each has a server's address of its own, so that every frame tells whose it is. The tunnel goes and comes back: it is set
down and up, removed and made anew, or gets other addresses, and stays away for a time drawn by lot.
Prints, of each kind of traffic, the time from the tunnel's return (its last address is there) to the first answer; how
long the longest refusal took while it was away; leaks; and flows that were stuck: attempts without an answer or an
error in STUCK_S. The tunnel is a veth pair, so that no VPN's own time is in there.
Needs root: python -m bench.flaps [FLAPS [SEED]]
"""

import random
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from bench.arguments import whole_numbers
from bench.traffic import KINDS, App, Attempt, traffic
from tunsplit.lab import Lab, addresses, open_lab, servers
from tunsplit.lab.addresses import TUNNEL_DEVICE
from tunsplit.lab.programs import background

STUCK_S = 5.0
GOAL_MS = 100
AWAY_S = 0.3  # at most
PATIENCE_S = 60.0
SIDE = {"excluded": "uplink", "included": "tunnel"}
TARGETS = {
    app: {version: server.network[number] for version, server in addresses.SERVER.items()}
    for app, number in (("excluded", 82), ("included", 83))
}
OTHER = {4: "10.64.0.77/32", 6: "fd64::77/128"}  # within what the relay masquerades
WAYS = ("down", "removed", "renumbered")


@dataclass
class Flaps:
    """What was seen so far. Seconds."""

    number: int = 0
    returns: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by kind
    refusals: list[float] = field(default_factory=list)  # of included apps: how long each took
    leaks: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # frames, by app
    stuck: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # attempts, by app
    disturbed: list[Attempt] = field(default_factory=list)  # of excluded apps, that ended in an error


class Stage:
    """A lab in which tunsplit runs, and both apps with their traffic."""

    def __init__(self, lab: Lab, apps: dict[str, App]) -> None:
        self.lab = lab
        self.apps = apps
        self.flaps = Flaps()
        self._numbers: dict[int, object] = dict(addresses.HOST_TUNNEL)

    async def flap(self, how: str, away_s: float) -> None:
        """Have the tunnel go and come back, and wait until all kinds of traffic flow again."""
        lab, flaps = self.lab, self.flaps
        if how == "removed":
            await lab.remove_tunnel()
        elif how == "down":
            lab.tunnel_down()
        else:
            self._renumber()
        await trio.sleep(away_s)
        if how == "removed":
            await lab.create_tunnel()
        elif how == "down":
            lab.tunnel_up()
        else:
            self._renumber()
        await self._wait_back(time.monotonic())
        await self.apps["excluded"].ask()
        await self.look()
        flaps.number += 1

    def _renumber(self) -> None:
        """Give the tunnel its other addresses."""
        host = self.lab.host
        for version, own in addresses.HOST_TUNNEL.items():
            old, new = (own, OTHER[version]) if self._numbers[version] == own else (OTHER[version], own)
            host.ip(f"address delete {old} dev {TUNNEL_DEVICE}\naddress add {new} dev {TUNNEL_DEVICE}")
            self._numbers[version] = new

    async def _wait_back(self, since: float) -> None:
        missing = set(KINDS)
        with trio.fail_after(PATIENCE_S):
            while missing:
                await trio.sleep(0.02)
                for one in await self.apps["included"].ask():
                    if one.kind in missing and one.ended > since and not one.error:
                        missing.remove(one.kind)
                        self.flaps.returns[one.kind].append(one.ended - since)

    async def look(self) -> None:
        """Count what was seen since the last time."""
        for observer in (self.lab.uplink, self.lab.tunnel):
            await observer.settle()
            assert observer.dropped == 0
            for name, side in SIDE.items():
                if side != observer.name:
                    self.flaps.leaks[name] += frames_of(observer, name)
            observer.clear()
        for name, app in self.apps.items():
            self.flaps.stuck[name] += sum(one.error == "stuck" for one in app.attempts)
            if name == "included":
                self.flaps.refusals += [one.took_s for one in app.attempts if one.error]
            else:
                self.flaps.disturbed += [one for one in app.attempts if one.error]
            app.attempts.clear()


def frames_of(observer: Any, name: str) -> int:
    """How many frames an observer saw that this app sent or was sent."""
    targets = set(TARGETS[name].values())
    return sum(
        frames for flow, frames in observer.flows().items() if flow.source in targets or flow.destination in targets
    )


@asynccontextmanager
async def open_stage(lab: Lab, stuck_s: float = STUCK_S) -> AsyncGenerator[Stage]:
    """Run tunsplit in a lab, and both apps; entered once both are seen on their own side.

    An attempt without an answer or an error for `stuck_s` is stuck.
    """
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(background())
        own = [target for targets in TARGETS.values() for target in targets.values()]
        lab.internet.ip("".join(f"address add {one} dev eth0{' nodad' if one.version == 6 else ''}\n" for one in own))
        servers.serve(lab.internet, own, nursery)
        programs = {name: lab.copy_program("python", f"{name}-traffic") for name in SIDE}
        await stack.enter_async_context(lab.tunsplit(excluded=[programs["excluded"]]))
        apps = {}
        for name, program in programs.items():
            argv = traffic(program, name, stuck_s, TARGETS[name].values())
            running = lab.host.start(argv, stdin=subprocess.PIPE)
            apps[name] = App(name, await stack.enter_async_context(running))
        for name, app in apps.items():
            flowing: set[str] = set()
            with trio.fail_after(PATIENCE_S):
                while len(flowing) < len(KINDS):
                    new = await app.ask()
                    flowing |= {one.kind for one in new if not one.error}
                    await trio.sleep(0.02)
            # The control: an app's frames do show, where they are to be.
            observer = lab.uplink if SIDE[name] == "uplink" else lab.tunnel
            await observer.settle()
            assert frames_of(observer, name)
            app.attempts.clear()
        stage = Stage(lab, apps)
        await stage.look()
        yield stage


async def run(number: int, seed: int) -> Flaps:
    """So many flaps of all kinds."""
    chance = random.Random(seed)
    async with open_lab(tunnel_kind="veth") as lab, open_stage(lab) as stage:
        for count in range(number):
            await stage.flap(WAYS[count % len(WAYS)], chance.uniform(0, AWAY_S))
            await trio.sleep(chance.uniform(0, AWAY_S))
        return stage.flaps


def show(flaps: Flaps) -> None:
    """Print the figures."""
    print(f"{flaps.number} flaps; from the tunnel's return to the first answer, ms (goal {GOAL_MS})")
    print("(an unconnected socket is told of nothing, and tries again after 250 ms: it is not in the sum)")
    told = [one for kind, found in flaps.returns.items() if not kind.startswith("unconnected") for one in found]
    for kind, found in (*sorted(flaps.returns.items()), ("all that are told", told)):
        ms = sorted(one * 1000 for one in found)
        late = sum(one > GOAL_MS for one in ms)
        print(
            f"{kind:17}  median {statistics.median(ms):6.0f}  p99 {ms[int(len(ms) * 0.99)]:6.0f}  max {ms[-1]:6.0f}"
            f"  over the goal {late}"
        )
    refused = sorted(one * 1000 for one in flaps.refusals) or [0.0]
    print(f"refusals of included apps: {len(refused)}, the longest took {refused[-1]:.0f} ms")
    errors = Counter(f"{one.kind} {one.error}" for one in flaps.disturbed)
    print(f"attempts of excluded apps that ended in an error: {len(flaps.disturbed)} {dict(errors) or ''}")
    print(f"leaks: {dict(flaps.leaks)}  stuck: {dict(flaps.stuck)}")


if __name__ == "__main__":
    show(trio.run(partial(run, *whole_numbers(200, 1))))
