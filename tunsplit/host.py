"""The host's network as plain values: what the kernel has, and what we want it to have.

A family is 4 or 6, as in ipaddress. Values are what the kernel shows, put so that two equal things compare equal:
what it does not store for a kind of object is left at the default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface
IPNetwork = IPv4Network | IPv6Network

FAMILIES = (4, 6)

# include/uapi/linux/rtnetlink.h
TABLE_MAIN, TABLE_LOCAL = 254, 255
SCOPE_GLOBAL, SCOPE_LINK, SCOPE_HOST = 0, 253, 254


class RouteType(IntEnum):
    """rtm_type (include/uapi/linux/rtnetlink.h)."""

    UNICAST = 1
    LOCAL = 2
    BROADCAST = 3
    ANYCAST = 4
    MULTICAST = 5
    BLACKHOLE = 6
    UNREACHABLE = 7
    PROHIBIT = 8
    THROW = 9


class Action(IntEnum):
    """What a routing rule does (include/uapi/linux/fib_rules.h)."""

    TABLE = 1
    GOTO = 2
    NOP = 3
    BLACKHOLE = 6
    UNREACHABLE = 7
    PROHIBIT = 8


class NeighbourState(IntEnum):
    """NUD_* (include/uapi/linux/neighbour.h)."""

    NONE = 0x00
    INCOMPLETE = 0x01
    REACHABLE = 0x02
    STALE = 0x04
    DELAY = 0x08
    PROBE = 0x10
    FAILED = 0x20
    NOARP = 0x40
    PERMANENT = 0x80


_USABLE = sum((NeighbourState.REACHABLE, NeighbourState.STALE, NeighbourState.DELAY, NeighbourState.PROBE,
               NeighbourState.NOARP, NeighbourState.PERMANENT))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Link:
    """A network device; one that does not exist has the index 0.

    `kind` is what `ip -d link` calls it ("veth", "wireguard", "tun", …), "" for hardware. `master` is the index of the
    bridge, bond, … that this is a port of, and `below` that of the device which carries a VLAN; 0 for none.
    """

    index: int
    name: str
    mtu: int
    up: bool = True
    carrier: bool = True
    kind: str = ""
    mac: bytes | None = None
    group: int = 0
    is_layer2: bool = True  # frames carry an Ethernet header (ARPHRD_ETHER)
    is_loopback: bool = False
    is_noarp: bool = False  # nobody is asked for a neighbour's address
    is_on_bus: bool = False  # of PCI, USB, virtio, …: a card
    master: int = 0
    below: int = 0

    @property
    def exists(self) -> bool:
        """Whether routes may lead to it."""
        return self.index != 0


def no_tun(name: str) -> Link:
    """A tun of this name that does not exist."""
    return Link(0, name, 0, up=False, kind="tun", is_layer2=False)


@dataclass(frozen=True, slots=True)
class Address:
    """One of the host's own addresses, with the prefix that is on-link with it."""

    index: int  # of its link
    interface: IPInterface
    scope: int = SCOPE_GLOBAL
    deprecated: bool = False
    tentative: bool = False  # not yet, or not at all, ours: duplicate address detection runs or has failed
    secondary: bool = False  # IPv4: another one of its subnet goes first; IPv6: temporary (RFC 8981)

    @property
    def family(self) -> int:
        """4 or 6."""
        return self.interface.version

    @property
    def is_global(self) -> bool:
        """Whether packets to the world may carry it: not of link or host scope, and settled."""
        return self.scope < SCOPE_LINK and not self.interface.is_link_local and not self.tentative


@dataclass(frozen=True, slots=True)
class Route:
    """One next hop of a route; a multipath route is several."""

    destination: IPNetwork
    table: int = TABLE_MAIN
    oif: int | None = None  # never given for a type other than UNICAST
    gateway: IPAddress | None = None  # of the other family too (RTA_VIA)
    metric: int = 0
    type: RouteType = RouteType.UNICAST
    protocol: int = 0
    scope: int = SCOPE_GLOBAL  # IPv4 only
    prefsrc: IPAddress | None = None
    onlink: bool = False
    mtu: int | None = None
    preference: int = 0  # of a router, as it says itself (RFC 4191 §2.1): -1 low, 0 medium, 1 high
    advmss: int | None = None  # largest segment of TCP that a SYN by this way promises to take

    @property
    def family(self) -> int:
        """4 or 6."""
        return self.destination.version

    @property
    def is_default(self) -> bool:
        """Whether it leads everywhere."""
        return self.destination.prefixlen == 0


