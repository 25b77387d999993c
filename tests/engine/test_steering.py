"""What the host has to look like, decided from what it looks like."""

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from tests.engine.plans import ADDRESSES, LAN, RELAY, SETTINGS, WITH_GUESTS, planned, rules, table
from tests.snapshots import (
    ETH0,
    HOST,
    ROUTES4,
    ROUTES6,
    TUN,
    TUNNEL4,
    TUNNEL6,
    UPLINK4,
    UPLINK6,
    WG0,
    on_link,
    via,
)
from tunsplit.host import Action, Address, Route, RouteType, Snapshot
from tunsplit.names import (
    PRIORITY_BOUND,
    PRIORITY_NAMED,
    PRIORITY_UNREACHABLE,
    ROUTE_PROTOCOL,
    TABLE_BOUND_TUNNEL,
    TABLE_BOUND_UPLINK,
    TABLE_FORWARDED,
    TABLE_GUESTS,
    TABLE_LAN,
    TABLE_NAMED,
    TABLE_TUN,
    TABLE_TUNNEL,
    TABLE_UPLINK,
    TABLES,
)

MATRIX = [
    # uplink4 tunnel4 uplink6 tunnel6 → families of the tun, of the uplink's table, of the tunnel's table
    ((1, 1, 1, 1), {4, 6}, {4, 6}, {4, 6}),
    ((1, 1, 0, 0), {4}, {4}, {4}),
    ((1, 1, 1, 0), {4, 6}, {4, 6}, {4}),
    ((1, 1, 0, 1), {4, 6}, {4}, {4, 6}),
    ((0, 0, 1, 1), {6}, {6}, {6}),
    ((1, 0, 1, 1), {4, 6}, {4, 6}, {6}),
    ((0, 1, 1, 1), {4, 6}, {6}, {4, 6}),
    ((0, 1, 1, 0), {4, 6}, {6}, {4}),
    ((1, 0, 0, 1), {4, 6}, {4}, {6}),
]


@pytest.mark.parametrize(("present", "tun", "uplink", "tunnel"), MATRIX)
def test_a_family_is_routed_where_a_side_has_it_and_closed_everywhere(present, tun, uplink, tunnel):
    up4, down4, up6, down6 = present
    host = replace(
        HOST,
        addresses=UPLINK4 * up4 + TUNNEL4 * down4 + UPLINK6 * up6 + TUNNEL6 * down6,
        routes=ROUTES4 * up4 + ROUTES6 * up6,
    )
    wanted = planned(host)

    def families(number: int) -> set[int]:
        return {
            route.family
            for route in wanted.routes
            if route.table == number and route.is_default and route.type == RouteType.UNICAST
        }

    assert (tun, uplink, tunnel) == (families(TABLE_TUN), families(TABLE_UPLINK), families(TABLE_TUNNEL))
    assert tun == families(TABLE_FORWARDED)
    assert [tun, tun] == [{address.version for address in one.addresses} for one in wanted.tuns]
    closing = {(route.table, route.family) for route in wanted.routes if route.type == RouteType.UNREACHABLE}
    assert tun == families(TABLE_BOUND_UPLINK) == families(TABLE_BOUND_TUNNEL)
    closed = set(TABLES) - {TABLE_LAN, TABLE_NAMED, TABLE_GUESTS, TABLE_BOUND_UPLINK, TABLE_BOUND_TUNNEL}
    assert {(number, family) for number in closed for family in (4, 6)} == closing
    assert len(uplink & {6}) + len(tunnel & {6}) == len(table(wanted, TABLE_NAMED))


def test_the_uplinks_table_is_what_main_knows_of_the_uplink_alone():
    host = replace(
        HOST,
        routes=(
            *ROUTES4,
            *ROUTES6,
            via("100.64.0.0/10", "192.168.50.9"),
            via("0.0.0.0/1", "10.64.0.1", oif=3),
            on_link("10.0.0.0/8", oif=3),
            Route(ip_network("192.0.2.0/24"), oif=None, type=RouteType.BLACKHOLE),
            via("198.51.100.0/24", "172.20.0.1"),  # on-link by main's word alone
            via("2001:db8:7::/48", "fe80::1"),
        ),
    )

    assert [
        "192.168.50.0/24 dev 2",
        "default4 via 192.168.50.1 dev 2",
        "100.64.0.0/10 via 192.168.50.9 dev 2",
        "198.51.100.0/24 via 172.20.0.1 dev 2 onlink",
        "2001:db8:50::/64 dev 2",
        "default6 via 2001:db8:50::1 dev 2",
        "2001:db8:7::/48 via fe80::1 dev 2",
    ] == table(planned(host), TABLE_UPLINK)


