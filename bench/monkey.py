"""Does anything leak or get stuck, whatever is done to tunsplit and to its network, in whatever order?

A monkey draws by lot what it does next, while four apps never rest (`bench.traffic`), and both wires are watched: it
switches apps, reloads, takes tunnel and uplink away and gives them back with other addresses, kills and starts
tunsplit, flushes what is tunsplit's, forks and executes. After each step nothing may have been on a wrong side
(`bench.ledger`), and after most of them all traffic has to flow that ought to. What it took away may stay away for
some steps.
Prints what was done and seen; on a failure the steps that led there.
Needs root: python -m bench.monkey [MINUTES [SEED]]
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from bench.jungle import EXECUTED, NAMES, PATIENCE_S, TARGETS, Jungle, one_of, open_jungle
from bench.tampering import TAMPERINGS
from tunsplit.lab.daemon import COMMAND
from tunsplit.lab.wireguard import Kind

HASTE = 0.35  # how many steps are not waited for
REST_S = 0.3  # at most, after a step
TUN = "tunsplit0"
TOLD = 15  # steps before a failure that are told

TUN_GONE = {
    "removed": f"ip link delete {TUN}",
    "down": f"ip link set {TUN} down",
    "without addresses": f"ip address flush dev {TUN}",
}
# As a DHCP server and the VPN's server may ask for; and back.
ROUTES = """
    ip -4 route replace 198.51.100.0/25 via 192.168.50.1 dev eth0
    ip -6 route replace 2001:db8:100::/65 via 2001:db8:50::1 dev eth0
    ip -4 route replace 0.0.0.0/1 dev wg0; ip -6 route replace ::/1 dev wg0
"""
NO_ROUTES = ROUTES.replace("replace", "delete")
ONCE = """
import contextlib, socket, sys
token, targets = sys.argv[1].encode(), sys.argv[2:]
for target in targets:
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with contextlib.suppress(OSError), socket.socket(family, kind) as own:
            own.settimeout(1)
            own.connect((target, 7))
            own.send(token)
            own.recv(100)
"""

Step = Callable[["Monkey"], Awaitable[str]]


@dataclass(frozen=True)
class Operation:
    """What the monkey can do: how often, as a weight; and when it may."""

    weight: int
    do: Step
    may: Callable[[Jungle], bool]


@dataclass
class Usage:
    """A daemon's memory (KiB) and descriptors: at first, and at last."""

    pid: int
    first: tuple[int, int]
    last: tuple[int, int]
    steps: int = 0


