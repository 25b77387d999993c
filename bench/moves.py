"""Does anything leak or get stuck when the uplink moves, again and again, faster than it can be followed?

An excluded and an included app never stop, as in bench.flaps: a TCP stream, connected datagrams, new connections,
pings, IPv4 and IPv6. The uplink gets other addresses, another gateway, none for a moment, another Ethernet address,
goes down and up; a second card has a better default route, or a worse one, or none; routes and addresses of no concern
come and go. Several of these follow each other without a pause.
Prints leaks on all three wires; streams of the included app that ended, which moves of the uplink are not to cause;
attempts of either app without an answer or an error in STUCK_S; and how soon excluded apps flow again.
The tunnel is a veth pair: its transport needs no uplink. Needs root: python -m bench.moves [ROUNDS [SEED]]
"""

import random
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from bench import flaps
from bench.arguments import whole_numbers
from bench.traffic import KINDS, Attempt
from tunsplit.lab import Lab, addresses, open_lab
from tunsplit.lab.observer import Observer

STUCK_S = 2.0
PATIENCE_S = 20.0
MOST_MOVES = 4  # at a time
PAUSE_S = 0.2  # at most, and as often none
METRIC, BETTER, WORSE = 100, 50, 200
DEFAULT = {4: "default", 6: "::/0"}
ROUTER = {version: interface.ip for version, interface in addresses.ROUTER_LAN.items()}
SECOND = {4: ("192.168.60.2/24", "192.168.60.1/24"), 6: ("fd60::2/64", "fd60::1/64")}  # the host's, the router's


def gateway(chance: random.Random) -> str:
    """One of the two gateways of the first card; they are one machine."""
    number = chance.choice((1, 9))
    return "".join(
        f"route replace {DEFAULT[version]} via {router + number - 1} dev eth0 metric {METRIC}\n"
        for version, router in ROUTER.items()
    )


def no_gateway(_: random.Random) -> str:
    """No default route by the first card."""
    return "".join(f"route flush exact {DEFAULT[version]} metric {METRIC}\n" for version in (4, 6))


def renumber(chance: random.Random) -> str:
    """Other addresses; the old ones go first, and the routes with them."""
    own = {version: interface.ip + chance.randrange(3) for version, interface in addresses.HOST.items()}
    lengths = {version: interface.network.prefixlen for version, interface in addresses.HOST.items()}
    add = (f"address add {address}/{lengths[version]} dev eth0\n" for version, address in own.items())
    return "address flush dev eth0 scope global\n" + "".join(add) + gateway(chance)


def down_and_up(chance: random.Random) -> str:
    """The first card, which loses its addresses of IPv6 by that."""
    return "link set eth0 down\nlink set eth0 up\n" + renumber(chance)


def second_card(chance: random.Random) -> str:
    """Default routes by the second card, better or worse than those by the first."""
    metric = chance.choice((BETTER, WORSE))
    return "".join(
        f"route replace {DEFAULT[version]} via {router.partition('/')[0]} dev eth1 metric {metric}\n"
        for version, (_, router) in SECOND.items()
    )


def no_second_card(_: random.Random) -> str:
    """None by the second card."""
    return "".join(
        f"route flush exact {DEFAULT[version]} metric {metric}\n" for version in (4, 6) for metric in (BETTER, WORSE)
    )


def ethernet_address(chance: random.Random) -> str:
    """Another one of the first card, which says so to its neighbours."""
    return f"link set eth0 address 02:00:00:00:07:{chance.randrange(256):02x}\n"


def noise(_: random.Random) -> str:
    """Addresses and routes that concern nobody."""
    numbers = range(100, 110)
    come = (
        f"address add 192.168.50.{n}/24 dev eth0\nroute add 10.77.{n}.0/24 via {ROUTER[4]} dev lo onlink\n"
        for n in numbers
    )
    go = (f"address delete 192.168.50.{n}/24 dev eth0\nroute flush 10.77.{n}.0/24\n" for n in numbers)
    return "".join((*come, *go))


MOVES = (gateway, no_gateway, renumber, down_and_up, second_card, no_second_card, ethernet_address, noise)


@dataclass
class Seen:
    """What was seen so far."""

    rounds: int = 0
    moves: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)  # by app and wire
    leaks: Counter[str] = field(default_factory=Counter)  # frames, by app
    stuck: Counter[str] = field(default_factory=Counter)  # attempts, by app
    ended: list[Attempt] = field(default_factory=list)  # streams of the included app
    returns_s: list[float] = field(default_factory=list)  # until all that excluded apps do works again