def test_of_two_hops_of_one_route_the_first_is_taken():
    host = replace(HOST, routes=(via("0.0.0.0/0", "192.168.50.1"), via("0.0.0.0/0", "192.168.50.9"), ROUTES4[1]))

    assert ["192.168.50.0/24 dev 2", "default4 via 192.168.50.1 dev 2"] == table(planned(host), TABLE_UPLINK)


def test_of_two_routers_the_one_that_is_to_be_preferred_is_taken():
    """RFC 4191 §2.1: as the kernel would, which shows no such thing of our own routes."""
    low, high = via("::/0", "fe80::a", metric=1024), replace(via("::/0", "fe80::b", metric=1024), preference=1)
    host = replace(HOST, routes=(low, high))

    assert ["default6 via fe80::b dev 2"] == table(planned(host), TABLE_UPLINK)
    assert {0} == {route.preference for route in planned(host).routes}


def test_everything_carries_our_protocol():
    wanted = planned(WITH_GUESTS, settings=LAN)

    assert {ROUTE_PROTOCOL} == {route.protocol for route in wanted.routes} | {rule.protocol for rule in wanted.rules}
    assert set(TABLES) == {route.table for route in wanted.routes}


def test_a_tunnel_with_ethernet_uses_its_own_gateway():
    tap = replace(WG0, is_layer2=True)
    host = replace(
        HOST,
        links=(ETH0, tap, TUN),
        addresses=(*UPLINK4, Address(3, ip_interface("10.8.0.2/24"))),
        routes=(*ROUTES4, on_link("10.8.0.0/24", 3), via("0.0.0.0/0", "10.8.0.1", 3, 50)),
    )
    bare = replace(host, routes=(*ROUTES4, on_link("10.8.0.0/24", 3)))

    assert ["10.8.0.0/24 dev 3", "default4 via 10.8.0.1 dev 3"] == table(planned(host), TABLE_TUNNEL)
    assert ["10.8.0.0/24 dev 3", "default4 dev 3"] == table(planned(bare), TABLE_TUNNEL)


def test_what_carries_an_address_of_a_side_comes_by_a_route_of_its_own():
    wanted = planned()

    found = {(str(rule.source), rule.table) for rule in wanted.rules if rule.priority == PRIORITY_BOUND}
    assert {
        *((f"{one.interface.ip}/{one.interface.max_prefixlen}", TABLE_BOUND_UPLINK) for one in UPLINK4 + UPLINK6),
        *((f"{one.interface.ip}/{one.interface.max_prefixlen}", TABLE_BOUND_TUNNEL) for one in TUNNEL4 + TUNNEL6),
    } == found
    into = [route for route in wanted.routes if route.oif == TUN.index and route.family == 4]
    assert len(into) == len({route.metric for route in into}) == 3


def test_a_syn_promises_what_the_narrower_side_takes():
    wanted = planned()

    promised = {route.family: route.advmss for route in wanted.routes if route.oif == TUN.index}
    assert {4: wanted.tun_mtu - 40, 6: wanted.tun_mtu - 60} == promised


def test_a_datagram_that_names_a_device_finds_it_until_it_is_marked_for_the_tun():
    wanted = planned()

    assert ["default6 dev 2", "default6 dev 3"] == table(wanted, TABLE_NAMED)
    assert {ADDRESSES[1].ip} == {route.prefsrc for route in wanted.routes if route.table == TABLE_NAMED}
    assert [(0, 17), (0, 58)] == [(rule.fwmark, rule.ipproto) for rule in rules(wanted, PRIORITY_NAMED, 6)]
    assert [] == rules(wanted, PRIORITY_NAMED, 4)


def test_without_ipv6_only_the_closed_way_is_left_of_it():
    off = planned(replace(HOST, ipv6_enabled=False))
    absent = planned(replace(HOST, ipv6=False, ipv6_enabled=False))

    assert [(PRIORITY_UNREACHABLE, Action.UNREACHABLE)] == [
        (rule.priority, rule.action) for rule in off.rules if rule.family == 6
    ]
    assert [] == [rule for rule in absent.rules if rule.family == 6]
    for wanted in (off, absent):
        assert {4} == {route.family for route in wanted.routes} | {one.version for one in wanted.tun_addresses}
        assert [] == [one.path for one in wanted.sysctls if "ipv6" in one.path]


# The local network.


def test_local_are_the_uplinks_on_link_private_prefixes():
    host = replace(
        HOST,
        addresses=(
            *HOST.addresses,
            Address(2, ip_interface("203.0.113.77/24")),  # public
            Address(2, ip_interface("128.0.0.7/1")),  # a mask that no network has
            Address(2, ip_interface("fd50::2/64")),
        ),
        routes=(*HOST.routes, on_link("172.16.0.0/12")),
    )

    assert {
        "192.168.50.0/24 dev 2", "fd50::/64 dev 2", "fe80::/64 dev 2",
        "224.0.0.0/24 dev 2", "239.0.0.0/8 dev 2", "255.255.255.255/32 dev 2",
    } == set(table(planned(host, LAN), TABLE_LAN))  # fmt: skip
    assert [] == table(planned(host), TABLE_LAN)


