"""Rtnetlink's messages ↔ plain values (include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h, fib_rules.h, neighbour.h).

A decoder takes the body of a message; it returns nothing for an object that we have no use for. What the kernel fills
in by itself is put back to the default, so that a decoded object equals the one that was encoded.
"""

import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

from tunsplit.host import (
    SCOPE_GLOBAL,
    Action,
    Address,
    IPAddress,
    IPInterface,
    IPNetwork,
    Link,
    Neighbour,
    NextHop,
    Route,
    RouteType,
    Rule,
)
from tunsplit.kernel.netlink import attribute, attributes, nested

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34

FAMILY_NUMBER = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}
VERSION = {number: version for version, number in FAMILY_NUMBER.items()}

IFINFOMSG = struct.Struct("=BxHiII")  # family · ARPHRD · index · flags · change
IFADDRMSG = struct.Struct("=BBBBi")  # family · prefix length · flags · scope · index
RTMSG = struct.Struct(
    "=BBBBBBBBI"
)  # family · destination and source prefix lengths · tos · table · protocol · scope · type · flags
FIB_RULE_HDR = struct.Struct(
    "=BBBBBxxBI"
)  # family · destination and source prefix lengths · tos · table · action · flags
NDMSG = struct.Struct("=BxxxiHBB")  # family · index · state · flags · type
RTNEXTHOP = struct.Struct("=HBBi")  # length · flags · hops · index
U16_PAIR = struct.Struct("!HH")
U32 = struct.Struct("=I")
I32 = struct.Struct("=i")
U32_PAIR = struct.Struct("=II")
PORTS = struct.Struct("=HH")

IFF_UP, IFF_LOOPBACK, IFF_RUNNING, IFF_NOARP, IFF_LOWER_UP = 0x1, 0x8, 0x40, 0x80, 0x10000
ARPHRD_ETHER = 1
IFA_F_SECONDARY, IFA_F_NODAD, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x01, 0x02, 0x08, 0x20, 0x40
IFA_F_NOPREFIXROUTE = 0x200
RTM_F_CLONED = 0x200
RTNH_F_ONLINK = 4
RTEXT_FILTER_SKIP_STATS = 8
NTF_USE, NTF_EXT_MANAGED = 0x01, 0x01
IN6_ADDR_GEN_MODE_NONE = 1

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
IFLA_AF_SPEC, IFLA_GROUP, IFLA_EXT_MASK, IFLA_LINK_NETNSID, IFLA_PARENT_DEV_NAME = 26, 27, 29, 37, 56
IFLA_INFO_KIND, IFLA_INET6_ADDR_GEN_MODE = 1, 8
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_MULTIPATH = 1, 4, 5, 6, 7, 8, 9
RTA_TABLE, RTA_MARK, RTA_VIA, RTA_PREF = 15, 16, 18, 20
RTAX_MTU, RTAX_ADVMSS = 2, 8
FRA_DST, FRA_SRC, FRA_IIFNAME, FRA_PRIORITY, FRA_FWMARK, FRA_TABLE, FRA_FWMASK, FRA_OIFNAME = 1, 2, 3, 6, 10, 15, 16, 17
FRA_UID_RANGE, FRA_PROTOCOL, FRA_IP_PROTO, FRA_SPORT_RANGE, FRA_DPORT_RANGE = 20, 21, 22, 23, 24
NDA_DST, NDA_LLADDR, NDA_IFINDEX, NDA_PROTOCOL, NDA_FLAGS_EXT = 1, 2, 8, 12, 15

ROUTE_TYPES, ACTIONS = frozenset(RouteType), frozenset(Action)
EVERY_BIT = 0xFFFFFFFF
PREFERENCES = {1: 1, 3: -1}  # ICMPV6_ROUTER_PREF_* (linux/icmpv6.h): high, low; else medium
TABLE_COMPAT = 252  # RT_TABLE_COMPAT: the number is in the attribute


def ip_address(packed: bytes) -> IPAddress:
    """The address that 4 or 16 bytes are."""
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def ip_interface(packed: bytes, prefix: int) -> IPInterface:
    """The address with its on-link prefix."""
    return IPv4Interface((packed, prefix)) if len(packed) == 4 else IPv6Interface((packed, prefix))


def ip_network(family: int, packed: bytes | None, prefix: int) -> IPNetwork:
    """The prefix; no bytes mean that it begins with zeros. Bits past the prefix are left out."""
    if family == 4:
        return IPv4Network((packed or bytes(4), prefix), strict=False)
    return IPv6Network((packed or bytes(16), prefix), strict=False)


