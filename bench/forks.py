"""Does anything leak when programs fork as fast as they can, and their children, and those, and are gone at once?

An excluded and an included program each bear a tree of processes by chance: some wait for their children, most leave
them orphans; the leaves are plain forks, forked twice in a session of their own, siblings by CLONE_PARENT, other
programs by exec and by posix_spawn, and listed ones. Each leaf sends one datagram at once, by IPv4 or IPv6, that says
whose it is, and ends, or waits for an answer. In every other round tunsplit stands still for a while, while more are
born than the queue of events holds: then births are missed.
Prints leaks, and what share of the datagrams arrived: who is gone before it was looked at is refused.

With HEIRS = 1 some leaves hand a socket on, used or not, to a listed program. Whose such a datagram is, nobody can tell
if giver or heir are gone before tunsplit has looked: then it is to be dropped (but see DESIGN.md, "Not yet defended").
Needs root: python -m bench.forks [ROUNDS [SEED [HEIRS]]]
"""

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from bench.arguments import whole_numbers
from tunsplit.lab import Lab, addresses, open_lab
from tunsplit.lab.apps import App, start_app
from tunsplit.lab.daemon import Daemon

SIDE = {"excluded": "uplink", "included": "tunnel"}
DEPTHS, WIDTH = (1, 2, 2, 3, 4), 4  # a tree has up to 1,000 processes, but for the smallest chance; 30 on an average
STORM = 15_000  # threads: 30,000 events; the queue holds 22,000 at most (Linux 6.18)
LATE_S = 0.3
PATIENCE_S = 120  # until what a storm has left is judged
TOKEN = re.compile(rb"(excluded|included) ([a-z ]+) (\d+) (\d+)\.")

# A line on stdout for each datagram. Whoever runs it reads until nobody of the tree is left who could write.
BEAR = """
import contextlib, ctypes, os, random, signal, socket, sys
name, number, seed, depth, width, heirs, servers, third, listed = sys.argv[1:]
servers = servers.split(",")
libc = ctypes.PyDLL(None)  # keeps the interpreter's lock, so that in the child somebody holds it
CLONE3, CLONE_PARENT = 435, 0x8000
chance = random.Random(int(seed))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)

def connected():
    server = servers[os.getpid() % 2]
    own = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
    own.connect((server, 7))
    return own

def send(kind, own):
    own.settimeout(patience())
    with contextlib.suppress(OSError):  # refused, or not waited for
        own.send(f"{name} {kind} {number} {os.getpid()}.".encode())
        own.recv(100)
    os.write(1, f"{name} {kind}\\n".encode())

def patience():
    "Some are gone at once; the others wait for an answer."
    return chance.choice([1e-6, chance.random() / 50, 0.5, 0.5])

def words(kind, whose, way):
    sends = f"echo {whose} {kind} {number} $$. >&9; read -t {patience():.6f} -u 9"
    return ["-c", f"{{ exec 9{way} && {sends}; }} 2>&-; echo {whose} {kind}"]

def become(program, *what): os.execv(program, [program, *words(*what)])

def device():
    return f"<>/dev/udp/{servers[os.getpid() % 2]}/7"

def plain(kind): send(kind, connected())

def orphan(kind):
    if not os.fork(): send(kind, connected())

def daemon(kind):
    os.setsid()
    orphan(kind)

def other(kind): become(third, kind, name, device())

def orphaned_other(kind):
    os.setsid()
    if not os.fork(): other(kind)

def listed_other(kind): become(listed, kind, "excluded", device())

def spawned(kind):
    os.posix_spawn(third, [third, *words(kind, name, device())], {})

def sibling(kind):
    arguments = (ctypes.c_uint64 * 11)(CLONE_PARENT)
    if not libc.syscall(CLONE3, ctypes.byref(arguments), ctypes.sizeof(arguments)): send(kind, connected())

def heir(kind):
    own = connected()
    if chance.random() < 0.7:
        send("opener", own)
    os.set_inheritable(own.fileno(), True)
    if chance.random() < 0.5 or not os.fork():
        if not os.fork(): become(listed, kind, "excluded", f"<&{own.fileno()}")
    if chance.random() < 0.5:
        with contextlib.suppress(OSError): os.wait()

LEAVES = {
    "plain": plain, "orphan": orphan, "daemon": daemon, "other": other, "orphaned other": orphaned_other,
    "listed": listed_other, "spawned": spawned, "sibling": sibling, **({"heir": heir} if int(heirs) else {}),
}

def node(left):
    for _ in range(int(width)):
        kind, fate = chance.choice(list(LEAVES)), chance.random()
        born_of = chance.getrandbits(32)
        if not os.fork():
            chance.seed(born_of)
            if left and fate < 0.5: node(left - 1)
            else: LEAVES[kind](kind)
            os._exit(0)
    if chance.random() < 0.3:
        with contextlib.suppress(OSError): os.wait()

node(int(depth))
"""
THREADS = """
import sys, threading
for _ in range(int(sys.argv[1])):
    one = threading.Thread(target=int)
    one.start()
    one.join()
"""


