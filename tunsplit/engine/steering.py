"""What the host has to look like for every packet to reach the side that it belongs to.

Theory of operation. The main table is never consulted for an app's packet: DHCP, router advertisements and the VPN's
server write there (KERNEL facts in tests/facts/). Instead a block of rules at fixed priorities leads to tables of our
own, and its last rule closes the way:

    75  marked as a side's own             → that side's table
    76  marked as steered                  → the tun
    77  the VPN's own transport            → the uplink's table
    78  DHCP                               → the uplink's table
    79  ports 53 and 853                   → the tun
    80  local network, if allowed          → the local network's table
    81  everything else of this host       → the tun
    82  IPv6 datagrams that name a device  → that device, where nftables marks them for the tun
    83  what this host forwards            → refused
    84  what else names a device           → unreachable

`iif lo` on a rule means "sent by this host" (net/core/fib_rules.c: flowi_iif is lo's for local output and for
reverse-path look-ups). Every table ends in `unreachable default` at a metric worse than any, so that a device that
vanishes closes its way and nothing falls through to a later rule.

A look-up that names a device finds no route of another: of IPv6 it falls through to the end of the block, and IPv4 then
takes its destination for on-link (net/ipv4/route.c, ip_route_output_key_hash_rcu). What is to be steered has to find a
way first, so that nftables meets it; IPv6 is given one for datagrams alone, and once: the mark that steers does not
match it, so that a socket that is bound to the device finds nothing the second time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, ip_network

from tunsplit.engine.lan import Lan, find_lan, within
from tunsplit.engine.ruleset import RulesetFacts, rulesets
from tunsplit.engine.sides import AUTO, SideFacts, Sides
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
    Sysctl,
    TunFacts,
)
from tunsplit.names import (
    MARK_STEER,
    MARK_TUNNEL,
    MARK_UPLINK,
    NAT_FIRST,
    NAT_LAST,
    PRIORITY_DHCP,
    PRIORITY_DNS,
    PRIORITY_FORWARDED,
    PRIORITY_LAN,
    PRIORITY_MARKED,
    PRIORITY_NAMED,
    PRIORITY_STEERED,
    PRIORITY_TRANSPORT,
    PRIORITY_TUN,
    PRIORITY_UNREACHABLE,
    ROUTE_PROTOCOL,
    TABLE_FORWARDED,
    TABLE_LAN,
    TABLE_NAMED,
    TABLE_TUN,
    TABLE_TUNNEL,
    TABLE_UPLINK,
    TABLES,
)

TCP, UDP, ICMPV6 = 6, 17, 58
DNS_PORTS = (53, 853)
DHCP_PORTS = {4: (68, 67), 6: (546, 547)}  # client, server

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
    uid: int = 0  # the daemon's own


def plan(settings: SteeringSettings, snapshot: Snapshot, sides: Sides, tun: TunFacts) -> HostPlan:
    """Say what the host has to look like now. A family of the tun takes effect only while a side has it.

    Where the tun does not exist nothing leads into it, and what is to go there is refused.
    """
    families = [family for family in sides.families if family == 4 or snapshot.ipv6_enabled]
    closed = [family for family in FAMILIES if family == 4 or snapshot.ipv6_enabled]
    addresses = tuple(address for address in tun.addresses if address.version in families)
    reachable = addresses if tun.link.exists else ()
    lan = _lan(settings, snapshot, sides, tun) if settings.lan_allow else Lan()
    routes = [
        *_closing(closed),
        *_tun_routes(tun.link, reachable),
        *_side_routes(snapshot, sides, families),
        *_named_routes(sides, reachable),
        *lan.routes(),
    ]
    rules = [rule for family in closed for rule in _rules(settings, family)]
    if snapshot.ipv6 and not snapshot.ipv6_enabled:
        # Switched on for one device behind our back, IPv6 finds its way closed.
        rules.append(Rule(6, PRIORITY_UNREACHABLE, Action.UNREACHABLE, protocol=ROUTE_PROTOCOL))
    return HostPlan(
        tun=tun.link,
        tun_mtu=sides.mtu,
        tun_addresses=addresses,
        routes=tuple(_unique(routes)),
        rules=tuple(rules),
        sysctls=tuple(_sysctls(snapshot, sides, tun.link)),
        rulesets=rulesets(_ruleset_facts(settings, snapshot, sides, tun, lan)),
    )


def _lan(settings: SteeringSettings, snapshot: Snapshot, sides: Sides, tun: TunFacts) -> Lan:
    not_local = [
        *(address.network for address in tun.addresses),
        *(ip_network(resolver) for resolver in settings.resolvers),
        *(ip_network(endpoint.address) for endpoint in settings.endpoints),
    ]
    return find_lan(snapshot, sides, not_local=not_local, listed=settings.lan_routes)


def _closing(families: Iterable[int]) -> Iterator[Route]:
    for family in families:
        for table in TABLES:
            if table in (TABLE_LAN, TABLE_NAMED):
                continue  # what is not in them goes on to the next rule
            yield Route(
                EVERYWHERE[family], table, metric=LAST_METRIC, type=RouteType.UNREACHABLE, protocol=ROUTE_PROTOCOL
            )


def _tun_routes(tun: Link, addresses: Iterable[IPInterface]) -> Iterator[Route]:
    for address in addresses:
        # Of global scope, though on-link: a gateway that somebody puts into main is looked for by the rules too, among
        # routes of link scope (fib_semantics.c, fib_check_nh_v4_gw), and must not be found at the tun.
        yield replace(_on_link(EVERYWHERE[address.version], TABLE_TUN, tun), scope=SCOPE_GLOBAL, prefsrc=address.ip)


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
    for route in sorted(own, key=lambda route: route.gateway is not None):
        yield replace(
            route,
            table=table,
            protocol=ROUTE_PROTOCOL,
            metric=route.metric or (IPV6_METRIC if family == 6 else 0),
            onlink=_is_hidden(route.gateway, prefixes),
        )


def _is_hidden(gateway: IPAddress | None, prefixes: Iterable[IPNetwork]) -> bool:
    """Whether a gateway is on-link by main's word alone, and no prefix of its device covers it.

    Where one does, the kernel shall find it there: told `onlink`, it would ask main again, where the prefix may be
    someone else's (ip6_route_check_nh_onlink). A link-local gateway is never looked for.
    """
    return gateway is not None and not gateway.is_link_local and not within(ip_network(gateway), prefixes)


def _rules(settings: SteeringSettings, family: int) -> Iterator[Rule]:
    local = Rule(family, 0, iif="lo", protocol=ROUTE_PROTOCOL)
    yield replace(local, priority=PRIORITY_MARKED, fwmark=MARK_UPLINK, table=TABLE_UPLINK)
    yield replace(local, priority=PRIORITY_MARKED, fwmark=MARK_TUNNEL, table=TABLE_TUNNEL)
    yield replace(local, priority=PRIORITY_STEERED, fwmark=MARK_STEER, table=TABLE_TUN)
    yield from _transport(settings, replace(local, priority=PRIORITY_TRANSPORT, table=TABLE_UPLINK))
    client, server = DHCP_PORTS[family]
    yield replace(
        local, priority=PRIORITY_DHCP, ipproto=UDP, sport=(client, client), dport=(server, server), table=TABLE_UPLINK
    )
    for port in DNS_PORTS:
        for protocol in (UDP, TCP):
            yield replace(local, priority=PRIORITY_DNS, ipproto=protocol, dport=(port, port), table=TABLE_TUN)
    if settings.lan_allow:
        yield replace(local, priority=PRIORITY_LAN, table=TABLE_LAN)
    yield replace(local, priority=PRIORITY_TUN, table=TABLE_TUN)
    if family == 6:
        # TCP names a device by being bound to it alone, and is refused at once.
        for protocol in (UDP, ICMPV6):
            yield replace(local, priority=PRIORITY_NAMED, fwmark=0, ipproto=protocol, table=TABLE_NAMED)
    yield Rule(family, PRIORITY_FORWARDED, table=TABLE_FORWARDED, protocol=ROUTE_PROTOCOL)
    if family == 4:
        # By a table, whose route has global scope: the search for a gateway goes on to main, and finds it. IPv6 looks
        # into main first (ip6_route_check_nh).
        yield Rule(family, PRIORITY_UNREACHABLE, table=TABLE_FORWARDED, protocol=ROUTE_PROTOCOL)
    else:
        yield Rule(family, PRIORITY_UNREACHABLE, Action.UNREACHABLE, protocol=ROUTE_PROTOCOL)


def _transport(settings: SteeringSettings, rule: Rule) -> Iterator[Rule]:
    """The VPN's own packets, by mark and endpoint where both are known, else by mark, else by endpoint and owner."""
    endpoints = [endpoint for endpoint in settings.endpoints if endpoint.address.version == rule.family]
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


