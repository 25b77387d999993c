"""Rtnetlink on a real host: what is written is read back the same, and what happens is heard."""

import errno
import socket
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hosts import (
    FAR4,
    FAR6,
    HOST4,
    HOST6,
    LAN4,
    ROUTER4,
    ROUTER6,
    TUN,
    TUNNEL,
    UPLINK,
)
from tunsplit.errors import KernelError
from tunsplit.host import (
    SCOPE_LINK,
    TABLE_MAIN,
    Action,
    NextHop,
    Route,
    RouteType,
    Rule,
)
from tunsplit.kernel import rtmessages
from tunsplit.kernel.netlink import (
    NLM_F_CREATE,
    NetlinkSocket,
    Refused,
    attribute,
    attributes,
    iterate_messages,
)
from tunsplit.kernel.rtnetlink import NETLINK_ROUTE
from tunsplit.names import ROUTE_PROTOCOL

pytestmark = pytest.mark.netns

TABLE = 7501


def test_a_snapshot_shows_links_addresses_routes_and_rules(host, rtnetlink):
    now = rtnetlink.snapshot()
    links = {link.name: link for link in now.links}

    assert ("veth", True, True, 1500) == (
        links[UPLINK].kind,
        links[UPLINK].up,
        links[UPLINK].is_layer2,
        links[UPLINK].mtu,
    )
    assert ("tun", False, None) == (links[TUNNEL].kind, links[TUNNEL].is_layer2, links[TUNNEL].mac)
    assert (False, True) == (links[TUN].up, links["lo"].is_loopback)
    assert now.link_at(links[UPLINK].index) == links[UPLINK]
    assert {ip_interface(f"{HOST4}/24"), ip_interface(f"{HOST6}/64")} == {
        one.interface for one in now.addresses_of(links[UPLINK]) if one.is_global
    }
    gateways = {route.gateway for route in now.routes_of(TABLE_MAIN) if route.is_default}
    assert {ip_address(ROUTER4), ip_address(ROUTER6)} == gateways
    assert [0, 32766, 32767] == [rule.priority for rule in now.rules if rule.family == 4]
    assert (True, True) == (now.ipv6, now.ipv6_enabled)


def test_a_port_names_its_bridge_and_a_peer_elsewhere_is_nobody(host, rtnetlink):
    host.ip("link add br0 type bridge")
    host.ip(f"link set {UPLINK} master br0")
    host.ip("link add here type veth peer name there")
    host.ip("link set here arp off")
    links = {link.name: link for link in rtnetlink.links()}

    assert (links["br0"].index, 0) == (links[UPLINK].master, links["br0"].master)
    assert (0, links["there"].index) == (links[UPLINK].below, links["here"].below)
    assert (True, False) == (links["here"].is_noarp, links["there"].is_noarp)
    assert not any(link.is_on_bus for link in links.values())


def test_a_card_is_on_a_bus():
    """As the attribute says (net/core/rtnetlink_module.c, rtnl_fill_ifinfo); no test network has one."""
    body = rtmessages.IFINFOMSG.pack(0, 1, 2, 0, 0) + attribute(rtmessages.IFLA_IFNAME, b"eth0\0")

    assert rtmessages.decode_link(body + attribute(rtmessages.IFLA_PARENT_DEV_NAME, b"0000:00:05.0\0")).is_on_bus
    assert not rtmessages.decode_link(body).is_on_bus


@pytest.mark.parametrize(("word", "preference"), [("low", -1), ("medium", 0), ("high", 1)])
def test_a_router_that_is_to_be_preferred_is_known(host, rtnetlink, word, preference):
    host.ip(f"-6 route add 2001:db8:9::/48 via {ROUTER6} pref {word}")

    (found,) = [one for one in rtnetlink.routes(6, TABLE_MAIN) if one.destination == ip_network("2001:db8:9::/48")]
    assert preference == found.preference


def test_the_address_of_a_point_to_point_link_is_ours_and_not_the_peers(host, rtnetlink):
    host.ip(f"address add 10.8.0.6 peer 10.8.0.5 dev {TUNNEL}")

    assert ip_interface("10.8.0.6/32") in [address.interface for address in rtnetlink.addresses(4)]


def test_a_tentative_address_is_not_global_yet(host, rtnetlink):
    host.sysctl("net/ipv6/conf/eth0/accept_dad", "1")
    host.ip("address add 2001:db8:50::77/64 dev eth0")

    (found,) = [one for one in rtnetlink.addresses(6) if one.interface == ip_interface("2001:db8:50::77/64")]
    assert (True, False) == (found.tentative, found.is_global)


