"""What the host has to look like for every packet to reach the side that it belongs to.

A block of rules (engine/steeringrules.py) leads to tables of our own, built from the routes of one side's device
alone. The main table is never consulted for an app's packet: DHCP, router advertisements and the VPN's server write
there. Every table ends in `unreachable default` at a metric worse than any, so that a device that vanishes closes its
way and nothing falls through to a later rule.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, ip_network

from tunsplit.engine.egress import egress
from tunsplit.engine.guests import Guests, find_guests
from tunsplit.engine.hostsysctls import sysctls
from tunsplit.engine.lan import Lan, find_lan, within
from tunsplit.engine.nftsets import address_sets
from tunsplit.engine.nftwords import can_hold
from tunsplit.engine.ruleset import RulesetFacts, guard, rulesets
from tunsplit.engine.sides import AUTO, SideFacts, Sides
from tunsplit.engine.steeringrules import BOUND_TABLES, block, transport_rule
from tunsplit.host import (
    FAMILIES,
    SCOPE_GLOBAL,
    SCOPE_LINK,
    TABLE_MAIN,
    Action,
    HostPlan,
    IPAddress,
    IPInterface,
    IPNetwork,
    Link,
    Route,
    RouteType,
    Rule,
    Snapshot,
    TunFacts,
)
from tunsplit.names import (
    PRIORITY_UNREACHABLE,
    ROUTE_PROTOCOL,
    TABLE_FORWARDED,
    TABLE_GUESTS,
    TABLE_LAN,
    TABLE_NAMED,
    TABLE_TUN,
    TABLE_TUNNEL,
    TABLE_UPLINK,
    TABLES,
)

TCP, UDP, ICMPV6 = 6, 17, 58
TCP_HEADERS = {4: 40, 6: 60}  # with IP's: what an MSS leaves out (RFC 6691)

TUN_METRIC = 1
LAST_METRIC = 4278198272  # worse than what any network manager gives
IPV6_METRIC = 1024  # what the kernel makes of 0 (IP6_RT_PRIO_USER)

EVERYWHERE: dict[int, IPNetwork] = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the VPN's transport goes: the relay's address, port, and protocol number (6 or 17)."""

    address: IPAddress
    port: int
    protocol: int


@dataclass(frozen=True, slots=True)
class SteeringSettings:
    """What the configuration says about steering."""

    tunnel: str  # the tunnel's device, present or not
    uplink: str = "auto"
    fwmark: int | None = None  # of the VPN's transport
    endpoints: tuple[Endpoint, ...] = ()
    transport_uid: int = 0  # owner of the transport's sockets, besides root
    resolvers: tuple[IPAddress, ...] = ()  # inside the tunnel: never the local network's
    lan_allow: bool = False
    lan_routes: tuple[IPNetwork, ...] = ()
    lan_discovery: bool = False
    firewall: bool = True
    guests: tuple[str, ...] | None = None  # globs of devices that guests are behind; None: bridges without hardware
    uid: int = 0  # the daemon's own


def plan(
    settings: SteeringSettings,
    snapshot: Snapshot,
    sides: Sides,
    tun: TunFacts,
    forwarded: TunFacts,
    *,
    tunnel_addresses: Iterable[IPAddress] = (),
) -> HostPlan:
    """Say what the host has to look like now. A family of a tun takes effect only while a side has it.

    Where a tun does not exist nothing leads into it, and what is to go there is refused. What concerns the tunnel's
    device alone stays while it is away, so that its return changes neither nftables nor sysctls: that would take
    longer than all the rest.

    Args:
        settings: what the configuration says.
        snapshot: the host as it is.
        sides: as found in it.
        tun: of what this host's apps send.
        forwarded: of what this host forwards.
        tunnel_addresses: those that the tunnel had when it was there last, which are its own until somebody else's.
    """
    families = [family for family in sides.families if family == 4 or snapshot.ipv6_enabled]
    closed = [family for family in FAMILIES if family == 4 or snapshot.ipv6_enabled]
    own, others = (
        replace(one, addresses=tuple(address for address in one.addresses if address.version in families))
        for one in (tun, forwarded)
    )
    reachable = own.addresses if tun.link.exists else ()
    lan = _lan(settings, snapshot, sides, tun) if settings.lan_allow else Lan()
    doors = (*_uplink_names(settings, sides), settings.tunnel)  # by name, also what is to come
    guests = find_guests(
        snapshot,
        named=settings.guests,
        never=(*doors, tun.link.name, forwarded.link.name),
        not_theirs=_not_local(settings, sides, tun, forwarded),
    )
    facts = _ruleset_facts(settings, snapshot, sides, tun, forwarded, lan, guests)
    routes = [
        *_closing(closed),
        *_tun_routes(tun.link, reachable, sides.mtu),
        *(
            into_tun(forwarded.link, EVERYWHERE[address.version], TABLE_FORWARDED, address.ip)
            for address in (others.addresses if forwarded.link.exists else ())
        ),
        *_side_routes(snapshot, sides, families),
        *_named_routes(sides, reachable),
        *lan.routes(),
        *guests.routes(),
    ]
    rules = [
        rule
        for family in closed
        for rule in block(
            family,
            sides,
            guests,
            _transport(settings, family),
            lan=settings.lan_allow,
            doors=doors,
            forwarded=forwarded.link.name,
        )
    ]
    if snapshot.ipv6 and not snapshot.ipv6_enabled:
        # Switched on for one device behind our back, IPv6 finds its way closed.
        rules.append(Rule(6, PRIORITY_UNREACHABLE, Action.UNREACHABLE, protocol=ROUTE_PROTOCOL))
    return HostPlan(
        tun=tun.link,
        tun_mtu=sides.mtu,
        tun_addresses=own.addresses,
        routes=tuple(_unique(routes)),
        rules=tuple(rules),
        sysctls=tuple(sysctls(snapshot, sides, settings.tunnel, (tun.link, forwarded.link))),
        rulesets=rulesets(facts),
        sets=address_sets(sides.tunnel_now_or_before(snapshot, settings.tunnel, tunnel_addresses)),
        guard=guard(facts),
        egress=egress(facts, snapshot.links),
        forwarded=others,
    )