def decode_link(body: bytes) -> Link:
    """Decode RTM_NEWLINK."""
    _, hardware, index, flags, _ = IFINFOMSG.unpack_from(body)
    found = attributes(body, IFINFOMSG.size)
    kind = attributes(found.get(IFLA_LINKINFO, b"")).get(IFLA_INFO_KIND, b"")
    return Link(
        index=index,
        name=_text(found[IFLA_IFNAME]),
        mtu=_u32(found, IFLA_MTU),
        up=bool(flags & IFF_UP),
        # One that has just come does not count before packets are let out (net/core/link_watch.c, linkwatch_do_dev).
        carrier=bool(flags & IFF_LOWER_UP and flags & IFF_RUNNING),
        kind=_text(kind),
        mac=found.get(IFLA_ADDRESS) or None,
        group=_u32(found, IFLA_GROUP),
        is_layer2=hardware == ARPHRD_ETHER,
        is_loopback=bool(flags & IFF_LOOPBACK),
        is_noarp=bool(flags & IFF_NOARP),
        is_on_bus=IFLA_PARENT_DEV_NAME in found,
        master=_u32(found, IFLA_MASTER),
        # In another namespace (a veth's peer) the index means nothing here.
        below=0 if IFLA_LINK_NETNSID in found else _u32(found, IFLA_LINK),
    )


def decode_address(body: bytes) -> Address | None:
    """Decode RTM_NEWADDR. On a point-to-point link IFA_ADDRESS is the peer's and IFA_LOCAL ours."""
    family, prefix, flags, scope, index = IFADDRMSG.unpack_from(body)
    found = attributes(body, IFADDRMSG.size)
    packed = found.get(IFA_LOCAL, found.get(IFA_ADDRESS))
    if family not in VERSION or packed is None:
        return None
    flags = _u32(found, IFA_FLAGS, flags)
    return Address(
        index=index,
        interface=ip_interface(packed, prefix),
        scope=scope,
        deprecated=bool(flags & IFA_F_DEPRECATED),
        tentative=bool(flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED)),
        secondary=bool(flags & IFA_F_SECONDARY),
    )


def encode_address(index: int, interface: IPInterface) -> bytes:
    """Encode RTM_NEWADDR or RTM_DELADDR: at once usable, and no route of its own."""
    flags = IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if interface.version == 6 else 0)
    header = IFADDRMSG.pack(FAMILY_NUMBER[interface.version], interface.network.prefixlen, 0, SCOPE_GLOBAL, index)
    packed = interface.ip.packed
    return (
        header + attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed) + attribute(IFA_FLAGS, U32.pack(flags))
    )


def decode_routes(body: bytes) -> Iterator[Route]:
    """Decode RTM_NEWROUTE: one route for each next hop.

    None for an entry of the IPv6 route cache, and for types without meaning, which the kernel takes all the same
    (`ip route add xresolve`).
    """
    family, prefix, _, _, table, protocol, scope, kind, flags = RTMSG.unpack_from(body)
    if family not in VERSION or flags & RTM_F_CLONED or kind not in ROUTE_TYPES:
        return
    version = VERSION[family]
    found = attributes(body, RTMSG.size)
    destination = ip_network(version, found.get(RTA_DST), prefix)
    unicast = kind == RouteType.UNICAST
    prefsrc = found.get(RTA_PREFSRC)
    metrics = attributes(found.get(RTA_METRICS, b""))
    preference = PREFERENCES.get(found.get(RTA_PREF, b"\0")[0], 0)
    for oif, gateway, hop_flags in _hops(found, flags):
        yield Route(
            destination=destination,
            table=_u32(found, RTA_TABLE, table),
            # IPv6 names lo for a way that is closed, IPv4 nothing.
            oif=oif if unicast else None,
            gateway=gateway,
            metric=_u32(found, RTA_PRIORITY),
            type=RouteType(kind),
            protocol=protocol,
            scope=scope if version == 4 else SCOPE_GLOBAL,
            prefsrc=ip_address(prefsrc) if prefsrc else None,
            onlink=bool(hop_flags & RTNH_F_ONLINK),
            mtu=_u32(metrics, RTAX_MTU) or None,
            preference=preference,
            advmss=_u32(metrics, RTAX_ADVMSS) or None,
        )


