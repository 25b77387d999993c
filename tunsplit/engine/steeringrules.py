"""The block of routing rules, before everybody else's.

Theory of operation. Each rule leads to a table of ours, and the last one closes the way:

    72  marked as a side's own             → that side's table
    73  marked as steered                  → the tun
    74  the VPN's own transport            → the uplink's table
    75  the same as 72 and 74              → unreachable
    76  DHCP                               → the uplink's table
    77  ports 53 and 853                   → the tun
    78  local network, if allowed          → the local network's table
        guests                             → the guests' table
    79  single flows whose path is narrow  → the tun
    80  what carries a side's address      → the tun
    81  everything else of this host       → the tun
    82  IPv6 datagrams that name a device  → that device, where nftables marks them for the tun
    83  what came in by a side             → nowhere, without a word
        what guests send                   → the tun of forwarded packets
        what comes out of that one         → the guests' table
    84  what else names a device, or is to be forwarded → unreachable

`iif lo` on a rule means "sent by this host" (net/core/fib_rules.c: flowi_iif is lo's for local output and for
reverse-path look-ups).

Where somebody has emptied a side's table, 75 keeps the VPN's transport out of the tun. It would be carried in the
tunnel that it carries, and the VPN's client would take the tun for the way to its server, also when the table is back.

A look-up that names a device finds no route of another: of IPv6 it falls through to the end of the block, and IPv4 then
takes its destination for on-link (net/ipv4/route.c, ip_route_output_key_hash_rcu). What is to be steered has to find a
way first, so that nftables meets it; IPv6 is given one for datagrams alone, and once: the mark that steers does not
match it, so that a socket that is bound to the device finds nothing the second time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_network

from tunsplit.engine.guests import Guests
from tunsplit.engine.sides import Sides
from tunsplit.host import Action, Rule
from tunsplit.names import (
    MARK_STEER,
    MARK_TUNNEL,
    MARK_UPLINK,
    PRIORITY_BOUND,
    PRIORITY_CLOSED,
    PRIORITY_DHCP,
    PRIORITY_DNS,
    PRIORITY_LAN,
    PRIORITY_MARKED,
    PRIORITY_NAMED,
    PRIORITY_STEERED,
    PRIORITY_TRANSPORT,
    PRIORITY_TUN,
    PRIORITY_UNREACHABLE,
    ROUTE_PROTOCOL,
    TABLE_BOUND_TUNNEL,
    TABLE_BOUND_UPLINK,
    TABLE_LAN,
    TABLE_NAMED,
    TABLE_NOWHERE,
    TABLE_TUN,
    TABLE_TUNNEL,
    TABLE_UPLINK,
)

TCP, UDP, ICMPV6 = 6, 17, 58
DNS_PORTS = (53, 853)
DHCP_PORTS = {4: (68, 67), 6: (546, 547)}  # client, server
BOUND_TABLES = {"uplink": TABLE_BOUND_UPLINK, "tunnel": TABLE_BOUND_TUNNEL}


def transport_rule(family: int) -> Rule:
    """The rule that leads the VPN's transport to the uplink, but for what the transport is known by."""
    return Rule(family, PRIORITY_TRANSPORT, iif="lo", table=TABLE_UPLINK, protocol=ROUTE_PROTOCOL)


def block(
    family: int,
    sides: Sides,
    guests: Guests,
    transport: Iterable[Rule],
    *,
    lan: bool,
    doors: Iterable[str],
    forwarded: str,
) -> Iterator[Rule]:
    """The rules of a family, in their order.

    Args:
        transport: `transport_rule`s.
        lan: whether the local network is reached beside the tunnel.
        doors: the devices by which others' packets come in.
        forwarded: the tun of forwarded packets.
    """
    local = Rule(family, 0, iif="lo", protocol=ROUTE_PROTOCOL)
    marked = [
        replace(local, priority=PRIORITY_MARKED, fwmark=mark, table=table)
        for mark, table in ((MARK_UPLINK, TABLE_UPLINK), (MARK_TUNNEL, TABLE_TUNNEL))
    ]
    transport = list(transport)
    yield from marked
    yield replace(local, priority=PRIORITY_STEERED, fwmark=MARK_STEER, table=TABLE_TUN)
    yield from transport
    for rule in (*marked, *transport):
        yield replace(rule, priority=PRIORITY_CLOSED, action=Action.UNREACHABLE, table=0)
    client, server = DHCP_PORTS[family]
    yield replace(
        local, priority=PRIORITY_DHCP, ipproto=UDP, sport=(client, client), dport=(server, server), table=TABLE_UPLINK
    )
    for port in DNS_PORTS:
        for protocol in (UDP, TCP):
            yield replace(local, priority=PRIORITY_DNS, ipproto=protocol, dport=(port, port), table=TABLE_TUN)
    if lan:
        yield replace(local, priority=PRIORITY_LAN, table=TABLE_LAN)
    yield from guests.near_rules(family)
    for side, table in BOUND_TABLES.items():
        for address in sides.addresses(side):
            if address.version == family:
                yield replace(local, priority=PRIORITY_BOUND, source=ip_network(address.ip), table=table)
    yield replace(local, priority=PRIORITY_TUN, table=TABLE_TUN)
    if family == 6:
        # TCP names a device by being bound to it alone, and is refused at once.
        for protocol in (UDP, ICMPV6):
            yield replace(local, priority=PRIORITY_NAMED, fwmark=0, ipproto=protocol, table=TABLE_NAMED)
    yield from guests.forwarding_rules(family, tun=forwarded, sides=doors)
    if family == 4:
        # By a table, whose route has global scope: the search for a gateway goes on to main, and finds it. IPv6 looks
        # into main first (ip6_route_check_nh).
        yield Rule(family, PRIORITY_UNREACHABLE, table=TABLE_NOWHERE, protocol=ROUTE_PROTOCOL)
    else:
        yield Rule(family, PRIORITY_UNREACHABLE, Action.UNREACHABLE, protocol=ROUTE_PROTOCOL)