@dataclass(frozen=True, slots=True)
class Rule:
    """A routing rule; ranges are inclusive."""

    family: int
    priority: int
    action: Action = Action.TABLE
    table: int = 0
    fwmark: int | None = None
    iif: str | None = None
    oif: str | None = None
    source: IPNetwork | None = None
    to: IPNetwork | None = None
    ipproto: int | None = None
    sport: tuple[int, int] | None = None
    dport: tuple[int, int] | None = None
    uidrange: tuple[int, int] | None = None
    protocol: int = 0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """What the kernel knows of a neighbour's link-layer address."""

    index: int  # of its link
    address: IPAddress
    mac: bytes | None
    state: int  # NeighbourState
    protocol: int = 0  # who put it there (NDA_PROTOCOL)

    @property
    def usable(self) -> bool:
        """Whether frames may be sent to `mac` now."""
        return bool(self.state & _USABLE) and self.mac is not None

    @property
    def failed(self) -> bool:
        """Whether nobody answered."""
        return bool(self.state & NeighbourState.FAILED)


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where the kernel would send a packet, and with which source address."""

    gateway: IPAddress | None  # None: the destination itself is on-link
    source: IPAddress | None
    oif: int
    mtu: int | None = None  # of the path, where it is less than the device's


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The network configuration of one namespace at one moment. Routes are those of main and of our own tables."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] = ()
    ipv6: bool = True  # the kernel has it
    ipv6_enabled: bool = True  # and it is not switched off (net.ipv6.conf.all.disable_ipv6)

    def link(self, name: str) -> Link | None:
        """The device of this name."""
        return next((link for link in self.links if link.name == name), None)

    def link_at(self, index: int | None) -> Link | None:
        """The device with this index."""
        return next((link for link in self.links if link.index == index), None)

    def addresses_of(self, link: Link) -> tuple[Address, ...]:
        """The device's addresses, in the kernel's order."""
        return tuple(address for address in self.addresses if address.index == link.index)

    def routes_of(self, table: int) -> tuple[Route, ...]:
        """The routes of one table, in the kernel's order."""
        return tuple(route for route in self.routes if route.table == table)


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A value wanted under /proc/sys, by its path there: "net/ipv4/conf/eth0/arp_ignore"."""

    path: str
    value: str
    good: frozenset[str] = frozenset()  # values that are at least as strict, and stay
    is_list: bool = False  # `value` is a port range, added to the ranges that are there


@dataclass(frozen=True, slots=True)
class TunFacts:
    """Our capture device, which may be down or not exist, and the addresses that it is to have: one a family."""

    link: Link
    addresses: tuple[IPInterface, ...]


@dataclass(frozen=True, slots=True)
class NamedServers:
    """Resolvers that somebody names, in order."""

    source: str  # who, in a few words
    addresses: tuple[IPAddress, ...]
    link: str | int | None = None  # the device that they belong to, by name or index; None: no particular one
    is_vpn: bool = False


@dataclass(frozen=True, slots=True)
class IpsecPolicy:
    """What leaves with these traits is IPsec's affair; `demands`: it may not leave as it is.

    `protocol` 0 is any; of the destination port, only the bits in the mask count; `device` 0 is any.
    """

    source: IPNetwork
    destination: IPNetwork
    protocol: int
    port: int
    port_mask: int
    device: int
    priority: int
    demands: bool


@dataclass(frozen=True, slots=True)
class EgressTable:
    """What our table of nftables' family netdev is to be, in nft's words; empty for none.

    `body` names its devices whether they are there or not, which kernels before 6.16 refuse; `body_now` names those
    alone that are there, which are `devices`.
    """

    body: str = ""
    body_now: str = ""
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Everything that we want on the host while traffic is split."""

    tun: Link
    tun_mtu: int
    tun_addresses: tuple[IPInterface, ...]
    routes: tuple[Route, ...]
    rules: tuple[Rule, ...]
    sysctls: tuple[Sysctl, ...]
    rulesets: Mapping[str, str]  # family of nftables → the body of our table there, in nft's words
    sets: Mapping[str, Mapping[str, tuple[IPAddress, ...]]]  # the same → what sets of addresses hold there
    forwarded: TunFacts  # the tun of what this host forwards
    guard: str = ""  # the commands that fill the guard's table; empty: there is none
    egress: EgressTable = EgressTable()

    @property
    def tuns(self) -> tuple[TunFacts, ...]:
        """Our devices, with the addresses that they are to have."""
        return (TunFacts(self.tun, self.tun_addresses), self.forwarded)
