"""Which device each side is, and which addresses the tun may have: read from a snapshot of the host.

Theory of operation. A side is a device; it is *up for a family* while the device is up and has a settled address of
that family with global scope (a link-local one reaches nobody). The tunnel's device is named, and needs a carrier. The
uplink's device may be found: per family, where main's best default route leads. main is attacker's input, so all that
it can do here is to choose among the devices that lead out of this host: its cards, and what is made of them (bond,
bridge, VLAN). Tunnels and what leads to virtual machines and containers never count. In a container, or a test network,
no device is a card; there all count but tunnels and bridges. Without a default route (the uplink is offline) it is the
one that it was, while that has an address.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_interface

from tunsplit.host import FAMILIES, TABLE_MAIN, IPAddress, IPInterface, Link, Route, RouteType, Snapshot

AUTO = "auto"
SMALLEST_MTU = 1280  # RFC 8200 §5; below it the kernel takes IPv6 from a device and does not bring it back
USUAL_MTU = 1500
FURTHER = 4  # after the tun's own address comes that of who signs our errors

# IFLA_INFO_KIND of what carries packets inside other packets, or nowhere: never an uplink unless it is named.
TUNNEL_KINDS = frozenset(
    {
        "amt", "bareudp", "dummy", "erspan", "fou", "geneve", "gre", "gretap", "gtp", "ifb", "ip6erspan", "ip6gre",
        "ip6gretap", "ip6tnl", "ipip", "ipvti", "netkit", "nlmon", "ovpn", "ovpn-dco", "ppp", "sit", "tun", "vcan",
        "vti", "vti6", "vxlan", "wireguard", "amneziawg", "xfrm",
    }
)  # fmt: skip
# Hardware without Ethernet headers that may be an uplink: raw-IP modems.
BARE_KINDS = frozenset({"", "wwan"})
BRIDGE, VLAN = "bridge", "vlan"


@dataclass(frozen=True, slots=True)
class SideFacts:
    """A side's device as it is now."""

    link: Link
    addresses: tuple[IPInterface, ...] = ()  # settled, global scope, of both families, the preferred ones first
    gateway4: IPAddress | None = None  # of the default route; None: the device has none, or needs none
    gateway6: IPAddress | None = None

    @property
    def mtu(self) -> int:
        """The device's MTU."""
        return self.link.mtu

    def has(self, family: int) -> bool:
        """Whether it is up for the family, 4 or 6."""
        return any(address.version == family for address in self.addresses)

    def gateway(self, family: int) -> IPAddress | None:
        """The family's gateway."""
        return self.gateway4 if family == 4 else self.gateway6


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides; None where there is no such device, or it is down. The uplink may differ by family."""

    uplink4: SideFacts | None = None
    uplink6: SideFacts | None = None
    tunnel: SideFacts | None = None

    def is_uplink(self, link: Link, family: int) -> bool:
        """Whether the device is the family's uplink here, up for it or not."""
        facts = self.uplink4 if family == 4 else self.uplink6
        return facts is not None and facts.link.index == link.index

    def uplink(self, family: int) -> SideFacts | None:
        """The family's uplink, if it is up for it."""
        facts = self.uplink4 if family == 4 else self.uplink6
        return facts if facts and facts.has(family) else None

    def tunnel_of(self, family: int) -> SideFacts | None:
        """The tunnel, if it is up for the family."""
        return self.tunnel if self.tunnel and self.tunnel.has(family) else None

    def latest_of_tunnel(self, before: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
        """The tunnel's addresses, and of a family that it lacks just now those of `before`: they come one by one."""
        own = [interface.ip for interface in self.tunnel.addresses] if self.tunnel else []
        there = {address.version for address in own}
        return (*own, *(address for address in before if address.version not in there))

    def tunnel_now_or_before(self, snapshot: Snapshot, name: str, before: Iterable[IPAddress]) -> list[IPAddress]:
        """The addresses of the tunnel of this name, and those of `before` that nobody else has by now."""
        own = [interface.ip for interface in self.tunnel.addresses] if self.tunnel else []
        device = snapshot.link(name)
        taken = {one.interface.ip for one in snapshot.addresses if device is None or one.index != device.index}
        return sorted({*own, *(set(before) - taken)}, key=lambda one: (one.version, one))

    @property
    def uplinks(self) -> tuple[SideFacts, ...]:
        """Every uplink device, once."""
        found = {facts.link.index: facts for facts in (self.uplink4, self.uplink6) if facts}
        return tuple(found.values())

    def addresses(self, side: str) -> tuple[IPInterface, ...]:
        """All addresses of a side, "uplink" or "tunnel"."""
        devices = self.uplinks if side == "uplink" else (self.tunnel,) if self.tunnel else ()
        return tuple(address for facts in devices for address in facts.addresses)

    @property
    def families(self) -> tuple[int, ...]:
        """The families that the tun is to have: those that a side has."""
        return tuple(family for family in FAMILIES if self.uplink(family) or self.tunnel_of(family))

    @property
    def mtu(self) -> int:
        """The tun's MTU: the smallest of the sides', never under 1280."""
        mtus = [facts.mtu for facts in (*self.uplinks, self.tunnel) if facts]
        return max(min(mtus, default=USUAL_MTU), SMALLEST_MTU)


NONE = Sides()


def find_sides(snapshot: Snapshot, *, tunnel: str, uplink: str, tun: str, before: Sides = NONE) -> Sides:
    """Find both sides.

    Args:
        tunnel: the tunnel's device; it may be absent.
        uplink: the uplink's device, or "auto".
        tun: our own capture device, which is never a side.
        before: the sides as they were; between two uplinks that are as good, the old one stays.
    """
    tunnel_link = snapshot.link(tunnel)
    if tunnel_link is not None and not tunnel_link.carrier:
        # Nobody holds its other end: a persistent tun while its client is away (drivers/net/tun.c, tun_detach).
        tunnel_link = None
    if uplink != AUTO:
        facts = _facts(snapshot, snapshot.link(uplink))
        return Sides(facts, facts, _facts(snapshot, tunnel_link))
    candidates = {link.index: link for link in _candidates(snapshot, tunnel=tunnel, tun=tun)}
    defaults = {family: _default_link(snapshot, family, candidates, before) for family in FAMILIES}
    uplink4, uplink6 = (
        _facts(snapshot, defaults[family] or _spare_link(snapshot, family, candidates, before, defaults.values()))
        for family in FAMILIES
    )
    return Sides(uplink4, uplink6, _facts(snapshot, tunnel_link))


def of_others(snapshot: Snapshot, tuns: Iterable[str]) -> Snapshot:
    """What of a snapshot sides and plans depend on: not what is ours, but for which devices our tuns are."""
    tuns = frozenset(tuns)
    own = {link.index for link in snapshot.links if link.name in tuns}
    return replace(
        snapshot,
        links=tuple(Link(link.index, link.name, 0) if link.index in own else link for link in snapshot.links),
        addresses=tuple(address for address in snapshot.addresses if address.index not in own),
        routes=snapshot.routes_of(TABLE_MAIN),
        rules=(),
    )


def choose_tun_addresses(snapshot: Snapshot, *, tuns: Iterable[str] = ()) -> tuple[IPv4Interface, IPv6Interface]:
    """Choose the tun's addresses: always the same ones, unless the host uses what surrounds them.

    What the tuns themselves have, and what is in our own tables, does not count as used. Very short prefixes do not
    either: half the address space is nobody's own.
    """
    own = {link.index for tun in tuns if (link := snapshot.link(tun)) is not None}
    used = [address.interface.network for address in snapshot.addresses if address.index not in own]
    used += [
        route.destination
        for route in snapshot.routes_of(TABLE_MAIN)
        if route.type == RouteType.UNICAST and route.oif not in own
    ]
    used4 = [network for network in used if isinstance(network, IPv4Network) and network.prefixlen >= 8]
    used6 = [network for network in used if isinstance(network, IPv6Network) and network.prefixlen >= 20]
    first4, first6 = next(_candidates4()), next(_candidates6())
    address4 = next((one for one in _candidates4() if not any(_around(one).overlaps(net) for net in used4)), first4)
    address6 = next((one for one in _candidates6() if not any(_around(one).overlaps(net) for net in used6)), first6)
    return address4, address6


def beside(addresses: Iterable[IPInterface]) -> tuple[IPInterface, ...]:
    """The addresses of the tun of forwarded packets, where these are the tun's: a few further on."""
    return tuple(ip_interface(address.ip + FURTHER) for address in addresses)


def _candidates4() -> Iterator[IPv4Interface]:
    for second in (128, *range(129, 256)):
        yield IPv4Interface(f"10.{second}.0.1/32")
    for second in range(16, 32):
        yield IPv4Interface(f"172.{second}.128.1/32")
    for third in range(255, 127, -1):
        yield IPv4Interface(f"192.168.{third}.1/32")


def _candidates6() -> Iterator[IPv6Interface]:
    # An address of 2001:2::/48 or 3fff::/20 sorts like a global one (RFC 6724 §2.1); one of fd00::/8 would make
    # getaddrinfo prefer IPv4 for every name.
    for fourth in range(5, 256):
        yield IPv6Interface(f"2001:2:0:{fourth:x}::1/128")
    for fourth in range(5, 256):
        yield IPv6Interface(f"3fff:0:0:{fourth:x}::1/128")


def _around(interface: IPv4Interface | IPv6Interface) -> IPv4Network | IPv6Network:
    return interface.network.supernet(new_prefix=29 if interface.version == 4 else 64)


def _facts(snapshot: Snapshot, link: Link | None) -> SideFacts | None:
    if link is None or not link.up:
        return None
    usable = [address for address in snapshot.addresses_of(link) if address.is_global]
    usable.sort(key=lambda address: (address.deprecated, address.secondary))
    gateways = {
        family: next((route.gateway for route in _defaults(snapshot, family) if route.oif == link.index), None)
        for family in FAMILIES
    }
    return SideFacts(link, tuple(address.interface for address in usable), gateways[4], gateways[6])


def _defaults(snapshot: Snapshot, family: int) -> list[Route]:
    """Main's default routes, best first."""
    found = [
        route
        for route in snapshot.routes_of(TABLE_MAIN)
        if route.is_default and route.family == family and route.type == RouteType.UNICAST
    ]
    return sorted(found, key=lambda route: (route.metric, -route.preference))


def _default_link(snapshot: Snapshot, family: int, candidates: Mapping[int, Link], before: Sides) -> Link | None:
    """The device of the best default route, one with a carrier before one without."""
    found = [(route, link) for route in _defaults(snapshot, family) if (link := candidates.get(route.oif or 0))]

    def rank(one: tuple[Route, Link]) -> tuple[bool, int, int, bool]:
        route, link = one
        return not link.carrier, route.metric, -route.preference, not before.is_uplink(link, family)

    return min(found, key=rank)[1] if found else None


def _spare_link(
    snapshot: Snapshot, family: int, candidates: Mapping[int, Link], before: Sides, others: Iterable[Link | None]
) -> Link | None:
    """The uplink of a family without a default route: what is on-link there is reached all the same.

    It is the one that it was, while that has an address; else the other family's; else one that has an address.
    """
    others = tuple(others)

    def rank(link: Link) -> tuple[bool, bool, bool, bool]:
        has_address = any(one.is_global and one.family == family for one in snapshot.addresses_of(link))
        stays = has_address and before.is_uplink(link, family)
        return not stays, link not in others, not has_address, not link.carrier

    return min(candidates.values(), key=rank, default=None)


def _candidates(snapshot: Snapshot, *, tunnel: str, tun: str) -> list[Link]:
    """The devices that may be an uplink without being named."""
    found = [
        link
        for link in snapshot.links
        if link.up
        and not (link.is_loopback or link.master or link.name in (tunnel, tun) or link.kind in TUNNEL_KINDS)
        and (link.is_layer2 or link.kind in BARE_KINDS)
    ]
    leading_out = [link for link in found if _leads_out(link, snapshot.links)]
    return leading_out or [link for link in found if link.kind != BRIDGE]


def _leads_out(link: Link, others: Iterable[Link]) -> bool:
    """Whether it is a card, or made of such."""
    others = [other for other in others if other is not link]
    parts = [one for one in others if one.master == link.index or (link.kind == VLAN and one.index == link.below)]
    return link.is_on_bus or any(_leads_out(part, others) for part in parts)