def _sysctls(snapshot: Snapshot, sides: Sides, tun: Link) -> Iterator[Sysctl]:
    yield Sysctl("net/ipv4/ip_local_reserved_ports", f"{NAT_FIRST}-{NAT_LAST}", is_list=True)
    # Answers of a local router's ICMP come out of the tun, and their reverse path is not the tun: strict would lose
    # path MTU discovery.
    yield Sysctl(f"net/ipv4/conf/{tun.name}/rp_filter", "2")
    tunnel = sides.tunnel.link if sides.tunnel else None
    uplinks = [uplink.link for uplink in sides.uplinks]
    for link in [*uplinks, *([tunnel] if tunnel else [])]:
        # What comes in is marked, and the mark takes part in the reverse look-up: strict rp_filter keeps working.
        yield Sysctl(f"net/ipv4/conf/{link.name}/src_valid_mark", "1")
    for link in uplinks:
        # Neither answers for the tunnel's and the tun's addresses, nor asks in their name (CVE-2019-14899).
        yield Sysctl(f"net/ipv4/conf/{link.name}/arp_ignore", "1", good=frozenset({"2", "8"}))
        yield Sysctl(f"net/ipv4/conf/{link.name}/arp_announce", "2")
    if snapshot.ipv6_enabled:
        yield Sysctl(f"net/ipv6/conf/{tun.name}/disable_ipv6", "0")
        # No link-local address: router solicitations and multicast listener reports would come out of the tun.
        yield Sysctl(f"net/ipv6/conf/{tun.name}/addr_gen_mode", "1")
        for name in [tun.name, *([tunnel.name] if tunnel else [])]:
            # What the VPN's server writes into the device could otherwise give the tunnel routes and addresses.
            yield Sysctl(f"net/ipv6/conf/{name}/accept_ra", "0")
            yield Sysctl(f"net/ipv6/conf/{name}/accept_redirects", "0")
    for name in [tun.name, *([tunnel.name] if tunnel else [])]:
        yield Sysctl(f"net/ipv4/conf/{name}/accept_redirects", "0")


def _ruleset_facts(
    settings: SteeringSettings, snapshot: Snapshot, sides: Sides, tun: TunFacts, lan: Lan
) -> RulesetFacts:
    named = () if settings.uplink == AUTO else (settings.uplink,)
    return RulesetFacts(
        uplinks=tuple(dict.fromkeys((*named, *(uplink.link.name for uplink in sides.uplinks)))),
        tunnel=settings.tunnel,
        tun=tun.link.name,
        bridges=tuple(sorted(link.name for link in snapshot.links if link.kind == "bridge")),
        tun_addresses=tuple(address.ip for address in tun.addresses),
        tunnel_addresses=tuple(address.ip for address in sides.tunnel.addresses) if sides.tunnel else (),
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
