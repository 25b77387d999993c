"""System DNS: the resolvers that the host had before us, and the network on which each may be asked.

Theory of operation. Several programs name resolvers. The first source that names one which may be used is believed, and
no other: a later one is less exact, or is where the first one has it from. Taken out are our own addresses, loopback
(a stub, behind which the next source looks), and what belongs to the VPN: `tunnel.dns`, what lies in the tunnel's
prefixes, and what any source names for the tunnel's link, unless the source in question names it for the uplink.

A private address means another machine on every network: a resolver with one is asked only where it was learned or
configured. A network is known by the uplink's device, its gateway and the gateway's MAC, for each IP version by itself.
What was learned stays with the network on which it was learned until its source is written anew; a network that was
not known whole then (no gateway yet, its MAC not yet asked for) is taken for the first whole one that fits.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tunsplit.engine.dnstable import is_private
from tunsplit.host import IPAddress, IPNetwork, Link, NamedServers

CONFIGURED = "configured"
MOST_SERVERS = 8


@dataclass(frozen=True, slots=True)
class Place:
    """A network that the host is in, for one IP version."""

    device: str
    gateway: IPAddress | None = None
    mac: bytes | None = None  # the gateway's

    def becomes(self, other: "Place") -> bool:
        """Whether the other is this one, as far as this one is known."""
        return (
            self.device == other.device
            and self.gateway in (None, other.gateway)
            and (self.gateway is None or self.mac in (None, other.mac))
        )


Places = Mapping[int, Place | None]  # by IP version; None: there is no uplink


@dataclass(frozen=True, slots=True)
class SystemServer:
    """A resolver, who named it, and where a private one may be asked (None: nowhere yet)."""

    address: IPAddress
    source: str
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class SystemDns:
    """The host's own resolvers, in order."""

    servers: tuple[SystemServer, ...] = ()

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """All of them, wherever they may be asked."""
        return tuple(server.address for server in self.servers)

    def valid_on(self, places: Places) -> tuple[IPAddress, ...]:
        """Those that may be asked on the network that the host is in now."""
        return tuple(
            server.address
            for server in self.servers
            if not is_private(server.address)
            or (
                server.place is not None
                and (now := places.get(server.address.version)) is not None
                and server.place.becomes(now)
            )
        )


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What tells a resolver of the host's from others."""

    uplinks: tuple[Link, ...] = ()
    tunnel: Link | None = None
    tunnel_name: str = ""
    tunnel_dns: tuple[IPAddress, ...] = ()
    tunnel_prefixes: tuple[IPNetwork, ...] = ()
    own: frozenset[IPAddress] = frozenset()  # addresses of this host


def choose(named: Sequence[NamedServers], around: Surroundings) -> tuple[tuple[IPAddress, str], ...]:
    """The resolvers of the first source that names any for the host, each with its source.

    Args:
        named: what sources say, the one to be believed first at the head; one source may say several things.
        around: what there is.
    """
    vpn = {address for one in named if one.is_vpn or _belongs(one, around.tunnel_name, around.tunnel)
           for address in one.addresses}  # fmt: skip
    for source in dict.fromkeys(one.source for one in named):
        chosen: dict[IPAddress, str] = {}
        for one in named:
            if one.source != source or one.is_vpn:
                continue
            is_uplink = any(_belongs(one, link.name, link) for link in around.uplinks)
            if one.link is not None and not is_uplink:
                continue
            for address in one.addresses:
                if is_usable(address, around) and (is_uplink or address not in vpn):
                    chosen.setdefault(address, source)
        if chosen:
            return tuple(chosen.items())[:MOST_SERVERS]
    return ()


def is_usable(address: IPAddress, around: Surroundings) -> bool:
    """Whether a resolver is neither this host itself nor the VPN's."""
    return not (
        address.is_loopback
        or address.is_unspecified
        or address.is_multicast
        or address in around.own
        or address in around.tunnel_dns
        or any(address in prefix for prefix in around.tunnel_prefixes if prefix.version == address.version)
    )


def _belongs(named: NamedServers, name: str, link: Link | None) -> bool:
    return named.link is not None and named.link in (name, None if link is None else link.index)


@dataclass(slots=True)
class Memory:
    """Where each resolver was learned."""

    _learned: dict[tuple[str, IPAddress], tuple[Hashable, Place | None]] = field(default_factory=dict)

    def place(
        self,
        chosen: Iterable[tuple[IPAddress, str]],
        stamp_of: Callable[[str], Hashable],
        places: Places,
    ) -> SystemDns:
        """Give each resolver the network that it belongs to.

        Args:
            chosen: resolvers with their sources.
            stamp_of: for a source, what changes whenever it is written.
            places: the networks that the host is in now.
        """
        learned: dict[tuple[str, IPAddress], tuple[Hashable, Place | None]] = {}
        for address, source in chosen:
            key, stamp, now = (source, address), stamp_of(source), places.get(address.version)
            before, place = self._learned.get(key, (None, None))
            if before != stamp or place is None or (now is not None and place.becomes(now)):
                place = now
            learned[key] = stamp, place
        self._learned = learned
        return SystemDns(tuple(SystemServer(key[1], key[0], place) for key, (_, place) in learned.items()))


def without_scope(addresses: Iterable[IPAddress], devices: Collection[str]) -> tuple[IPAddress, ...]:
    """Addresses whose scope, if any, is one of these devices; without it: they are for sockets bound to the device."""
    found = []
    for address in addresses:
        scope = getattr(address, "scope_id", None)
        if scope is None:
            found.append(address)
        elif scope in devices:
            found.append(type(address)(address.packed))
    return tuple(found)
