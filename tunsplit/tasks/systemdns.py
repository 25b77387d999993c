"""Finds the host's own resolvers, and follows them as files and networks change.

Theory of operation. Whoever names resolvers writes a file when they change: resolv.conf, the merged lists of
systemd-resolved and NetworkManager in /run, leases. So a look at the times of some files, once in a few seconds and
when the network changes, tells whether anything is to be read; a bus is asked only then. What comes of it is
engine/systemdns.py's.

Everything but resolv.conf, which apps read too, is about the network namespace that pid 1 is in: elsewhere it does not
count.
"""

import logging
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from tunsplit.engine.dnstable import is_private
from tunsplit.engine.systemdns import (
    CONFIGURED,
    Memory,
    Place,
    Places,
    Surroundings,
    SystemDns,
    choose,
    is_usable,
    without_scope,
)
from tunsplit.errors import KernelError
from tunsplit.host import FAMILIES, IPAddress, NamedServers, Neighbour
from tunsplit.kernel import leases, resolvconf, systembus
from tunsplit.kernel.descriptors import read_link
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.tasks.network import Network

POLL_S = 3.0
UNKNOWN_POLL_S = 0.1  # while the gateway of the network on which a resolver was learned is being asked for

RESOLV_CONF = "resolv.conf"
MERGED = {systembus.RESOLVED: "run/systemd/resolve/resolv.conf",
          systembus.NETWORK_MANAGER: "run/NetworkManager/no-stub-resolv.conf"}  # fmt: skip
