"""What the local network is, and the routes that lead to it beside the tunnel.

Theory of operation. Local are the on-link prefixes of the uplink's own addresses, as far as they lie within the
private ranges, minus what belongs to the tunnel, to the tun, or is the VPN's relay. Routes count neither for nor
against: anybody on the network, or the VPN's server, can send some. Routes by a gateway are honoured when they are
listed, and only by the gateway that the uplink's own routes name.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network

from tunsplit.engine.sides import Sides
from tunsplit.host import (
    FAMILIES,
    SCOPE_GLOBAL,
    SCOPE_LINK,
    TABLE_MAIN,
    IPAddress,
    IPNetwork,
    Link,
    Route,
    RouteType,
    Snapshot,
)
from tunsplit.names import ROUTE_PROTOCOL, TABLE_LAN

PRIVATE = tuple(
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7", "fe80::/10")
)
LINK_LOCAL = IPv6Network("fe80::/64")
# Multicast of link-local and administrative scope (RFC 2365), and limited broadcast. IPv6 multicast leaves by the
# kernel's own table before any rule.
GROUPS = (IPv4Network("224.0.0.0/24"), IPv4Network("239.0.0.0/8"), IPv4Network("255.255.255.255/32"))

HOLE_METRIC, METRIC = 1, 2  # a hole as large as a prefix wins


@dataclass(frozen=True, slots=True)
class Lan:
    """The local network."""

    prefixes: tuple[tuple[Link, IPNetwork], ...] = ()  # with the device that each is on-link at
    gatewayed: tuple[tuple[Link, IPAddress, IPNetwork], ...] = ()  # device, gateway, prefix
    holes: tuple[IPNetwork, ...] = ()  # what lies within and is not local

    @property
    def networks(self) -> tuple[IPNetwork, ...]:
        """All prefixes, once."""
        return tuple(dict.fromkeys([*(one for _, one in self.prefixes), *(one for *_, one in self.gatewayed)]))

    def routes(self) -> Iterator[Route]:
        """The local network's table."""
        for link, prefix in self.prefixes:
            yield _on_link(prefix, link)
        for link in dict.fromkeys(link for link, prefix in self.prefixes if prefix.version == 4):
            for group in GROUPS:
                yield _on_link(group, link)
        for link, gateway, prefix in self.gatewayed:
            # The gateway was found on-link once, when its route came into main.
            yield Route(prefix, TABLE_LAN, link.index, gateway, METRIC, protocol=ROUTE_PROTOCOL, onlink=True)
        for hole in self.holes:
            # Throw: on to the next rule.
            yield Route(hole, TABLE_LAN, metric=HOLE_METRIC, type=RouteType.THROW, protocol=ROUTE_PROTOCOL)


def find_lan(snapshot: Snapshot, sides: Sides, *, not_local: Iterable[IPNetwork], listed: Iterable[IPNetwork]) -> Lan:
    """Find the local network.

    Args:
        not_local: the tun's prefixes, the tunnel's resolvers, the VPN's relays. The tunnel's own are added.
        listed: gatewayed prefixes to honour.
    """
    holes = list(not_local)
    if sides.tunnel:
        holes += [address.network for address in sides.tunnel.addresses]
    prefixes: list[tuple[Link, IPNetwork]] = []
    for family in FAMILIES:
        if uplink := sides.uplink(family):
            own = [address.network for address in uplink.addresses if address.version == family]
            local = [one for one in own if within(one, PRIVATE) and not within(one, holes)]
            prefixes += [(uplink.link, one) for one in local]
            if family == 6:
                prefixes.append((uplink.link, LINK_LOCAL))
    gatewayed = tuple(_gatewayed(snapshot, sides, listed))
    networks = [*(one for _, one in prefixes), *(one for *_, one in gatewayed)]
    return Lan(
        prefixes=tuple(dict.fromkeys(prefixes)),
        gatewayed=gatewayed,
        holes=tuple(dict.fromkeys(hole for hole in holes if within(hole, networks))),
    )


def _gatewayed(
    snapshot: Snapshot, sides: Sides, listed: Iterable[IPNetwork]
) -> Iterator[tuple[Link, IPAddress, IPNetwork]]:
    """The listed prefixes that the uplink's own routes, the default apart, lead to by a gateway."""
    for wanted in listed:
        uplink = sides.uplink(wanted.version)
        if uplink is None:
            continue
        leading = [
            route
            for route in snapshot.routes_of(TABLE_MAIN)
            if route.oif == uplink.link.index and not route.is_default and within(wanted, [route.destination])
        ]
        best = max(leading, key=lambda route: (route.destination.prefixlen, -route.metric), default=None)
        if best is not None and best.gateway is not None:
            yield uplink.link, best.gateway, wanted


def within(network: IPNetwork, ranges: Iterable[IPNetwork]) -> bool:
    """Whether the prefix lies wholly in one of the ranges."""
    if isinstance(network, IPv4Network):
        return any(isinstance(one, IPv4Network) and network.subnet_of(one) for one in ranges)
    return any(isinstance(one, IPv6Network) and network.subnet_of(one) for one in ranges)


def _on_link(destination: IPNetwork, link: Link) -> Route:
    scope = SCOPE_LINK if destination.version == 4 else SCOPE_GLOBAL
    return Route(destination, TABLE_LAN, link.index, metric=METRIC, protocol=ROUTE_PROTOCOL, scope=scope)