def _hops(found: dict[int, bytes], flags: int) -> Iterator[tuple[int | None, IPAddress | None, int]]:
    many = found.get(RTA_MULTIPATH)
    if many is None:
        yield _u32(found, RTA_OIF) or None, _gateway(found), flags
        return
    at = 0
    while at + RTNEXTHOP.size <= len(many):
        size, hop_flags, _, index = RTNEXTHOP.unpack_from(many, at)
        if size < RTNEXTHOP.size:
            return
        yield index, _gateway(attributes(many[at : at + size], RTNEXTHOP.size)), hop_flags
        at += size + 3 & ~3


def _gateway(found: dict[int, bytes]) -> IPAddress | None:
    if packed := found.get(RTA_GATEWAY):
        return ip_address(packed)
    if via := found.get(RTA_VIA):
        return ip_address(via[2:])
    return None


def encode_route(route: Route) -> bytes:
    """Encode RTM_NEWROUTE or RTM_DELROUTE."""
    family, destination = FAMILY_NUMBER[route.family], route.destination
    table = route.table if route.table < 256 else TABLE_COMPAT
    flags = RTNH_F_ONLINK if route.onlink else 0
    parts = [
        RTMSG.pack(family, destination.prefixlen, 0, 0, table, route.protocol, route.scope, route.type, flags),
        attribute(RTA_TABLE, U32.pack(route.table)),
        attribute(RTA_DST, destination.network_address.packed),
        attribute(RTA_PRIORITY, U32.pack(route.metric)),
    ]
    if route.oif is not None:
        parts.append(attribute(RTA_OIF, U32.pack(route.oif)))
    if route.gateway is not None and route.gateway.version == route.family:
        parts.append(attribute(RTA_GATEWAY, route.gateway.packed))
    elif route.gateway is not None:
        via = struct.pack("=H", FAMILY_NUMBER[route.gateway.version]) + route.gateway.packed
        parts.append(attribute(RTA_VIA, via))
    if route.prefsrc is not None:
        parts.append(attribute(RTA_PREFSRC, route.prefsrc.packed))
    metrics = [(RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)]
    if given := [attribute(kind, U32.pack(value)) for kind, value in metrics if value is not None]:
        parts.append(nested(RTA_METRICS, b"".join(given)))
    return b"".join(parts)


def encode_table(family: int, table: int) -> bytes:
    """Encode RTM_GETROUTE for all routes of one table."""
    header = RTMSG.pack(FAMILY_NUMBER[family], 0, 0, 0, table if table < 256 else TABLE_COMPAT, 0, 0, 0, 0)
    return header + attribute(RTA_TABLE, U32.pack(table))