def _lan(settings: SteeringSettings, snapshot: Snapshot, sides: Sides, tun: TunFacts) -> Lan:
    return find_lan(snapshot, sides, not_local=_not_local(settings, sides, tun), listed=settings.lan_routes)


def _not_local(settings: SteeringSettings, sides: Sides, *tuns: TunFacts) -> list[IPNetwork]:
    return [
        *(address.network for one in tuns for address in one.addresses),
        *(ip_network(resolver) for resolver in settings.resolvers),
        *(ip_network(endpoint.address) for endpoint in settings.endpoints),
        *(address.network for address in (sides.tunnel.addresses if sides.tunnel else ())),
    ]


def _uplink_names(settings: SteeringSettings, sides: Sides) -> tuple[str, ...]:
    named = () if settings.uplink == AUTO else (settings.uplink,)
    return tuple(dict.fromkeys((*named, *(uplink.link.name for uplink in sides.uplinks))))


def _closing(families: Iterable[int]) -> Iterator[Route]:
    for family in families:
        for table in TABLES:
            if table in (TABLE_LAN, TABLE_NAMED, TABLE_GUESTS, *BOUND_TABLES.values()):
                continue  # what is not in them goes on to the next rule
            yield Route(
                EVERYWHERE[family], table, metric=LAST_METRIC, type=RouteType.UNREACHABLE, protocol=ROUTE_PROTOCOL
            )


def _tun_routes(tun: Link, addresses: Iterable[IPInterface], mtu: int) -> Iterator[Route]:
    for address in addresses:
        route = into_tun(tun, EVERYWHERE[address.version], TABLE_TUN, address.ip)
        # What a side cannot take no peer may be asked for, however wide the tun is configured to be.
        route = replace(route, advmss=mtu - TCP_HEADERS[address.version])
        yield route
        # What the kernel learns of a path hangs on a route. A server's answers carry their side's address, and ICMP
        # errors about them are the kernel's own: so each side has one. What differs in nothing else is one object to
        # IPv4, before Linux 6.1 whatever its table (fib_semantics.c, fib_find_info): hence the metric.
        for metric, table in enumerate(BOUND_TABLES.values(), TUN_METRIC + 1):
            yield replace(route, table=table, metric=metric)


def into_tun(tun: Link, destination: IPNetwork, table: int, source: IPAddress) -> Route:
    """A route by the tun, for packets that carry its address.

    Of global scope, though on-link: a gateway that somebody puts into main is looked for by the rules too, among
    routes of link scope (fib_semantics.c, fib_check_nh_v4_gw), and must not be found at the tun.
    """
    return replace(_on_link(destination, table, tun), scope=SCOPE_GLOBAL, prefsrc=source)


def _side_routes(snapshot: Snapshot, sides: Sides, families: Iterable[int]) -> Iterator[Route]:
    for family in families:
        if uplink := sides.uplink(family):
            yield from _copied(snapshot, uplink, family, TABLE_UPLINK)
        if tunnel := sides.tunnel_of(family):
            if tunnel.link.is_layer2:
                # Frames need a neighbour's address: the device's own routes say whose.
                yield from _copied(snapshot, tunnel, family, TABLE_TUNNEL)
            if not tunnel.link.is_layer2 or tunnel.gateway(family) is None:
                yield _on_link(EVERYWHERE[family], TABLE_TUNNEL, tunnel.link)


