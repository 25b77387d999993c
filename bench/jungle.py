"""What the monkey plays with: a lab, a tunsplit that comes and goes, apps that never rest, and how things are to be."""

import math
import random
import subprocess
import time
from collections.abc import AsyncGenerator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import trio

from bench.ledger import Epoch, Ledger
from bench.traffic import KINDS, QUESTIONS, App, Attempt, traffic
from tunsplit.lab import Lab, addresses, open_lab, servers
from tunsplit.lab.addresses import PUBLIC_RESOLVER, ROUTER_LAN, TUNNEL_DEVICE, Interface
from tunsplit.lab.daemon import COMMAND, make_environment
from tunsplit.lab.netns import Namespace
from tunsplit.lab.programs import Program, background
from tunsplit.lab.wireguard import Kind

PATIENCE_S = 40.0  # a command's, and traffic's until it flows again
STUCK_S = 15.0
KNOWN_S = 3.0  # after which an app's birth is in the file that survives SIGKILL; one that is not was missed (L29)
NAMES = ("ape", "baboon", "colobus", "drill")
EXECUTED = {"executed-out": "uplink", "executed-in": "tunnel"}  # by `tunsplit exec`
TARGETS = {
    name: [server.network[number] for server in addresses.SERVER.values()]
    for number, name in enumerate((*NAMES, *EXECUTED), start=90)
}
OTHER_HOST = {4: ip_interface("192.168.50.77/24"), 6: ip_interface("2001:db8:50::77/64")}
OTHER_ROUTER = {4: ip_interface("192.168.50.201/24"), 6: ip_interface("2001:db8:50::201/64")}
OTHER_TUNNEL = {4: ip_interface("10.64.0.77/32"), 6: ip_interface("fd64::77/128")}
UNCONNECTED = {f"unconnected IPv{version}" for version in (4, 6)}  # kinds of traffic
NODAD = {4: "", 6: " nodad"}  # usable at once


@dataclass
class Host:
    """How the host is set up at the moment; changes are made by `Jungle`."""

    tunnel_exists: bool = True
    tunnel_up: bool = True
    uplink_up: bool = True
    tunnel: dict[int, Interface] = field(default_factory=lambda: dict(addresses.HOST_TUNNEL))
    uplink: dict[int, Interface] = field(default_factory=lambda: dict(addresses.HOST))
    routers: dict[int, Interface] = field(default_factory=lambda: dict(ROUTER_LAN))


@dataclass
class Splitting:
    """What tunsplit was told.

    Attributes:
        saved: apps in the file.
        listed: apps on the list.
        marked: apps that are excluded by hand.
    """

    saved: set[str]
    listed: set[str]
    marked: set[str] = field(default_factory=set)
    enabled: bool = True
    mode: str = "exclude"

    def side(self, name: str) -> str:
        """Where an app is to be."""
        if not self.enabled:
            return "tunnel"
        if name in EXECUTED:
            return EXECUTED[name]
        if name in self.marked:
            return "uplink"
        return "uplink" if (name in self.listed) == (self.mode == "exclude") else "tunnel"


