"""Does anything leak when tunsplit is killed, at whatever moment, and started again?

Beside the traffic of `bench.persist`, rounds end with SIGKILL at a moment drawn by lot: under traffic, during a start,
a reload, a stop, an `undo`. Between `undo` and the next `ready` the way is open, which is the control: there both apps
are seen on the wrong side. At all other times a frame there is a leak.
Prints what was done and seen. Needs root: python -m bench.kills [KILLS [SEED]]
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio

from bench.persist import Watch, excluded_program, open_watch
from tunsplit.lab import Lab, open_lab
from tunsplit.lab.daemon import COMMAND, make_environment
from tunsplit.lab.programs import Program

START_S = 20.0  # a slow machine's
UNDO_S = 0.4  # from the interpreter's first instruction to the end of the work
RELOAD_S = 0.3
STOP_S = 0.2
TRAFFIC_S = 0.5

# All that tunsplit may change, in brief; tests/netns/test_life.py looks at every value.
SHOW = """
for family in -4 -6; do ip $family rule; ip $family route show table all; done
nft list tables | sort | while read -r table; do nft --stateless --terse list $table; done
ip -o link | cut -d: -f2; cd /proc/sys/net/ipv4; grep . ip_local_reserved_ports
for name in rp_filter src_valid_mark arp_ignore arp_announce; do grep . conf/*/$name; done
"""


class Kills:
    """A lab, two apps that persist, and a tunsplit that is killed again and again.

    Attributes:
        watch: what the apps have sent; closed from `ready` until the first `undo`.
        rounds: by what they were.
        kills: how often SIGKILL was sent.
        complaints: lines of daemons' logs that tell of a mistake.
    """

    def __init__(self, lab: Lab, watch: Watch, before: str, chance: random.Random) -> None:
        """`before`: what the host looked like before the first start."""
        self.watch = watch
        self.rounds: Counter[str] = Counter()
        self.kills = 0
        self.complaints: list[str] = []
        self.chance = chance
        self._lab = lab
        self._before = before
        self._start_s = 1.0
        excluded, closed = excluded_program(lab), {"on_stop": "block"}
        self._configs = [
            lab.config([excluded], firewall=closed),
            lab.config([excluded, "/nowhere"], firewall=closed, lan={"allow": True}),
        ]
        self._file, socket = lab.write_config(self._configs[0])
        self._environment = make_environment(self._file, socket)

    async def round(self, ending: str) -> None:
        """Start, and end as `ENDINGS` says; then look."""
        self.rounds[ending] += 1
        async with self._run("run", "-c", str(self._file)) as daemon:
            if ending != "while it starts":
                with trio.fail_after(START_S):
                    began = time.monotonic()
                    await daemon.wait_written("ready\n")
                    self._start_s = time.monotonic() - began
                await self.watch.close()
            await ENDINGS[ending](self, daemon)
            await self._kill(daemon)
        self.complaints += [line for line in daemon.log.splitlines() if " error " in line or "Traceback" in line]
        if ending.startswith("and undo"):
            await self._undo(whole=ending == "and undone")
        await self.watch.look()

    async def end(self) -> bool:
        """Undo all of it; whether the host is as it was before the first round."""
        await self._undo(whole=True)
        return await show(self._lab) == self._before

    async def under_traffic(self, _: Program) -> None:
        """Killed while it carries."""
        await self._sleep(TRAFFIC_S)

    async def while_it_starts(self, _: Program) -> None:
        """Killed before it was ready, or just after."""
        await self._sleep(self._start_s)

    async def while_it_reloads(self, daemon: Program) -> None:
        """Killed when the configuration has just changed."""
        await self._sleep(TRAFFIC_S)
        self._configs.reverse()
        self._file.write_text(self._configs[0])
        os.kill(daemon.pid, signal.SIGHUP)
        await self._sleep(RELOAD_S)

    async def while_it_stops(self, daemon: Program) -> None:
        """Killed on its way out, which leaves the way closed."""
        await self._sleep(TRAFFIC_S)
        daemon.process.terminate()
        await self._sleep(STOP_S)

    async def stopped(self, daemon: Program) -> None:
        """Not killed: it ends by itself, and leaves the way closed."""
        await self._sleep(TRAFFIC_S)
        daemon.process.terminate()
        with trio.fail_after(START_S):
            await daemon.process.wait()

    async def _undo(self, *, whole: bool) -> None:
        """Open the way, or begin to."""
        await self.watch.reopen()
        async with self._run("undo") as undo:
            with trio.fail_after(START_S) if whole else trio.move_on_after(self.chance.uniform(0, UNDO_S)):
                await undo.process.wait()
            await self._kill(undo)
        await self._sleep(TRAFFIC_S)

    def _run(self, *words: str) -> AbstractAsyncContextManager[Program]:
        return self._lab.host.start([*COMMAND, *words], env=self._environment)

    async def _sleep(self, most_s: float) -> None:
        await trio.sleep(self.chance.uniform(0, most_s))

    async def _kill(self, program: Program) -> None:
        if program.process.returncode is None:
            program.process.kill()
            self.kills += 1
            await program.process.wait()


async def show(lab: Lab) -> str:
    """What the host looks like."""
    return (await lab.host.run(["sh", "-c", SHOW])).stdout


ENDINGS: Mapping[str, Callable[[Kills, Program], Coroutine[Any, Any, None]]] = {
    "under traffic": Kills.under_traffic,
    "while it starts": Kills.while_it_starts,
    "while it reloads": Kills.while_it_reloads,
    "while it stops": Kills.while_it_stops,
    "stopped": Kills.stopped,
    "and undone": Kills.under_traffic,
    "and undo killed": Kills.under_traffic,
}
WEIGHTS = (8, 6, 5, 4, 2, 1, 2)


@asynccontextmanager
async def open_kills(seed: int) -> AsyncGenerator[Kills]:
    """Build all of it."""
    async with open_lab() as lab, open_watch(lab) as watch:
        yield Kills(lab, watch, await show(lab), random.Random(seed))


async def run(kills: int, seed: int) -> None:
    """Kill so many times, and print."""
    async with open_kills(seed) as state:
        while state.kills < kills:
            (ending,) = state.chance.choices(list(ENDINGS), WEIGHTS)
            await state.round(ending)
            if state.rounds.total() % 20 == 0:
                print(f"{state.kills} kills, {len(state.watch.leaks)} leaks", flush=True)
        restored = await state.end()
        print(f"seed {seed}; {state.kills} kills in {state.rounds.total()} rounds:")
        print(f"  {', '.join(f'{count} {name}' for name, count in state.rounds.items())}")
        print(*state.watch.words(), sep="\n")
        print(f"complaints: {len(state.complaints)}; as before at the end: {'yes' if restored else 'no'}")
        print(*state.complaints[:20], sep="\n")


def main() -> None:
    """Measure and print."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() & 0xFFFF
    trio.run(run, kills, seed)


if __name__ == "__main__":
    main()