@dataclass
class Monkey:
    """What it has done and seen so far."""

    jungle: Jungle
    chance: random.Random
    steps: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    waits: int = 0
    stuck: list[str] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)

    async def step(self) -> None:
        """Do one thing, and judge it."""
        jungle = self.jungle
        possible = {name: one for name, one in OPERATIONS.items() if one.may(jungle)}
        (name,) = self.chance.choices(list(possible), [one.weight for one in possible.values()])
        hasty, rest_s = self.chance.random() < HASTE, self.chance.uniform(0, REST_S)
        self.done[name] += 1
        self.steps.append(f"{len(self.steps)}: {name}{', in haste' if hasty else ''}")
        told = await possible[name].do(self)
        jungle.has_changed()
        self.steps[-1] += f" {told}, epoch {jungle.ledger.epoch}"
        await jungle.ledger.look()
        if not hasty:
            await self.settle()
        await trio.sleep(rest_s)
        await jungle.ledger.look()

    async def settle(self) -> None:
        """Wait until everything flows that ought to."""
        jungle = self.jungle
        self.waits += 1
        if found := await jungle.wait_flowing(jungle.flowing()):
            self.stuck += [f"after step {self.steps[-1]}: {one}" for one in found]
        for name in jungle.apps:
            self.stuck += [f"before step {len(self.steps)}: {name}: {one}" for one in jungle.take_stuck(name)]
        if jungle.daemon is not None:
            pid, usage = jungle.daemon.pid, jungle.usage()
            if not self.usages or self.usages[-1].pid != pid:
                self.usages.append(Usage(pid, usage, usage))
            self.usages[-1].last = usage
            self.usages[-1].steps += 1

    async def end(self) -> None:
        """Give back what was taken away, and see that everything flows."""
        jungle = self.jungle
        if not jungle.host.uplink_up:
            jungle.set_uplink(up=True)
        if not jungle.host.tunnel_exists:
            await jungle.create_tunnel()
        elif not jungle.host.tunnel_up:
            await jungle.set_tunnel(up=True)
        if jungle.daemon is None:
            await jungle.start()
        jungle.has_changed()
        await jungle.ledger.look()
        self.steps.append("end")
        await self.settle()
        await jungle.end(kill=False)

    @property
    def failed(self) -> bool:
        """Whether anything was not as it is to be."""
        return bool(self.jungle.ledger.leaked or self.stuck or self.jungle.complaints)

    def words(self) -> list[str]:
        """What was done and seen, in lines to print."""
        ledger = self.jungle.ledger
        watched = ", ".join(f"{count:,} on the {side}" for side, count in sorted(ledger.watched.items()))
        done = ", ".join(f"{count} {name}" for name, count in self.done.most_common())
        lines = [
            f"{self.done.total()} operations: {done}",
            f"{ledger.epoch} epochs; packets watched: {watched}",
            f"leaks: {ledger.leaked}; stuck: {len(self.stuck)}, looked for {self.waits} times; "
            f"complaints: {len(self.jungle.complaints)}",
        ]
        if self.usages:
            longest = max(self.usages, key=lambda one: one.steps)
            (memory, files), (memory_last, files_last) = longest.first, longest.last
            lines.append(
                f"of {len(self.usages)} daemons the longest-lived ({longest.steps} looks): "
                f"memory {memory / 1024:.1f} → {memory_last / 1024:.1f} MiB, descriptors {files} → {files_last}"
            )
        if self.failed:
            lines += [*ledger.leaks[:20], *self.stuck[:20], *self.jungle.complaints[:20]]
            lines += ["the last steps:", *self.steps[-TOLD:]]
        return lines


# What it does to tunsplit. Each says what it did, in a few words.


async def switch(monkey: Monkey) -> str:
    """Put an app on the list, or take it off."""
    jungle, splitting = monkey.jungle, monkey.jungle.splitting
    name, saved = one_of(monkey.chance, NAMES), monkey.chance.random() < 0.5
    verb = "remove" if name in splitting.listed else "add"
    for names in (splitting.listed, *([splitting.saved] if saved else [])):
        (names.discard if verb == "remove" else names.add)(name)
    await jungle.tell("app", verb, str(jungle.programs[name]), *(["--save"] if saved else []))
    return f"{verb} {name}{' saved' if saved else ''}"


async def toggle(monkey: Monkey) -> str:
    """Switch splitting on or off."""
    splitting = monkey.jungle.splitting
    splitting.enabled = not splitting.enabled
    verb = "on" if splitting.enabled else "off"
    await monkey.jungle.tell(verb)
    return verb


async def by_hand(monkey: Monkey) -> str:
    """Exclude a process by hand, or take that back."""
    jungle, marked = monkey.jungle, monkey.jungle.splitting.marked
    name = one_of(monkey.chance, NAMES)
    verb = "remove" if name in marked else "add"
    (marked.discard if verb == "remove" else marked.add)(name)
    await jungle.tell("pid", verb, str(jungle.apps[name].program.pid))
    return f"{verb} {name}"


async def reload(monkey: Monkey) -> str:
    """Reload another configuration."""
    chance, splitting = monkey.chance, monkey.jungle.splitting
    if chance.random() < 0.4:
        splitting.mode = "include" if splitting.mode == "exclude" else "exclude"
    options: dict[str, dict[str, Any]] = {
        "lan": {"allow": chance.random() < 0.5},
        "split": {"hold": chance.choice(("1s", "2s"))},
        "dns": {"filter_aaaa": chance.random() < 0.5, "fallback": chance.random() < 0.5},
        "log": {"level": chance.choice(("debug", "info"))},
    }
    await monkey.jungle.reload(options)
    return f"{splitting.mode} {options}"