def _named_routes(sides: Sides, addresses: Iterable[IPInterface]) -> Iterator[Route]:
    # Without a gateway, which the kernel would probe (net/ipv6/route.c, rt6_probe). From the tun's address, as any
    # other packet that is on its way there.
    for address in addresses:
        if address.version == 6:
            for rank, side in enumerate(filter(None, (sides.uplink(6), sides.tunnel_of(6)))):
                route = _on_link(EVERYWHERE[6], TABLE_NAMED, side.link)
                yield replace(route, metric=TUN_METRIC + rank, prefsrc=address.ip)


def _copied(snapshot: Snapshot, side: SideFacts, family: int, table: int) -> Iterator[Route]:
    """What main knows of this device alone: on-link prefixes first, so that gateways are reachable when they come."""
    own = [
        route
        for route in snapshot.routes_of(TABLE_MAIN)
        if route.oif == side.link.index and route.family == family and route.type == RouteType.UNICAST
    ]
    prefixes = [route.destination for route in own if route.gateway is None]
    # Of several routers with one metric the first one stays (`_unique`): the one that is to be preferred.
    for route in sorted(own, key=lambda route: (route.gateway is not None, -route.preference)):
        yield replace(
            route,
            table=table,
            protocol=ROUTE_PROTOCOL,
            preference=0,
            metric=route.metric or (IPV6_METRIC if family == 6 else 0),
            onlink=_is_hidden(route.gateway, prefixes),
        )


def _is_hidden(gateway: IPAddress | None, prefixes: Iterable[IPNetwork]) -> bool:
    """Whether a gateway is on-link by main's word alone, and no prefix of its device covers it.

    Where one does, the kernel shall find it there: told `onlink`, it would ask main again, where the prefix may be
    someone else's (ip6_route_check_nh_onlink). A link-local gateway is never looked for.
    """
    return gateway is not None and not gateway.is_link_local and not within(ip_network(gateway), prefixes)


def _transport(settings: SteeringSettings, family: int) -> Iterator[Rule]:
    """The VPN's own packets, by mark and endpoint where both are known, else by mark, else by endpoint and owner."""
    rule = transport_rule(family)
    endpoints = [endpoint for endpoint in settings.endpoints if endpoint.address.version == family]
    if settings.fwmark is not None and not settings.endpoints:
        yield replace(rule, fwmark=settings.fwmark)
    for endpoint in endpoints:
        to = replace(rule, to=ip_network(endpoint.address), ipproto=endpoint.protocol)
        if settings.fwmark is not None:
            # Without the port: before Linux 6.2 a reverse-path look-up of the answer, which carries the mark where
            # the VPN's client restores it, has the ports the other way round. The firewall is exact.
            yield replace(to, fwmark=settings.fwmark)
            continue
        for uid in dict.fromkeys((0, settings.transport_uid)):
            yield replace(to, dport=(endpoint.port, endpoint.port), uidrange=(uid, uid))


def _ruleset_facts(
    settings: SteeringSettings,
    snapshot: Snapshot,
    sides: Sides,
    tun: TunFacts,
    forwarded: TunFacts,
    lan: Lan,
    guests: Guests,
) -> RulesetFacts:
    return RulesetFacts(
        uplinks=_uplink_names(settings, sides),
        tunnel=settings.tunnel,
        tun=tun.link.name,
        bridges=tuple(sorted(link.name for link in snapshot.links if link.kind == "bridge" and can_hold(link.name))),
        tun_addresses=tuple(address.ip for address in tun.addresses),
        forwarded=forwarded.link.name,
        forwarded_addresses=tuple(address.ip for address in forwarded.addresses),
        guests=guests.devices,
        fwmark=settings.fwmark,
        endpoints=tuple((endpoint.address, endpoint.protocol, endpoint.port) for endpoint in settings.endpoints),
        transport_uids=tuple(dict.fromkeys((0, settings.transport_uid))),
        lan_allow=settings.lan_allow,
        lan_networks=lan.networks,
        lan_holes=lan.holes,
        lan_discovery=settings.lan_discovery,
        firewall=settings.firewall,
        uid=settings.uid,
    )


def _on_link(destination: IPNetwork, table: int, link: Link) -> Route:
    scope = SCOPE_LINK if destination.version == 4 else SCOPE_GLOBAL
    return Route(destination, table, link.index, metric=TUN_METRIC, protocol=ROUTE_PROTOCOL, scope=scope)


def _unique(routes: Iterable[Route]) -> list[Route]:
    """One route for each destination and metric of a table: the first (of a multipath route, its first hop)."""
    found: dict[tuple[int, IPNetwork, int], Route] = {}
    for route in routes:
        found.setdefault((route.table, route.destination, route.metric), route)
    return list(found.values())