MERGED_LIST = "merged list"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says; `system`: these and no others, or () to find them."""

    tunnel: str
    tunnel_dns: tuple[IPAddress, ...] = ()
    system: tuple[IPAddress, ...] = ()


class SystemDnsFinder:
    """Knows the host's own resolvers; `on_change` is called when there are others, or when they may be asked or not."""

    def __init__(self, settings: Settings, network: Network, rtnetlink: Rtnetlink, *, root: Path = Path("/")) -> None:
        """`root`: below which etc/resolv.conf and run/ are."""
        self._settings = settings
        self._network = network
        self._rtnetlink = rtnetlink
        self._root = root
        self._memory = Memory()
        self._configured = 0  # how many times
        self._seen: Hashable = None
        self._namespace = read_link("/proc/thread-self/ns/net")
        self._is_hosts = self._namespace is not None and self._namespace == read_link("/proc/1/ns/net")
        self._nap = trio.CancelScope()
        self._told: tuple[IPAddress, ...] = ()
        self.found = SystemDns()
        self.on_change: Callable[[], None] = lambda: None

    def addresses(self) -> tuple[IPAddress, ...]:
        """The resolvers that may be asked outside, on the network that the host is in now."""
        told = self.found.valid_on(self._look_around()[0])
        if told != self._told:
            # The next look is compared with what was said last, or it would not say what has changed since.
            self._told, self._seen = told, None
        return told

    def sources(self) -> dict[str, str]:
        """Every resolver that was found, and who names it."""
        return {str(server.address): server.source for server in self.found.servers}

    def configure(self, settings: Settings) -> None:
        """Go by other settings from now on; a private resolver that they name belongs to the network of this moment."""
        if settings.system != self._settings.system:
            self._configured += 1
        self._settings = settings
        if settings.system:  # nobody has to be asked: they are in force at once
            places, around = self._look_around()
            self._settle(self._configured_servers(around), {}, places)
        self.look_again()

    def look_again(self) -> None:
        """The network has changed."""
        self._nap.cancel()

    async def watch(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow changes until cancelled; started once the first look is done."""
        while True:
            with trio.CancelScope() as self._nap:
                await self.refresh()
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                await trio.sleep(POLL_S if self._knows_places() else UNKNOWN_POLL_S)

    async def refresh(self) -> None:
        """Look whether anything has changed; if so, read it and tell."""
        places, around = self._look_around()
        stamps = {source: self._stamp(source) for source in (RESOLV_CONF, *MERGED, *leases.FOLDERS)}
        seen = tuple(stamps.items()), around, tuple(places.items()), self._settings, self._configured
        if seen == self._seen:
            return
        if self._settings.system:
            chosen = self._configured_servers(around)
        else:
            named = await trio.to_thread.run_sync(self._read, abandon_on_cancel=True)
            chosen = choose(_scoped(named, around), around)
        self._seen = seen
        self._settle(chosen, stamps, places)

    def _configured_servers(self, around: Surroundings) -> tuple[tuple[IPAddress, str], ...]:
        wanted = without_scope(self._settings.system, {link.name for link in around.uplinks})
        return tuple((address, CONFIGURED) for address in wanted if is_usable(address, replace(around, tunnel_dns=())))

    def _settle(self, chosen: tuple[tuple[IPAddress, str], ...], stamps: dict[str, Hashable], places: Places) -> None:
        """Go by these from now on; tell, if they are others than before."""
        self.found = self._memory.place(chosen, lambda source: self._stamp_of(source, stamps), places)
        before = self._told
        self._told = self.found.valid_on(places)
        if self._told != before:
            logger.info("system DNS", extra={"servers": " ".join(map(str, self._told)) or "none",
                                             "source": ", ".join(dict.fromkeys(self.sources().values()))})  # fmt: skip
            self.on_change()

    def _knows_places(self) -> bool:
        """Whether every network on which a private resolver may be asked could be told from another."""
        places = [server.place for server in self.found.servers if is_private(server.address)]
        return all(place is None or place.gateway is None or place.mac is not None for place in places)

    def _look_around(self) -> tuple[Places, Surroundings]:
        network = self._network
        snapshot, sides = network.snapshot, network.sides
        tunnel = snapshot.link(self._settings.tunnel)
        prefixes = [one.interface.network for one in snapshot.addresses_of(tunnel)] if tunnel else []
        around = Surroundings(
            tuple(facts.link for facts in sides.uplinks),
            tunnel,
            self._settings.tunnel,
            self._settings.tunnel_dns,
            tuple(prefixes),
            frozenset(one.interface.ip for one in snapshot.addresses),
        )
        return {version: self._place(version) for version in FAMILIES}, around

    def _place(self, version: int) -> Place | None:
        facts = self._network.sides.uplink(version)
        if facts is None:
            return None
        gateway = facts.gateway(version)
        return Place(facts.link.name, gateway, self._mac(facts.link.index, gateway) if gateway is not None else None)

    def _mac(self, index: int, gateway: IPAddress) -> bytes | None:
        try:
            known: list[Neighbour] = [one for one in self._rtnetlink.neighbours(index) if one.address == gateway]
            if any(one.usable for one in known):
                return next(one.mac for one in known if one.usable)
            if any(server.place is not None for server in self.found.servers):
                self._rtnetlink.neighbour_use(index, gateway)
        except KernelError as error:  # the device is going away
            logger.debug("the gateway cannot be asked for", extra={"error": str(error)})
        return None

    # What sources say

    def _read(self) -> list[NamedServers]:
        """All that is named, the source to be believed first at the head. In a thread: it may take a second."""
        named = [NamedServers(RESOLV_CONF, resolvconf.read(self._root / "etc/resolv.conf").servers)]
        if self._is_hosts:
            named += systembus.ask_resolved(self._namespace) if (self._root / "run/systemd/resolve").is_dir() else []
            named += (
                systembus.ask_networkmanager(self._namespace) if (self._root / "run/NetworkManager").is_dir() else []
            )
            named += leases.read_records(self._root)
            named += leases.read_leases(self._root)
            named += [NamedServers(f"{MERGED_LIST} of {source}", resolvconf.read(self._root / path).servers)
                      for source, path in MERGED.items()]  # fmt: skip
        return named

    def _stamp(self, source: str) -> Hashable:
        path = "etc/resolv.conf" if source == RESOLV_CONF else MERGED.get(source, source)
        try:
            with os.scandir(self._root / path) as entries:
                return tuple(
                    sorted((entry.name, entry.stat().st_mtime_ns) for entry in entries if _counts(source, entry.name))
                )
        except NotADirectoryError:
            pass
        except OSError:
            return None
        try:
            status = (self._root / path).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _stamp_of(self, source: str, stamps: dict[str, Hashable]) -> Hashable:
        """When what a source says was written last."""
        if source == CONFIGURED:
            return self._configured
        if source in stamps:
            return stamps[source]
        merged = source.removeprefix(f"{MERGED_LIST} of ")
        return stamps.get(merged, tuple(stamps[folder] for folder in leases.FOLDERS))


def _counts(folder: str, name: str) -> bool:
    """Whether a file is about resolvers: NetworkManager's folder has others, which change often."""
    return folder not in leases.DHCLIENT or name.startswith("dhclient")


def _scoped(named: list[NamedServers], around: Surroundings) -> list[NamedServers]:
    """Of link-local servers only the uplink's; those of the tunnel stay, so that they are known as such."""
    devices = {link.name for link in around.uplinks}
    return [replace(one, addresses=without_scope(one.addresses, devices)) for one in named]