async def kill(monkey: Monkey) -> str:
    """End tunsplit by SIGKILL."""
    await monkey.jungle.end(kill=True)
    return ""


async def stop(monkey: Monkey) -> str:
    """End it by SIGTERM."""
    await monkey.jungle.end(kill=False)
    return ""


async def start(monkey: Monkey) -> str:
    """Start it."""
    await monkey.jungle.start()
    return ""


async def false_start(monkey: Monkey) -> str:
    """Start it, and kill it before it is ready, or soon after."""
    jungle, after_s = monkey.jungle, monkey.chance.uniform(0, 1.5)
    program = await jungle.spawn([*COMMAND, "run", "-c", jungle.file])
    jungle.splitting.listed, jungle.splitting.enabled = set(jungle.splitting.saved), True
    await trio.sleep(after_s)
    program.process.kill()
    await program.process.wait()
    return f"killed after {after_s:.2f} s"


# To its network


async def tunnel(monkey: Monkey) -> str:
    """Set the tunnel down, remove it, crash it; or bring it back."""
    jungle, host = monkey.jungle, monkey.jungle.host
    if not host.tunnel_exists:
        await jungle.create_tunnel()
        return "made anew"
    if not host.tunnel_up:
        await jungle.set_tunnel(up=True)
        return "up"
    way = monkey.chance.choice(("down", "removed", "crashed"))
    if way == "down":
        await jungle.set_tunnel(up=False)
    else:
        await jungle.remove_tunnel(crash=way == "crashed")
    return way


async def renumber_tunnel(monkey: Monkey) -> str:
    """Give the tunnel other addresses."""
    versions = monkey.chance.choice(((4,), (6,), (4, 6)))
    monkey.jungle.renumber_tunnel(versions)
    return " ".join(f"IPv{version}" for version in versions)


async def uplink(monkey: Monkey) -> str:
    """Take the uplink away, or bring it back."""
    up = not monkey.jungle.host.uplink_up
    monkey.jungle.set_uplink(up=up)
    return "up" if up else "down"


async def renumber_uplink(monkey: Monkey) -> str:
    """Give the uplink other addresses."""
    monkey.jungle.renumber_uplink()
    return ""


async def change_router(monkey: Monkey) -> str:
    """Give the uplink another gateway."""
    monkey.jungle.change_router()
    return ""


async def push_routes(monkey: Monkey) -> str:
    """Put routes into the main table, as the network and the VPN's server may; or take them away."""
    taken = monkey.chance.random() < 0.5
    await monkey.jungle.lab.host.run(["sh", "-c", NO_ROUTES if taken else ROUTES], check=False)
    return "taken away" if taken else "pushed"


# To what is tunsplit's


async def tamper(monkey: Monkey) -> str:
    """Take away or change what is tunsplit's in the kernel."""
    name = monkey.chance.choice(sorted(TAMPERINGS))
    await monkey.jungle.lab.host.run(["sh", "-c", TAMPERINGS[name]], check=False)
    return name


async def take_tun(monkey: Monkey) -> str:
    """Take the tun away."""
    way = monkey.chance.choice(sorted(TUN_GONE))
    await monkey.jungle.lab.host.run(["sh", "-c", TUN_GONE[way]], check=False)
    return way


# To processes


async def fork(monkey: Monkey) -> str:
    """Have an app fork as fast as it can."""
    name, count = one_of(monkey.chance, NAMES), monkey.chance.randrange(20, 120)
    await monkey.jungle.apps[name].fork(count)
    return f"{name} {count}"