class Stage:
    """A lab in which tunsplit runs, both apps with their traffic, and a host with two cards."""

    def __init__(self, stage: flaps.Stage, second: Observer) -> None:
        self._apps = stage.apps
        self._lab = stage.lab
        self._wires = {"uplink": stage.lab.uplink, "second uplink": second, "tunnel": stage.lab.tunnel}
        self.seen = Seen()

    async def move(self, chance: random.Random) -> None:
        """Move the uplink a few times, and wait until all kinds of an excluded app's traffic flow again."""
        for _ in range(chance.randrange(1, MOST_MOVES + 1)):
            move = chance.choice(MOVES)
            self.seen.moves[move.__name__] += 1
            self._lab.host.ip(move(chance))
            if chance.random() < 0.5:
                await trio.sleep(chance.uniform(0, PAUSE_S))
        self._lab.host.ip(gateway(chance))
        await self._wait_back(time.monotonic())
        await self._look()
        self.seen.rounds += 1

    async def _wait_back(self, since: float) -> None:
        missing = set(KINDS)
        with trio.fail_after(PATIENCE_S):
            while missing:
                await trio.sleep(0.02)
                new = [one for one in await self._apps["excluded"].ask() if one.ended > since and not one.error]
                missing -= {one.kind for one in new}
        self.seen.returns_s.append(time.monotonic() - since)

    async def _look(self) -> None:
        await self._apps["included"].ask()
        for wire, observer in self._wires.items():
            await observer.settle()
            assert observer.dropped == 0
            for name, side in flaps.SIDE.items():
                frames = flaps.frames_of(observer, name)
                self.seen.frames[f"{name} on the {wire}"] += frames
                self.seen.leaks[name] += frames if side not in wire else 0
            observer.clear()
        for name, app in self._apps.items():
            self.seen.stuck[name] += sum(one.error == "stuck" for one in app.attempts)
            # A new connection may be refused under load, when its owner is not found in time; an open one may not end.
            streams = [one for one in app.attempts if one.kind.startswith("stream") and one.error]
            self.seen.ended += streams if name == "included" else []
            app.attempts.clear()


@asynccontextmanager
async def open_stage(lab: Lab, stuck_s: float = STUCK_S) -> AsyncGenerator[Stage]:
    """Give the host a second card and the router a second address; run tunsplit, and both apps."""
    lab.router.ip(
        "link add lan1 type veth peer name eth1 netns " + lab.host.name + "\nlink set lan1 up\n"
        + "".join(f"address add {router} dev lan1\n" for _, router in SECOND.values())
        + "".join(f"address add {router + 8} dev lan0\n" for router in ROUTER.values())
    )  # fmt: skip
    lab.host.ip("link set eth1 up\n" + "".join(f"address add {own} dev eth1\n" for own, _ in SECOND.values()))
    lab.host.sysctl({"net/ipv4/conf/eth0/arp_notify": 1, "net/ipv6/conf/eth0/ndisc_notify": 1})
    lab.host.ip("route flush exact default\nroute flush exact ::/0 table main\n" + gateway(random.Random(0)))
    async with (
        lab.observe(lab.router, "lan1", find_sender=lambda: (lab.host, "eth1")) as second,
        flaps.open_stage(lab, stuck_s) as stage,
    ):
        yield Stage(stage, second)


async def run(rounds: int, seed: int) -> Seen:
    """So many rounds."""
    chance = random.Random(seed)
    async with open_lab(tunnel_kind="veth") as lab, open_stage(lab) as stage:
        for _ in range(rounds):
            await stage.move(chance)
        return stage.seen


def show(seen: Seen) -> None:
    """Print the figures."""
    print(f"{seen.rounds} rounds of {seen.moves.total()} moves: {dict(seen.moves)}")
    print(f"frames: {dict(seen.frames)}")
    errors = Counter(f"{one.kind} {one.error}" for one in seen.ended)
    print(
        f"leaks: {dict(seen.leaks)}  stuck: {dict(seen.stuck)}  included apps' streams that ended: {dict(errors) or 0}"
    )
    ms = sorted(one * 1000 for one in seen.returns_s)
    print(f"until excluded apps flow again, ms: median {ms[len(ms) // 2]:.0f}, max {ms[-1]:.0f}")


if __name__ == "__main__":
    show(trio.run(partial(run, *whole_numbers(200, 1))))