def routes(index: int) -> list[Route]:
    via4, via6 = ip_address(ROUTER4), ip_address(ROUTER6)
    found = [
        Route(ip_network("10.0.0.0/8"), oif=index, scope=SCOPE_LINK, prefsrc=ip_address(HOST4)),
        Route(ip_network("0.0.0.0/0"), oif=index, gateway=via4, mtu=1400),
        Route(ip_network("0.0.0.0/0"), oif=index, gateway=via4, metric=7, mtu=1400, advmss=1300),
        Route(ip_network("10.9.0.0/16"), oif=index, gateway=ip_address("172.20.0.1"), onlink=True),
        Route(ip_network("10.8.0.0/16"), oif=index, gateway=via6),
        Route(ip_network("0.0.0.0/0"), metric=4278198272, type=RouteType.UNREACHABLE),
        Route(ip_network("10.7.0.0/16"), metric=3, type=RouteType.THROW),
        Route(ip_network("2001:db8:7::/48"), oif=index, metric=9, prefsrc=ip_address(HOST6)),
        Route(ip_network("::/0"), oif=index, gateway=via6, metric=1024),
        Route(ip_network("::/0"), metric=4278198272, type=RouteType.UNREACHABLE),
        Route(ip_network("2001:db8:8::/48"), metric=5, type=RouteType.BLACKHOLE),
    ]
    return [replace(route, table=TABLE, protocol=ROUTE_PROTOCOL) for route in found]


def test_a_route_is_read_back_as_it_was_written(rtnetlink, eth0):
    for route in routes(eth0):
        rtnetlink.replace_route(route)
        rtnetlink.replace_route(route)

    assert set(routes(eth0)) == {*rtnetlink.routes(4, TABLE), *rtnetlink.routes(6, TABLE)}
    for route in routes(eth0):
        rtnetlink.delete_route(route)
        rtnetlink.delete_route(route)
    assert [] == [*rtnetlink.routes(4, TABLE), *rtnetlink.routes(6, TABLE)]


def test_a_route_takes_the_place_of_one_of_its_metric(host, rtnetlink, eth0):
    for family, first, second in ((4, ROUTER4, "192.168.50.9"), (6, ROUTER6, "2001:db8:50::9")):
        default = ip_network("0.0.0.0/0" if family == 4 else "::/0")
        for gateway in (first, second):
            rtnetlink.replace_route(Route(default, TABLE, eth0, ip_address(gateway), 1024))
        rtnetlink.delete_route(Route(default, TABLE, eth0, ip_address(first), 1024))

        assert [ip_address(second)] == [route.gateway for route in rtnetlink.routes(family, TABLE)]


def test_every_hop_of_a_multipath_route_is_seen(host, rtnetlink):
    host.ip(f"route add 10.0.0.0/8 table {TABLE} nexthop via {ROUTER4} dev eth0 nexthop dev {TUNNEL}")
    found = rtnetlink.routes(4, TABLE)

    assert [ip_address(ROUTER4), None] == [route.gateway for route in found]
    assert 2 == len({route.oif for route in found})


def test_a_table_that_was_never_used_is_empty(rtnetlink):
    assert [] == [*rtnetlink.routes(4, 4711), *rtnetlink.routes(6, 4711)]


RULES = [
    Rule(4, 75, fwmark=0x7501, iif="lo", table=TABLE, protocol=117),
    Rule(4, 77, to=ip_network("203.0.113.0/24"), ipproto=17, dport=(1, 9), sport=(5, 5), table=1, protocol=117),
    Rule(4, 77, uidrange=(0, 9), table=1, protocol=117),
    Rule(4, 78, source=ip_network("10.0.0.0/8"), oif="eth0", action=Action.UNREACHABLE, protocol=117),
    Rule(6, 75, fwmark=9, to=ip_network("2001:db8::/32"), table=TABLE, protocol=117),
    Rule(6, 82, fwmark=0, ipproto=58, table=TABLE, protocol=117),
    Rule(6, 84, action=Action.UNREACHABLE, protocol=117),
]  # fmt: skip


def test_a_rule_is_read_back_as_it_was_written(rtnetlink):
    for rule in RULES:
        rtnetlink.add_rule(rule)
        rtnetlink.add_rule(rule)

    assert RULES == [rule for rule in [*rtnetlink.rules(4), *rtnetlink.rules(6)] if rule.protocol == 117]
    for rule in RULES:
        rtnetlink.delete_rule(rule)
        rtnetlink.delete_rule(rule)
    assert [] == [rule for rule in [*rtnetlink.rules(4), *rtnetlink.rules(6)] if rule.protocol == 117]


def test_an_address_is_usable_at_once_and_brings_no_route(rtnetlink, eth0):
    before = rtnetlink.routes(4, TABLE_MAIN), rtnetlink.routes(6, TABLE_MAIN)
    for text in ("10.128.0.1/32", "2001:2:0:5::1/128"):
        rtnetlink.add_address(eth0, ip_interface(text))
        rtnetlink.add_address(eth0, ip_interface(text))
        (found,) = [
            one for one in rtnetlink.addresses(ip_interface(text).version) if one.interface == ip_interface(text)
        ]

        assert found.is_global
        rtnetlink.delete_address(eth0, ip_interface(text))
        rtnetlink.delete_address(eth0, ip_interface(text))
    assert before == (rtnetlink.routes(4, TABLE_MAIN), rtnetlink.routes(6, TABLE_MAIN))