async def execute(monkey: Monkey) -> str:
    """Run a command by `tunsplit exec`."""
    jungle, name = monkey.jungle, one_of(monkey.chance, EXECUTED)
    words = ["--include"] if name == "executed-in" else []
    said = f"{name}--{jungle.ledger.epoch}--0--"
    command = [jungle.programs[name], "-I", "-S", "-c", ONCE, said, *map(str, TARGETS[name])]
    with trio.fail_after(PATIENCE_S):
        await jungle.lab.host.run([*COMMAND, "exec", *words, "--", *map(str, command)], env=jungle.environment)
    return name


async def restart_app(monkey: Monkey) -> str:
    """End an app and start it again."""
    name = one_of(monkey.chance, NAMES)
    await monkey.jungle.start_app(name)
    return name


async def suspend(monkey: Monkey) -> str:
    """Suspend tunsplit for a moment."""
    daemon = monkey.jungle.daemon
    assert daemon is not None
    os.kill(daemon.pid, signal.SIGSTOP)
    await trio.sleep(monkey.chance.uniform(0, 1))
    os.kill(daemon.pid, signal.SIGCONT)
    return ""


def _runs(jungle: Jungle) -> bool:
    return jungle.daemon is not None


def _rests(jungle: Jungle) -> bool:
    return jungle.daemon is None


OPERATIONS = {
    "app": Operation(12, switch, _runs),
    "on, off": Operation(4, toggle, _runs),
    "pid": Operation(8, by_hand, _runs),
    "reload": Operation(5, reload, _runs),
    "kill": Operation(3, kill, _runs),
    "stop": Operation(2, stop, _runs),
    "start": Operation(60, start, _rests),
    "false start": Operation(6, false_start, _rests),
    "tunnel away": Operation(6, tunnel, lambda jungle: jungle.host.tunnel_up),
    "tunnel back": Operation(25, tunnel, lambda jungle: not jungle.host.tunnel_up),
    "tunnel renumbered": Operation(4, renumber_tunnel, lambda jungle: jungle.host.tunnel_up),
    "uplink away": Operation(4, uplink, lambda jungle: jungle.host.uplink_up),
    "uplink back": Operation(25, uplink, lambda jungle: not jungle.host.uplink_up),
    "uplink renumbered": Operation(3, renumber_uplink, lambda jungle: jungle.host.uplink_up),
    "gateway": Operation(3, change_router, lambda jungle: jungle.host.uplink_up),
    "routes": Operation(3, push_routes, lambda _: True),
    "tampering": Operation(6, tamper, _runs),
    "tun away": Operation(3, take_tun, _runs),
    "fork storm": Operation(4, fork, _runs),
    "exec": Operation(5, execute, _runs),
    "app anew": Operation(4, restart_app, _runs),
    "suspended": Operation(2, suspend, _runs),
}


async def play(
    seconds: float, seed: int, *, tunnel_kind: Kind = "veth", tell: Callable[[str], None] = lambda _: None
) -> Monkey:
    """Let a monkey play for so long, or until something is wrong.

    Args:
        seconds: how long.
        seed: of what it draws.
        tunnel_kind: a veth pair has no time of its own; a VPN needs the uplink.
        tell: is given each step.
    """
    async with open_jungle(tunnel_kind) as jungle:
        monkey = Monkey(jungle, random.Random(seed))
        try:
            await monkey.settle()
            until = time.monotonic() + seconds
            while time.monotonic() < until and not monkey.failed:
                await monkey.step()
                tell(monkey.steps[-1])
            if not monkey.failed:
                await monkey.end()
        except Exception as error:
            error.add_note("\n".join((f"seed {seed}", *monkey.words(), *monkey.steps[-TOLD:])))
            raise
        return monkey


def main() -> None:
    """Play, and print."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() & 0xFFFF
    print(f"seed {seed}, {minutes:g} minutes, load {os.getloadavg()[0]:.1f}", flush=True)
    monkey = trio.run(lambda: play(minutes * 60, seed))
    print(*monkey.words(), sep="\n")
    sys.exit(monkey.failed)


if __name__ == "__main__":
    main()