def test_what_is_the_tunnels_is_not_local():
    settings = replace(
        LAN,
        resolvers=(ip_address("192.168.50.9"),),
        endpoints=(replace(RELAY, address=ip_address("192.168.50.10")),),
    )
    host = replace(HOST, addresses=(*UPLINK4, Address(3, ip_interface("192.168.50.128/25"))))
    found = table(planned(host, settings), TABLE_LAN)

    assert {"throw 192.168.50.9/32", "throw 192.168.50.10/32", "throw 192.168.50.128/25"} <= set(found)
    same = replace(HOST, addresses=(*UPLINK4, Address(3, ip_interface("192.168.0.1/16"))))
    assert [] == table(planned(same, LAN), TABLE_LAN)


def test_the_local_network_needs_no_tunnel():
    assert "192.168.50.0/24 dev 2" in table(planned(replace(HOST, links=(ETH0, TUN)), LAN), TABLE_LAN)


def test_a_gatewayed_network_is_local_when_listed_and_known_to_the_uplink():
    settings = replace(
        LAN,
        lan_routes=tuple(
            map(ip_network, ("10.20.0.0/16", "10.30.0.0/16", "10.40.0.0/16", "fd20::/64", "192.168.50.128/25"))
        ),
    )
    host = replace(
        HOST,
        addresses=(*UPLINK4, *TUNNEL4),
        routes=(
            *ROUTES4,
            via("10.0.0.0/8", "192.168.50.8"),
            via("10.20.0.0/15", "192.168.50.9"),
            on_link("10.30.0.0/16", oif=3),
            on_link("10.40.0.0/15"),
        ),
    )
    found = table(planned(host, settings), TABLE_LAN)

    assert "10.20.0.0/16 via 192.168.50.9 dev 2 onlink" in found
    assert "10.30.0.0/16 via 192.168.50.8 dev 2 onlink" in found
    assert not [route for route in found if "10.40" in route or "fd20" in route or "50.128" in route]


# The rest.


def test_sysctls_of_both_sides_and_the_tun():
    found = {one.path: one.value for one in planned().sysctls}

    assert "49152-65535" == found["net/ipv4/ip_local_reserved_ports"]
    assert "2" == found["net/ipv4/conf/tunsplit0/rp_filter"]
    assert {"net/ipv4/conf/eth0/src_valid_mark", "net/ipv4/conf/wg0/src_valid_mark"} <= set(found)
    assert ("1", "2") == (found["net/ipv4/conf/eth0/arp_ignore"], found["net/ipv4/conf/eth0/arp_announce"])
    assert ("0", "0") == (found["net/ipv6/conf/wg0/accept_ra"], found["net/ipv6/conf/wg0/accept_redirects"])


def test_without_sides_everything_is_closed_and_nothing_fails():
    wanted = planned(Snapshot(links=(TUN,)))

    assert {RouteType.UNREACHABLE} == {route.type for route in wanted.routes}
    assert () == wanted.tun_addresses
    assert "eth0" not in "".join(wanted.rulesets.values())


def test_a_named_uplink_is_closed_also_before_it_is_there():
    wanted = planned(Snapshot(links=(TUN,)), replace(SETTINGS, uplink="eth7"))

    assert '"eth7"' in wanted.rulesets["inet"]
    assert '"eth7"' in wanted.rulesets["arp"]


def test_a_tunnel_that_is_away_changes_neither_nftables_nor_sysctls():
    here = planned()
    own = tuple(address.interface.ip for address in (*TUNNEL4, *TUNNEL6))
    down = replace(HOST, links=(ETH0, replace(WG0, up=False), TUN))
    gone = Snapshot((ETH0, TUN), (*UPLINK4, *UPLINK6), HOST.routes)
    for away in (down, gone):
        found = planned(away, tunnel_addresses=own)

        assert (here.rulesets, here.sets, here.sysctls) == (found.rulesets, found.sets, found.sysctls)
        assert () == planned(away).sets["inet"]["tunnel4"]  # the control
    assert here.sets["arp"]["tunnel4"] == here.sets["inet"]["tunnel4"] == own[:1]


def test_what_was_the_tunnels_address_may_be_somebody_elses_now():
    (address,) = (one for one in TUNNEL4)
    moved = Snapshot((ETH0, TUN), (*UPLINK4, replace(address, index=ETH0.index)), HOST.routes)

    assert () == planned(moved, tunnel_addresses=[address.interface.ip]).sets["inet"]["tunnel4"]