def encode_question(destination: IPAddress, mark: int, oif: int | None) -> bytes:
    """Encode RTM_GETROUTE for the way to one address."""
    packed = destination.packed
    question = RTMSG.pack(FAMILY_NUMBER[destination.version], len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
    question += attribute(RTA_DST, packed)
    if mark:
        question += attribute(RTA_MARK, U32.pack(mark))
    if oif is not None:
        question += attribute(RTA_OIF, U32.pack(oif))
    return question


def is_local(body: bytes) -> bool:
    """Whether the answer to RTM_GETROUTE says that the destination is this host."""
    return bool(RTMSG.unpack_from(body)[7] == RouteType.LOCAL)


def decode_next_hop(body: bytes) -> NextHop | None:
    """Decode the answer to RTM_GETROUTE; nothing where the way is closed."""
    kind = RTMSG.unpack_from(body)[7]
    if kind >= RouteType.BLACKHOLE:
        return None
    found = attributes(body, RTMSG.size)
    source = found.get(RTA_PREFSRC)
    mtu = _u32(attributes(found.get(RTA_METRICS, b"")), RTAX_MTU)
    return NextHop(_gateway(found), ip_address(source) if source else None, _u32(found, RTA_OIF), mtu or None)


def decode_rule(body: bytes) -> Rule | None:
    """Decode RTM_NEWRULE, as far as our own rules go.

    Nothing for rules of other families (multicast routing), and for actions that the kernel takes and does not know.
    """
    family, to_prefix, source_prefix, _, table, action, _ = FIB_RULE_HDR.unpack_from(body)
    if family not in VERSION or action not in ACTIONS:
        return None
    version = VERSION[family]
    found = attributes(body, FIB_RULE_HDR.size)
    to, source = found.get(FRA_DST), found.get(FRA_SRC)
    iif, oif = found.get(FRA_IIFNAME), found.get(FRA_OIFNAME)
    sport, dport, uids = found.get(FRA_SPORT_RANGE), found.get(FRA_DPORT_RANGE), found.get(FRA_UID_RANGE)
    ipproto, protocol = found.get(FRA_IP_PROTO), found.get(FRA_PROTOCOL)
    return Rule(
        family=version,
        priority=_u32(found, FRA_PRIORITY),
        action=Action(action),
        table=_u32(found, FRA_TABLE, table),
        # A mark of 0 is told by its mask alone (net/core/fib_rules.c, fib_nl_fill_rule).
        fwmark=_u32(found, FRA_FWMARK) if found.keys() & {FRA_FWMARK, FRA_FWMASK} else None,
        iif=_text(iif) if iif else None,
        oif=_text(oif) if oif else None,
        source=ip_network(version, source, source_prefix) if source else None,
        to=ip_network(version, to, to_prefix) if to else None,
        ipproto=ipproto[0] if ipproto else None,
        sport=PORTS.unpack(sport) if sport else None,
        dport=PORTS.unpack(dport) if dport else None,
        uidrange=U32_PAIR.unpack(uids) if uids else None,
        protocol=protocol[0] if protocol else 0,
    )


def encode_rule(rule: Rule) -> bytes:
    """Encode RTM_NEWRULE or RTM_DELRULE."""
    to, source = rule.to, rule.source
    parts = [
        FIB_RULE_HDR.pack(
            FAMILY_NUMBER[rule.family],
            to.prefixlen if to else 0,
            source.prefixlen if source else 0,
            0,
            rule.table if rule.table < 256 else TABLE_COMPAT,
            rule.action,
            0,
        ),
        attribute(FRA_PRIORITY, U32.pack(rule.priority)),
        attribute(FRA_PROTOCOL, bytes([rule.protocol])),
    ]
    if rule.action == Action.TABLE:
        parts.append(attribute(FRA_TABLE, U32.pack(rule.table)))
    if rule.fwmark is not None:
        parts += [attribute(FRA_FWMARK, U32.pack(rule.fwmark)), attribute(FRA_FWMASK, U32.pack(EVERY_BIT))]
    for kind, name in ((FRA_IIFNAME, rule.iif), (FRA_OIFNAME, rule.oif)):
        if name is not None:
            parts.append(attribute(kind, name.encode() + b"\0"))
    for kind, prefix in ((FRA_DST, to), (FRA_SRC, source)):
        if prefix is not None:
            parts.append(attribute(kind, prefix.network_address.packed))
    if rule.ipproto is not None:
        parts.append(attribute(FRA_IP_PROTO, bytes([rule.ipproto])))
    for kind, ports in ((FRA_SPORT_RANGE, rule.sport), (FRA_DPORT_RANGE, rule.dport)):
        if ports is not None:
            parts.append(attribute(kind, PORTS.pack(*ports)))
    if rule.uidrange is not None:
        parts.append(attribute(FRA_UID_RANGE, U32_PAIR.pack(*rule.uidrange)))
    return b"".join(parts)


def decode_neighbour(body: bytes) -> Neighbour | None:
    """Decode RTM_NEWNEIGH or RTM_DELNEIGH; nothing for a bridge's forwarding entry or a proxy's."""
    family, index, state, _, _ = NDMSG.unpack_from(body)
    found = attributes(body, NDMSG.size)
    address = found.get(NDA_DST)
    if family not in VERSION or address is None:
        return None
    protocol = found.get(NDA_PROTOCOL)
    mac = found.get(NDA_LLADDR) or None
    return Neighbour(index, ip_address(address), mac, state, protocol[0] if protocol else 0)


def encode_neighbour(index: int, address: IPAddress, *, flags: int = 0, extended: int = 0, protocol: int = 0) -> bytes:
    """Encode RTM_NEWNEIGH or RTM_DELNEIGH with flags NTF_* and NTF_EXT_*."""
    body = NDMSG.pack(FAMILY_NUMBER[address.version], index, 0, flags, 0) + attribute(NDA_DST, address.packed)
    if extended:
        body += attribute(NDA_FLAGS_EXT, U32.pack(extended))
    if protocol:
        body += attribute(NDA_PROTOCOL, bytes([protocol]))
    return body


def _u32(found: dict[int, bytes], kind: int, default: int = 0) -> int:
    value = found.get(kind)
    return U32.unpack(value)[0] if value is not None else default


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="surrogateescape")