def test_a_link_is_changed_and_removed(host, rtnetlink, eth0):
    rtnetlink.link_set(eth0, mtu=1400, group=7)
    link = host.link(UPLINK)
    assert (1400, 7, True) == (link.mtu, link.group, link.up)

    rtnetlink.link_set(eth0, up=False, addr_gen_mode=1)
    assert (False, "1") == (host.link(UPLINK).up, host.sysctl("net/ipv6/conf/eth0/addr_gen_mode"))

    rtnetlink.delete_link(link)
    rtnetlink.delete_link(link)
    assert rtnetlink.snapshot().link(UPLINK) is None


def test_the_way_is_the_kernels_answer(host, rtnetlink, eth0):
    assert NextHop(ip_address(ROUTER4), ip_address(HOST4), eth0) == rtnetlink.route_get(ip_address(FAR4))
    assert NextHop(None, ip_address(HOST4), eth0) == rtnetlink.route_get(ip_address(LAN4), oif=eth0)
    assert NextHop(ip_address(ROUTER6), ip_address(HOST6), eth0) == rtnetlink.route_get(ip_address(FAR6))
    host.ip("rule add fwmark 5 unreachable")
    host.ip("-6 route add unreachable 2001:db8:dead::/48")
    assert rtnetlink.route_get(ip_address(FAR4), mark=5) is None
    assert rtnetlink.route_get(ip_address("2001:db8:dead::1")) is None


def test_an_address_is_local_on_whichever_device_or_by_a_route(host, rtnetlink):
    host.ip("-6 route add unreachable 2001:db8:dead::/48")
    host.ip("route add local 198.18.0.0/15 dev lo")
    for address in (HOST4, HOST6, "198.18.0.1"):
        assert rtnetlink.is_local(ip_address(address))
    for address in (FAR4, ROUTER6, "2001:db8:dead::1"):
        assert not rtnetlink.is_local(ip_address(address))


def test_the_way_tells_a_narrower_path(host, rtnetlink):
    host.ip(f"route add 198.18.0.0/15 via {ROUTER4} mtu 1300")

    hop = rtnetlink.route_get(ip_address("198.18.0.1"))
    assert hop is not None
    assert 1300 == hop.mtu


def test_a_refusal_names_the_call_the_object_and_the_kernels_reason(rtnetlink):
    with pytest.raises(
        Refused, match=r"add unicast route 10\.0\.0\.0/8 via 1\.1\.1\.1 in table 7501: .*invalid gateway"
    ) as refused:
        rtnetlink.replace_route(Route(ip_network("10.0.0.0/8"), TABLE, gateway=ip_address("1.1.1.1")))
    assert errno.ENETUNREACH == refused.value.errno
    with pytest.raises(KernelError, match="add IPv4 rule 75"):
        rtnetlink.add_rule(Rule(4, 75, action=Action.GOTO))
    with pytest.raises(KernelError, match="change device 4711: No such device"):
        rtnetlink.link_set(4711, up=True)


def test_what_means_nothing_to_the_kernel_is_nothing_to_us(host, rtnetlink):
    """It takes routes of types and rules of actions that it does not know, and shows them to everybody."""
    before = rtnetlink.snapshot()
    host.ip("route add xresolve 198.18.0.1 scope nowhere")
    host.ip(f"-6 route add xresolve 2001:db8:18::/48 dev {UPLINK}")
    with NetlinkSocket(NETLINK_ROUTE) as odd:
        body = rtmessages.FIB_RULE_HDR.pack(socket.AF_INET, 0, 0, 0, 0, 77, 0)
        body += attribute(rtmessages.FRA_PRIORITY, rtmessages.U32.pack(77))
        odd.request("a rule", rtmessages.RTM_NEWRULE, NLM_F_CREATE, body)

    assert "xresolve 198.18.0.1" in host.ip("route show scope nowhere")
    assert "77:" in host.ip("rule show priority 77")
    after = rtnetlink.snapshot()
    assert (before.routes, before.rules) == (after.routes, after.rules)


# Bytes.


@given(st.binary(max_size=200))
def test_no_bytes_make_the_framing_fail(data):
    attributes(data)
    list(iterate_messages(data))


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=40)), unique_by=lambda item: item[0]))
def test_attributes_are_read_back_as_they_were_written(items):
    data = b"".join(attribute(kind, value) for kind, value in items)

    assert dict(items) == attributes(data)


def test_objects_of_other_families_are_nothing():
    header = bytes([129]) + bytes(31)  # a multicast routing rule, an MPLS route

    assert rtmessages.decode_rule(header) is None
    assert rtmessages.decode_address(header) is None
    assert rtmessages.decode_neighbour(header) is None
    assert [] == list(rtmessages.decode_routes(header))
