"""Which device each side is, and which addresses the tun may have: read from a snapshot of the host.

Theory of operation. A side is a device; it is *up for a family* while the device is up and has a settled address of
that family with global scope (a link-local one reaches nobody). The tunnel's device is named. The uplink's device may
be found: per family, where main's best default route leads, past devices that are tunnels themselves. main is
attacker's input, so all that it can do here is to choose among the host's own hardware. Without a default route (an
uplink that is offline) the uplink is the first device that could carry one, so that it stays closed for included apps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

from tunsplit.host import FAMILIES, TABLE_MAIN, IPAddress, IPInterface, Link, Route, RouteType, Snapshot

AUTO = "auto"
SMALLEST_MTU = 1280  # RFC 8200 §5; below it the kernel takes IPv6 from a device and does not bring it back
USUAL_MTU = 1500

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

    def uplink(self, family: int) -> SideFacts | None:
        """The family's uplink, if it is up for it."""
        facts = self.uplink4 if family == 4 else self.uplink6
        return facts if facts and facts.has(family) else None

    def tunnel_of(self, family: int) -> SideFacts | None:
        """The tunnel, if it is up for the family."""
        return self.tunnel if self.tunnel and self.tunnel.has(family) else None

    @property
    def uplinks(self) -> tuple[SideFacts, ...]:
        """Every uplink device, once."""
        found = {facts.link.index: facts for facts in (self.uplink4, self.uplink6) if facts}
        return tuple(found.values())

    @property
    def families(self) -> tuple[int, ...]:
        """The families that the tun is to have: those that a side has."""
        return tuple(family for family in FAMILIES if self.uplink(family) or self.tunnel_of(family))

    @property
    def mtu(self) -> int:
        """The tun's MTU: the smallest of the sides', never under 1280."""
        mtus = [facts.mtu for facts in (*self.uplinks, self.tunnel) if facts]
        return max(min(mtus, default=USUAL_MTU), SMALLEST_MTU)


def find_sides(snapshot: Snapshot, *, tunnel: str, uplink: str, tun: str) -> Sides:
    """Find both sides.

    Args:
        tunnel: the tunnel's device; it may be absent.
        uplink: the uplink's device, or "auto".
        tun: our own capture device, which is never a side.
    """
    tunnel_link = snapshot.link(tunnel)
    if uplink != AUTO:
        facts = _facts(snapshot, snapshot.link(uplink))
        return Sides(facts, facts, _facts(snapshot, tunnel_link))
    candidates = {link.index: link for link in _candidates(snapshot, tunnel=tunnel, tun=tun)}
    uplink4, uplink6 = (_facts(snapshot, _default_link(snapshot, family, candidates)) for family in FAMILIES)
    spare = _facts(snapshot, next(iter(candidates.values()), None))
    return Sides(uplink4 or uplink6 or spare, uplink6 or uplink4 or spare, _facts(snapshot, tunnel_link))


def choose_tun_addresses(snapshot: Snapshot, *, tun: str = "") -> tuple[IPv4Interface, IPv6Interface]:
    """Choose the tun's addresses: always the same ones, unless the host uses what surrounds them.

    What `tun` itself has, and what is in our own tables, does not count as used. Very short prefixes do not either:
    half the address space is nobody's own.
    """
    own = snapshot.link(tun)
    used = [address.interface.network for address in snapshot.addresses if own is None or address.index != own.index]
    used += [
        route.destination
        for route in snapshot.routes_of(TABLE_MAIN)
        if route.type == RouteType.UNICAST and (own is None or route.oif != own.index)
    ]
    used4 = [network for network in used if isinstance(network, IPv4Network) and network.prefixlen >= 8]
    used6 = [network for network in used if isinstance(network, IPv6Network) and network.prefixlen >= 20]
    first4, first6 = next(_candidates4()), next(_candidates6())
    address4 = next((one for one in _candidates4() if not any(_around(one).overlaps(net) for net in used4)), first4)
    address6 = next((one for one in _candidates6() if not any(_around(one).overlaps(net) for net in used6)), first6)
    return address4, address6


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
    return interface.network.supernet(new_prefix=30 if interface.version == 4 else 64)


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
    return sorted(found, key=lambda route: route.metric)


def _default_link(snapshot: Snapshot, family: int, candidates: Mapping[int, Link]) -> Link | None:
    """The device of the best default route, one with a carrier before one without."""
    links = [link for route in _defaults(snapshot, family) if (link := candidates.get(route.oif or 0))]
    return min(links, key=lambda link: not link.carrier, default=None)


def _candidates(snapshot: Snapshot, *, tunnel: str, tun: str) -> Iterator[Link]:
    """The devices that may be an uplink without being named."""
    for link in snapshot.links:
        if not link.up or link.is_loopback or link.name in (tunnel, tun) or link.kind in TUNNEL_KINDS:
            continue
        if link.is_layer2 or link.kind in BARE_KINDS:
            yield link
