"""Whom this host forwards for: containers and virtual machines, on networks that are its own.

Theory of operation. A guest's packets come in by a device of the host's own making: a bridge whose ports are all
virtual, or one that the configuration names. A bridge with hardware among its ports is a network with neighbours on
it, as a side is: for them nothing is forwarded. Where a guest is, the addresses of the host's own bridge say alone;
routes do not count, since a guest can send some (router advertisements). A prefix that takes in the tunnel's, the
tun's or the relay's addresses is left out, and its guests reach nobody.

Their table says where answers go, and is the way back that reverse-path filters ask for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from tunsplit.engine.nftwords import can_hold
from tunsplit.host import FAMILIES, SCOPE_GLOBAL, SCOPE_LINK, Action, IPNetwork, Link, Route, Rule, Snapshot
from tunsplit.names import (
    PRIORITY_FORWARDED,
    PRIORITY_GUESTS,
    ROUTE_PROTOCOL,
    TABLE_FORWARDED,
    TABLE_GUESTS,
)

# IFLA_INFO_KIND of a bridge's ports behind which there is nobody but who runs on this host.
PORT_KINDS = frozenset({"dummy", "netkit", "tun", "veth"})
METRIC = 1


@dataclass(frozen=True, slots=True)
class Guests:
    """The devices that guests are behind, and their prefixes."""

    devices: tuple[str, ...] = ()
    prefixes: tuple[tuple[Link, IPNetwork], ...] = ()

    def routes(self) -> Iterator[Route]:
        """The guests' table: what is not in it goes on to the next rule."""
        for link, prefix in self.prefixes:
            scope = SCOPE_LINK if prefix.version == 4 else SCOPE_GLOBAL
            yield Route(prefix, TABLE_GUESTS, link.index, metric=METRIC, protocol=ROUTE_PROTOCOL, scope=scope)

    def near_rules(self, family: int) -> Iterator[Rule]:
        """What this host itself has for guests: the kernel's ICMP errors."""
        if self.devices:
            yield Rule(family, PRIORITY_GUESTS, iif="lo", table=TABLE_GUESTS, protocol=ROUTE_PROTOCOL)

    def forwarding_rules(self, family: int, *, tun: str, sides: Iterable[str]) -> Iterator[Rule]:
        """From guests into the tun of forwarded packets, and from there to guests; never from a side.

        Args:
            family: 4 or 6.
            tun: the tun of forwarded packets.
            sides: devices whose neighbours are not even told.
        """
        rule = Rule(family, PRIORITY_FORWARDED, protocol=ROUTE_PROTOCOL)
        for device in sides:
            yield replace(rule, iif=device, action=Action.BLACKHOLE)
        if self.devices:
            yield from (replace(rule, iif=device, table=TABLE_FORWARDED) for device in self.devices)
            yield replace(rule, iif=tun, table=TABLE_GUESTS)


def find_guests(
    snapshot: Snapshot,
    *,
    named: tuple[str, ...] | None,
    never: Iterable[str],
    not_theirs: Iterable[IPNetwork],
) -> Guests:
    """Find the guests. Behind a device with a name that no rule can hold there are none: they reach nobody.

    Args:
        snapshot: of the host.
        named: globs of device names; None: bridges are looked at.
        never: devices that nobody on them is a guest: the sides', and our own.
        not_theirs: prefixes that no guest may have.
    """
    taken, held = frozenset(never), tuple(not_theirs)
    found = [
        link
        for link in snapshot.links
        if not link.is_loopback
        and link.name not in taken
        and can_hold(link.name)
        and (_has_guests(link, snapshot, taken) if named is None else _is_named(link, named))
    ]
    prefixes = [
        (link, address.interface.network)
        for family in FAMILIES
        for link in found
        for address in snapshot.addresses_of(link)
        if address.family == family and address.is_global
    ]
    return Guests(
        devices=tuple(sorted(link.name for link in found)),
        prefixes=tuple(dict.fromkeys(one for one in prefixes if not _overlaps(one[1], held))),
    )


def _is_named(link: Link, named: Iterable[str]) -> bool:
    return any(fnmatchcase(link.name, one) for one in named)


def _has_guests(link: Link, snapshot: Snapshot, taken: frozenset[str]) -> bool:
    ports = [port for port in snapshot.links if port.master == link.index]
    return link.kind == "bridge" and all(port.kind in PORT_KINDS and port.name not in taken for port in ports)


def _overlaps(prefix: IPNetwork, held: Iterable[IPNetwork]) -> bool:
    return any(prefix.version == one.version and prefix.overlaps(one) for one in held)
