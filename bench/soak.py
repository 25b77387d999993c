"""Does tunsplit's memory, or the number of its descriptors, grow under full load?

An excluded and an included iperf3 stream both ways, side by side, again and again; an excluded and an included app send
datagrams, pings and a stream, open new connections and ask for names without a pause (`bench.traffic`). Prints resident
memory and descriptors after the first minute and at the end. Needs root and iperf3: python -m bench.soak [MINUTES]
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from bench.traffic import App, traffic
from tunsplit.lab import Lab, addresses, open_lab, servers
from tunsplit.lab.daemon import Daemon
from tunsplit.lab.programs import background

FIRST_S = 60.0
ASKED_S = 5.0  # between two questions to apps, whose answer has to be remembered whole (`Program.output`)
ROUND_S = 10
GOAL_MIB = 5
STUCK_S = 15.0
NODAD = {4: "", 6: " nodad"}  # usable at once


@dataclass
class Usage:
    """What a process has: resident memory, MiB, and descriptors."""

    memory: float
    descriptors: int


@dataclass
class Soak:
    """What is known so far.

    Attributes:
        at_s: seconds since the load began.
        first: after the warm-up.
        last: now.
        attempts: of both apps, by kind.
        failed: those of them with an error, by kind and error.
        counters: tunsplit's own.
    """

    at_s: float = 0.0
    first: Usage = field(default_factory=lambda: Usage(0, 0))
    last: Usage = field(default_factory=lambda: Usage(0, 0))
    attempts: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def grown(self) -> float:
        """MiB since the warm-up."""
        return self.last.memory - self.first.memory


def usage(pid: int) -> Usage:
    """What a process has now."""
    process = Path("/proc", str(pid))
    (line,) = [one for one in (process / "status").read_text().splitlines() if one.startswith("VmRSS")]
    return Usage(int(line.split()[1]) / 1024, len(list((process / "fd").iterdir())))


async def stream(lab: Lab, program: str | Path, port: int, version: int) -> None:
    """Stream both ways, again and again."""
    words = ["-c", str(lab.server(version)), "-p", str(port), "--bidir", "-t", str(ROUND_S)]
    while True:
        await lab.host.run([program, *words], check=False)


@asynccontextmanager
async def load() -> AsyncIterator[tuple[Daemon, list[App]]]:
    """Run tunsplit under full load beside the block."""
    async with AsyncExitStack() as stack:
        lab = await stack.enter_async_context(open_lab(tunnel_kind="veth", observe=False))
        nursery = await stack.enter_async_context(background())
        targets = {
            name: [server.network[number] for server in addresses.SERVER.values()]
            for number, name in enumerate(("excluded", "included"), start=90)
        }
        own = [target for found in targets.values() for target in found]
        lab.internet.ip("".join(f"address add {one} dev eth0{NODAD[one.version]}\n" for one in own))
        servers.serve(lab.internet, own, nursery)
        programs = {name: lab.copy_program("python", name) for name in targets}
        iperf = lab.copy_program("iperf3", "excluded-iperf3")
        config = lab.config([iperf, programs["excluded"]], log={"level": "warning"})
        daemon = await stack.enter_async_context(lab.tunsplit(config))
        apps = []
        for name, program in programs.items():
            argv = traffic(program, name, STUCK_S, targets[name], resolvers=addresses.PUBLIC_RESOLVER.values())
            running = await stack.enter_async_context(lab.host.start(argv, stdin=subprocess.PIPE))
            apps.append(App(name, running))
        for port, program in ((addresses.IPERF_PORT, iperf), (addresses.IPERF_PORT + 1, Path("iperf3"))):
            await stack.enter_async_context(lab.iperf_server(port=port))
            nursery.start_soon(stream, lab, str(program), port, 4)
        yield daemon, apps


async def soak(warm_up_s: float, whole_s: float, tell: Callable[[Soak], None] = lambda _: None) -> Soak:
    """Load it for so long, and `tell` again and again; growth counts after the warm-up."""
    found = Soak()
    async with load() as (daemon, apps):
        began = time.monotonic()
        while found.at_s < whole_s:
            ends = warm_up_s if found.at_s < warm_up_s else min(found.at_s + ROUND_S, whole_s)
            while (rest := began + ends - time.monotonic()) > 0:
                await trio.sleep(min(rest, ASKED_S))
                await ask(apps, found)
            found.counters = (await daemon.status())["counters"]
            found.last = usage(daemon.pid)
            if found.at_s < warm_up_s:
                found.first = found.last
            found.at_s = time.monotonic() - began
            tell(found)
    return found


async def ask(apps: list[App], found: Soak) -> None:
    """Count what apps have attempted since they were asked last."""
    for app in apps:
        for attempt in await app.ask():
            found.attempts[attempt.kind] += 1
            if attempt.error:
                found.failed[f"{attempt.kind} {attempt.error}"] += 1
        app.attempts.clear()


def tell_so_far(found: Soak) -> None:
    """One line."""
    counters = found.counters
    print(f"{found.at_s:5.0f} s {found.last.memory:6.1f} MiB {found.last.descriptors} descriptors", end=" ")
    print(f"{counters['flows']:,} flows, {counters['opened']:,} opened, load {os.getloadavg()[0]:.1f}", flush=True)


async def run(minutes: float) -> bool:
    """Load it, and print; whether it stayed below the goal."""
    found = await soak(min(FIRST_S, minutes * 30), minutes * 60, tell_so_far)
    if found.failed:
        print("failed: " + ", ".join(f"{number} × {what}" for what, number in found.failed.most_common()))
    print("| minutes | attempts of apps | failed | flows opened | MiB, first and last | grown (goal) | descriptors |")
    print(
        f"| {found.at_s / 60:.1f} | {found.attempts.total():,} | {found.failed.total()} | {found.counters['opened']:,} "
        f"| {found.first.memory:.1f} {found.last.memory:.1f} | {found.grown:.1f} ({GOAL_MIB}) "
        f"| {found.first.descriptors} → {found.last.descriptors} |"
    )
    return found.grown < GOAL_MIB


def main() -> None:
    """Load and print."""
    sys.exit(not trio.run(partial(run, float(sys.argv[1]) if len(sys.argv) > 1 else 30)))


if __name__ == "__main__":
    main()