class Forks:
    """A lab whose programs bear trees.

    Attributes:
        started, arrived: datagrams by whose and what kind they were.
        leaks: what was on the wrong side, in words.
    """

    def __init__(self, lab: Lab, chance: random.Random, *, heirs: bool = False) -> None:
        """`heirs`: whether sockets are handed on, too."""
        self.started: Counter[str] = Counter()
        self.arrived: Counter[str] = Counter()
        self.leaks: list[str] = []
        self._lab = lab
        self._chance = chance
        self._heirs = heirs
        self._rounds = 0
        self._programs = {name: lab.copy_program("python", name) for name in SIDE}
        self._last, self._storm = (lab.copy_program("python", name) for name in ("last", "storm"))
        self._third, self._listed = (lab.copy_program("bash", name) for name in ("third", "listed"))
        self.config = lab.config([self._programs["excluded"], self._listed])

    async def round(self, daemon: Daemon | None, *, still: bool = False, depth: int = 0) -> None:
        """Let both bear their trees, wait until all who were born are gone and judged, and look.

        Args:
            daemon: tunsplit, if it runs.
            still: whether it stands still for a while, beside a storm.
            depth: of the trees; 0: by chance.
        """
        self._rounds += 1
        depth = depth or self._chance.choice(DEPTHS)
        async with start_app(self._lab.host, self._last) as last:
            if daemon is not None:
                await self._wait_served(last)  # so that its own birth is not among those that are missed
            async with trio.open_nursery() as nursery:
                for name in SIDE:
                    nursery.start_soon(self._bear, name, depth)
                if daemon is not None and still:
                    nursery.start_soon(self._stand_still, daemon.pid)
            if daemon is not None:
                await self._wait_judged(daemon, last)
        await self.look()

    async def look(self) -> None:
        """Count what has passed since the last look."""
        for observer in (self._lab.uplink, self._lab.tunnel):
            await observer.settle()
            if observer.dropped:
                raise RuntimeError(f"the observer of the {observer.name} did not see all")
            tokens = set()
            for seen in observer.seen(payload=b"cluded "):
                for token in TOKEN.finditer(seen.payload) if seen.direction == "out" else ():
                    name, kind = token[1].decode(), token[2].decode()
                    if observer.name != SIDE[name]:
                        self.leaks.append(f"{name} in the {observer.name}: {kind}: {seen}")
                    elif token[0] not in tokens:
                        tokens.add(token[0])
                        self.arrived[f"{name} {kind}"] += 1
            observer.clear()

    async def _bear(self, name: str, depth: int) -> None:
        servers = ",".join(str(server.ip) for server in addresses.SERVER.values())
        words = [self._rounds, self._chance.getrandbits(32), depth, WIDTH, int(self._heirs), servers]
        programs = [str(self._third), str(self._listed)]
        run = [str(self._programs[name]), "-I", "-S", "-c", BEAR, name, *map(str, words), *programs]
        self.started.update((await self._lab.host.run(run)).stdout.splitlines())

    async def _stand_still(self, pid: int) -> None:
        await trio.sleep(self._chance.uniform(0, LATE_S))
        os.kill(pid, signal.SIGSTOP)
        try:
            await self._lab.host.run([self._storm, "-I", "-S", "-c", THREADS, str(STORM)])
        finally:
            os.kill(pid, signal.SIGCONT)

    async def _wait_served(self, last: App) -> None:
        with trio.fail_after(PATIENCE_S):
            while True:
                with contextlib.suppress(OSError):  # it may wait behind all the others for too long
                    await last("ask('udp', SERVER4)")
                    return

    async def _wait_judged(self, daemon: Daemon, last: App) -> None:
        """Until all that came into the tun has been read, and nothing waits for its verdict."""
        await self._wait_served(last)
        while (await daemon.status())["counters"]["held_flows"]:  # noqa: ASYNC110 -- nobody tells
            await trio.sleep(0.05)

    def forget(self) -> None:
        """Begin to count anew."""
        self.started.clear()
        self.arrived.clear()
        self.leaks.clear()

    def words(self) -> list[str]:
        """What was seen, for people to read."""
        shares = [
            f"  {what:<24} {self.arrived[what]:>6} of {count:>6}  {self.arrived[what] / count:6.1%}"
            for what, count in sorted(self.started.items())
        ]
        arrived, started = self.arrived.total(), self.started.total()
        return [
            *shares,
            f"  {arrived} of {started} datagrams arrived ({arrived / started:.1%}); {len(self.leaks)} leaks",
            *self.leaks[:20],
        ]


@asynccontextmanager
async def open_forks(seed: int, *, heirs: bool = False) -> AsyncGenerator[tuple[Lab, Forks]]:
    """Build all of it; nothing of tunsplit runs yet."""
    async with open_lab() as lab:
        yield lab, Forks(lab, random.Random(seed), heirs=heirs)


async def run(rounds: int, seed: int, heirs: int) -> None:
    """Run so many rounds, in every other of which births are missed, and print."""
    async with open_forks(seed, heirs=bool(heirs)) as (lab, forks), lab.tunsplit(forks.config) as daemon:
        for number in range(rounds):
            await forks.round(daemon, still=number % 2 == 1)
            if not (number + 1) % 20:
                print(f"{number + 1} rounds, {forks.started.total()} leaves, {len(forks.leaks)} leaks", flush=True)
        counters = (await daemon.status())["counters"]
        print(f"seed {seed}, {rounds} rounds: {counters.get('process_events_overrun', 0)} overruns,", end=" ")
        print(f"{counters['tree_missed']} births missed")
        print(*forks.words(), sep="\n")


def main() -> None:
    """Measure and print."""
    rounds, seed, heirs = whole_numbers(200, time.time_ns() & 0xFFFF, 0)
    trio.run(run, rounds, seed, heirs)


if __name__ == "__main__":
    main()