class Jungle:
    """The lab, with all that lives in it.

    Attributes:
        lab: the network.
        host: how it is set up.
        splitting: what tunsplit was told.
        apps: those that run.
        daemon: the tunsplit that runs, or none.
        ledger: judges what passes.
        flowing_since: by app, from when on its side has been there (`time.monotonic`); infinite while it is not.
        complaints: lines of daemons' logs that tell of a mistake.
    """

    def __init__(self, lab: Lab, nursery: trio.Nursery) -> None:
        self.lab = lab
        self.host = Host()
        self.splitting = Splitting({"ape"}, {"ape"})
        self.programs = {name: lab.copy_program("python", name) for name in (*NAMES, *EXECUTED)}
        self.apps: dict[str, App] = {}
        self.daemon: Program | None = None
        self.complaints: list[str] = []
        self._nursery = nursery
        self._epochs = lab.directory / "epoch"
        self.ledger = Ledger(lab, self._epochs, TARGETS, self._epoch())
        self._options: dict[str, dict[str, Any]] = {}
        self.flowing_since = dict.fromkeys(NAMES, math.inf)
        self._born = -math.inf  # the youngest app
        self.file, socket = lab.write_config(self._config())
        self.environment = make_environment(self.file, socket)

    # How things are to be

    def _epoch(self) -> Epoch:
        host = self.host
        return Epoch(
            {name: self.splitting.side(name) for name in TARGETS},
            {
                "tunnel": frozenset(one.ip for one in host.tunnel.values()),
                "uplink": frozenset(one.ip for one in host.uplink.values()),
            },
        )

    def has_changed(self) -> None:
        """What was told, or how the host is set up, is now in force."""
        self.ledger.begin(self._epoch())
        now, flowing = time.monotonic(), self.flowing()
        for name, since in self.flowing_since.items():
            self.flowing_since[name] = min(since, now) if name in flowing else math.inf

    def flowing(self) -> list[str]:
        """The apps that ought to get answers."""
        if self.daemon is None:
            return []
        host = self.host
        ways = {
            "uplink": host.uplink_up,
            "tunnel": host.tunnel_up and (host.uplink_up or self.lab.tunnel_kind == "veth"),
        }
        return [name for name in self.apps if ways[self.splitting.side(name)]]

    # tunsplit

    def _config(self) -> str:
        sections: dict[str, dict[str, Any]] = {
            "firewall": {"on_stop": "block"},
            # A public one: a private resolver is not asked by another gateway than when it was learned.
            "dns": {"platform": "per-app", "system": [str(PUBLIC_RESOLVER[4])]},
            "split": {"mode": self.splitting.mode},
        }
        for name, section in self._options.items():
            sections[name] = {**sections.get(name, {}), **section}
        return self.lab.config([self.programs[name] for name in sorted(self.splitting.saved)], **sections)

    async def start(self) -> None:
        """Start tunsplit; what was said at run time and not saved is forgotten, but for what was said by hand."""
        self.splitting.listed = set(self.splitting.saved)
        self.splitting.enabled = True
        # From its first moment on what it was told before holds no more.
        self.has_changed()
        self.daemon = await self.spawn([*COMMAND, "run", "-c", self.file])
        with trio.fail_after(PATIENCE_S):
            await self.daemon.wait_written("ready\n")

    async def end(self, *, kill: bool) -> None:
        """End tunsplit, which leaves the way closed."""
        assert self.daemon is not None
        daemon, self.daemon = self.daemon, None
        if kill:
            await trio.sleep_until(self._born + KNOWN_S)
            daemon.process.kill()
        else:
            daemon.process.terminate()
        with trio.fail_after(PATIENCE_S):
            code = await daemon.process.wait()
        if not kill and code:
            self.complaints.append(f"exit code {code} on SIGTERM")
        self.complaints += [
            line for line in daemon.log.splitlines() if " error " in line or "Traceback" in line or " critical " in line
        ]

    async def tell(self, *words: str) -> None:
        """Run a verb of tunsplit."""
        with trio.fail_after(PATIENCE_S):
            await self.lab.host.run([*COMMAND, *words], env=self.environment)

    async def reload(self, options: dict[str, dict[str, Any]]) -> None:
        """Give it another configuration."""
        self._options = options
        self.splitting.listed |= self.splitting.saved
        self.file.write_text(self._config())
        await self.tell("reload")

    def usage(self) -> tuple[int, int]:
        """How much memory the daemon has, in KiB, and how many descriptors."""
        assert self.daemon is not None
        process = Path("/proc", str(self.daemon.pid))
        (line,) = [one for one in (process / "status").read_text().splitlines() if one.startswith("VmRSS")]
        return int(line.split()[1]), len(list((process / "fd").iterdir()))

    # Apps

    async def start_app(self, name: str) -> None:
        """Start an app, or start it again as another process."""
        if name in self.apps:
            process = self.apps.pop(name).program.process
            process.kill()
            await process.wait()
            self.ledger.has_ended(name)
        self.splitting.marked.discard(name)
        command = traffic(
            self.programs[name], name, STUCK_S, TARGETS[name], epochs=self._epochs, resolvers=PUBLIC_RESOLVER.values()
        )
        self.apps[name] = App(name, await self.spawn(command))
        self._born = trio.current_time()

    def take_stuck(self, name: str) -> list[Attempt]:
        """An app's attempts that neither succeeded nor failed in time, once each.

        Of a side that is away an unconnected socket hears nothing (ip(7), IP_RECVERR).
        """
        attempts, self.apps[name].attempts = self.apps[name].attempts, []
        since = self.flowing_since[name]
        return [
            one
            for one in attempts
            if one.error == "stuck" and not (one.kind in UNCONNECTED and one.ended - one.took_s < since)
        ]

    async def wait_flowing(self, names: Collection[str]) -> list[str]:
        """Wait until all kinds of traffic of these apps flow; which ones never did."""
        since = time.monotonic()
        missing = {name: {*KINDS, *QUESTIONS} for name in names}
        with trio.move_on_after(PATIENCE_S):
            while any(missing.values()):
                for name in names:
                    missing[name] -= {
                        one.kind
                        for one in await self.apps[name].ask()
                        if one.ended - one.took_s > since and not one.error
                    }
                await trio.sleep(0.05)
        return [f"{name}: {kind}" for name, kinds in missing.items() for kind in sorted(kinds)]

    async def spawn(self, argv: list[Any]) -> Program:
        """Run a program in the host until it ends, or the jungle does."""
        program: Program = await self._nursery.start(_run, self.lab.host, argv, self.environment)
        return program

    # The host

    def set_uplink(self, *, up: bool) -> None:
        """Take the uplink away, or bring it back with its addresses and routes."""
        self.lab.host.ip(f"link set eth0 {'up' if up else 'down'}")
        self.host.uplink_up = up
        if up:
            self._address_uplink()

    def renumber_uplink(self) -> None:
        """Give the uplink its other addresses."""
        for version, old in self.host.uplink.items():
            new = OTHER_HOST[version] if old == addresses.HOST[version] else addresses.HOST[version]
            self.lab.host.ip(f"address delete {old} dev eth0")
            self.host.uplink = {**self.host.uplink, version: new}
        self._address_uplink()

    def change_router(self) -> None:
        """Have the uplink's default routes lead to the router's other addresses."""
        own = self.host.routers
        self.host.routers = {
            version: OTHER_ROUTER[version] if one == ROUTER_LAN[version] else ROUTER_LAN[version]
            for version, one in own.items()
        }
        self._address_uplink()

    def _address_uplink(self) -> None:
        own = "".join(f"address replace {one} dev eth0{NODAD[one.version]}\n" for one in self.host.uplink.values())
        routes = "".join(f"route replace default via {one.ip} dev eth0\n" for one in self.host.routers.values())
        self.lab.host.ip(own + routes)

    async def set_tunnel(self, *, up: bool) -> None:
        """Set the tunnel down, or up again with its first addresses."""
        if up:
            self.lab.tunnel_up()
            await self._forget_tunnel_addresses()
        else:
            self.lab.tunnel_down()
        self.host.tunnel_up = up

    async def remove_tunnel(self, *, crash: bool) -> None:
        """Remove the tunnel's device."""
        await (self.lab.kill_tunnel() if crash else self.lab.remove_tunnel())
        self.host.tunnel_exists = self.host.tunnel_up = False

    async def create_tunnel(self) -> None:
        """Make it anew."""
        await self.lab.create_tunnel()
        self.host.tunnel_exists = self.host.tunnel_up = True
        self.host.tunnel = dict(addresses.HOST_TUNNEL)

    def renumber_tunnel(self, versions: Iterable[int]) -> None:
        """Give the tunnel its other addresses."""
        for version in versions:
            old, first = self.host.tunnel[version], addresses.HOST_TUNNEL[version]
            new = OTHER_TUNNEL[version] if old == first else first
            self.lab.host.ip(
                f"address delete {old} dev {TUNNEL_DEVICE}\naddress add {new} dev {TUNNEL_DEVICE}{NODAD[version]}"
            )
            self.host.tunnel = {**self.host.tunnel, version: new}

    async def _forget_tunnel_addresses(self) -> None:
        for version, own in OTHER_TUNNEL.items():
            if self.host.tunnel[version] == own:
                await self.lab.host.run(["ip", "address", "delete", str(own), "dev", TUNNEL_DEVICE], check=False)
        self.host.tunnel = dict(addresses.HOST_TUNNEL)


async def _run(
    namespace: Namespace, argv: list[Any], environment: dict[str, str], task_status: trio.TaskStatus[Program]
) -> None:
    async with namespace.start(argv, env=environment, stdin=subprocess.PIPE) as program:
        task_status.started(program)
        await program.process.wait()


@asynccontextmanager
async def open_jungle(tunnel_kind: Kind) -> AsyncGenerator[Jungle]:
    """Build all of it; entered once tunsplit and the apps run."""
    async with open_lab(tunnel_kind=tunnel_kind) as lab, background() as nursery:
        own = [target for targets in TARGETS.values() for target in targets]
        lab.internet.ip("".join(f"address add {one} dev eth0{NODAD[one.version]}\n" for one in own))
        lab.router.ip("".join(f"address add {one} dev lan0{NODAD[version]}\n" for version, one in OTHER_ROUTER.items()))
        servers.serve(lab.internet, own, nursery)
        jungle = Jungle(lab, nursery)
        try:
            await jungle.start()
            for name in NAMES:
                await jungle.start_app(name)
            yield jungle
        finally:
            jungle.ledger.close()


def one_of(chance: random.Random, names: Iterable[str]) -> str:
    """One by lot, the same for the same seed."""
    return chance.choice(sorted(names))
