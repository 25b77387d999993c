"""Rtnetlink on a real host: what is written is read back the same, and what happens is heard."""

import errno
import os
import select
import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

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
    own_namespace,
)
from tunsplit.errors import KernelError
from tunsplit.host import (
    SCOPE_LINK,
    TABLE_MAIN,
    Action,
    NeighbourState,
    NextHop,
    Route,
    RouteType,
    Rule,
)
from tunsplit.kernel import rtmessages, rtnetlink
from tunsplit.kernel.netlink import Refused, attribute, attributes, iterate_messages
from tunsplit.kernel.rtnetlink import Change, Event, Rtnetlink, RtnetlinkEvents
from tunsplit.names import ROUTE_PROTOCOL

pytestmark = pytest.mark.netns

TABLE = 7501


@pytest.fixture
def kernel(host) -> Iterator[Rtnetlink]:
    with Rtnetlink() as kernel:
        yield kernel


@pytest.fixture
def eth0(kernel: Rtnetlink) -> int:
    link = kernel.snapshot().link(UPLINK)
    assert link is not None
    return link.index


def test_a_snapshot_shows_links_addresses_routes_and_rules(host, kernel):
    now = kernel.snapshot()
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


def test_the_address_of_a_point_to_point_link_is_ours_and_not_the_peers(host, kernel):
    host.ip(f"address add 10.8.0.6 peer 10.8.0.5 dev {TUNNEL}")

    assert ip_interface("10.8.0.6/32") in [address.interface for address in kernel.addresses(4)]


def test_a_tentative_address_is_not_global_yet(host, kernel):
    host.sysctl("net/ipv6/conf/eth0/accept_dad", "1")
    host.ip("address add 2001:db8:50::77/64 dev eth0")

    (found,) = [one for one in kernel.addresses(6) if one.interface == ip_interface("2001:db8:50::77/64")]
    assert (True, False) == (found.tentative, found.is_global)


def routes(index: int) -> list[Route]:
    via4, via6 = ip_address(ROUTER4), ip_address(ROUTER6)
    found = [
        Route(ip_network("10.0.0.0/8"), oif=index, scope=SCOPE_LINK, prefsrc=ip_address(HOST4)),
        Route(ip_network("0.0.0.0/0"), oif=index, gateway=via4, mtu=1400),
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


def test_a_route_is_read_back_as_it_was_written(kernel, eth0):
    for route in routes(eth0):
        kernel.replace_route(route)
        kernel.replace_route(route)

    assert set(routes(eth0)) == {*kernel.routes(4, TABLE), *kernel.routes(6, TABLE)}
    for route in routes(eth0):
        kernel.delete_route(route)
        kernel.delete_route(route)
    assert [] == [*kernel.routes(4, TABLE), *kernel.routes(6, TABLE)]


def test_a_route_takes_the_place_of_one_of_its_metric(host, kernel, eth0):
    for family, first, second in ((4, ROUTER4, "192.168.50.9"), (6, ROUTER6, "2001:db8:50::9")):
        default = ip_network("0.0.0.0/0" if family == 4 else "::/0")
        for gateway in (first, second):
            kernel.replace_route(Route(default, TABLE, eth0, ip_address(gateway), 1024))
        kernel.delete_route(Route(default, TABLE, eth0, ip_address(first), 1024))

        assert [ip_address(second)] == [route.gateway for route in kernel.routes(family, TABLE)]


def test_every_hop_of_a_multipath_route_is_seen(host, kernel):
    host.ip(f"route add 10.0.0.0/8 table {TABLE} nexthop via {ROUTER4} dev eth0 nexthop dev {TUNNEL}")
    found = kernel.routes(4, TABLE)

    assert [ip_address(ROUTER4), None] == [route.gateway for route in found]
    assert 2 == len({route.oif for route in found})


def test_a_table_that_was_never_used_is_empty(kernel):
    assert [] == [*kernel.routes(4, 4711), *kernel.routes(6, 4711)]


RULES = [
    Rule(4, 75, fwmark=0x7501, iif="lo", table=TABLE, protocol=117),
    Rule(4, 77, to=ip_network("203.0.113.0/24"), ipproto=17, dport=(1, 9), sport=(5, 5), table=1, protocol=117),
    Rule(4, 77, uidrange=(0, 9), table=1, protocol=117),
    Rule(4, 78, source=ip_network("10.0.0.0/8"), oif="eth0", action=Action.UNREACHABLE, protocol=117),
    Rule(6, 75, fwmark=9, to=ip_network("2001:db8::/32"), table=TABLE, protocol=117),
    Rule(6, 82, fwmark=0, ipproto=58, table=TABLE, protocol=117),
    Rule(6, 84, action=Action.UNREACHABLE, protocol=117),
]  # fmt: skip


def test_a_rule_is_read_back_as_it_was_written(kernel):
    for rule in RULES:
        kernel.add_rule(rule)
        kernel.add_rule(rule)

    assert RULES == [rule for rule in [*kernel.rules(4), *kernel.rules(6)] if rule.protocol == 117]
    for rule in RULES:
        kernel.delete_rule(rule)
        kernel.delete_rule(rule)
    assert [] == [rule for rule in [*kernel.rules(4), *kernel.rules(6)] if rule.protocol == 117]


def test_an_address_is_usable_at_once_and_brings_no_route(kernel, eth0):
    before = kernel.routes(4, TABLE_MAIN), kernel.routes(6, TABLE_MAIN)
    for text in ("10.128.0.1/32", "2001:2:0:5::1/128"):
        kernel.add_address(eth0, ip_interface(text))
        kernel.add_address(eth0, ip_interface(text))
        (found,) = [one for one in kernel.addresses(ip_interface(text).version) if one.interface == ip_interface(text)]

        assert found.is_global
        kernel.delete_address(eth0, ip_interface(text))
        kernel.delete_address(eth0, ip_interface(text))
    assert before == (kernel.routes(4, TABLE_MAIN), kernel.routes(6, TABLE_MAIN))


def test_a_link_is_changed_and_removed(host, kernel, eth0):
    kernel.link_set(eth0, mtu=1400, group=7)
    link = host.link(UPLINK)
    assert (1400, 7, True) == (link.mtu, link.group, link.up)

    kernel.link_set(eth0, up=False, addr_gen_mode=1)
    assert (False, "1") == (host.link(UPLINK).up, host.sysctl("net/ipv6/conf/eth0/addr_gen_mode"))

    kernel.delete_link(link)
    kernel.delete_link(link)
    assert kernel.snapshot().link(UPLINK) is None


def test_the_way_is_the_kernels_answer(host, kernel, eth0):
    assert NextHop(ip_address(ROUTER4), ip_address(HOST4), eth0) == kernel.route_get(ip_address(FAR4))
    assert NextHop(None, ip_address(HOST4), eth0) == kernel.route_get(ip_address(LAN4), oif=eth0)
    assert NextHop(ip_address(ROUTER6), ip_address(HOST6), eth0) == kernel.route_get(ip_address(FAR6))
    host.ip("rule add fwmark 5 unreachable")
    host.ip("-6 route add unreachable 2001:db8:dead::/48")
    assert kernel.route_get(ip_address(FAR4), mark=5) is None
    assert kernel.route_get(ip_address("2001:db8:dead::1")) is None


def test_the_way_tells_a_narrower_path(host, kernel):
    host.ip(f"route add 198.18.0.0/15 via {ROUTER4} mtu 1300")

    hop = kernel.route_get(ip_address("198.18.0.1"))
    assert hop is not None
    assert 1300 == hop.mtu


def test_a_refusal_names_the_call_the_object_and_the_kernels_reason(kernel):
    with pytest.raises(
        Refused, match=r"add unicast route 10\.0\.0\.0/8 via 1\.1\.1\.1 in table 7501: .*invalid gateway"
    ) as refused:
        kernel.replace_route(Route(ip_network("10.0.0.0/8"), TABLE, gateway=ip_address("1.1.1.1")))
    assert errno.ENETUNREACH == refused.value.errno
    with pytest.raises(KernelError, match="add IPv4 rule 75"):
        kernel.add_rule(Rule(4, 75, action=Action.GOTO))
    with pytest.raises(KernelError, match="change device 4711: No such device"):
        kernel.link_set(4711, up=True)


# Neighbours.


def awaited_neighbour(events: RtnetlinkEvents, address: str, state: int) -> Event | None:
    while select.select([events.fileno()], [], [], 5)[0]:
        for event in events.read():
            neighbour = event.neighbour
            if neighbour and neighbour.address == ip_address(address) and neighbour.state & state:
                return event
    return None


@pytest.mark.parametrize("address", [ROUTER4, ROUTER6])
def test_a_neighbour_is_resolved_when_asked_for(host, kernel, eth0, address):
    with RtnetlinkEvents() as events:
        kernel.neighbour_use(eth0, ip_address(address))
        event = awaited_neighbour(events, address, NeighbourState.REACHABLE)

    assert event is not None
    assert event.neighbour is not None
    assert (True, False, 6) == (event.neighbour.usable, event.neighbour.failed, len(event.neighbour.mac or b""))
    assert event.neighbour.address in [one.address for one in kernel.neighbours(eth0)]


def test_a_neighbour_that_is_not_there_fails(host, kernel, eth0):
    host.sysctl("net/ipv4/neigh/eth0/retrans_time_ms", "20")
    with RtnetlinkEvents() as events:
        kernel.neighbour_use(eth0, ip_address("192.168.50.99"))
        event = awaited_neighbour(events, "192.168.50.99", NeighbourState.FAILED)

    assert event is not None
    assert event.neighbour is not None
    assert (False, True) == (event.neighbour.usable, event.neighbour.failed)


def test_a_managed_neighbour_is_ours_until_it_is_forgotten(host, kernel, eth0):
    kernel.neighbour_managed(eth0, ip_address(ROUTER4))

    assert [ROUTE_PROTOCOL] == [one.protocol for one in kernel.neighbours(eth0) if one.address == ip_address(ROUTER4)]
    assert "managed" in host.ip("neigh show dev eth0")
    with RtnetlinkEvents() as events:
        kernel.neighbour_forget(eth0, ip_address(ROUTER4))
        kernel.neighbour_forget(eth0, ip_address(ROUTER4))
        gone = [event.neighbour for event in events.read() if event.neighbour]
    assert not any(one.usable for one in gone)
    assert [] == [one for one in kernel.neighbours() if one.address == ip_address(ROUTER4)]


# Events.


def test_every_kind_of_change_is_heard(host):
    with RtnetlinkEvents() as events:
        heard = []
        for command in (
            "link set eth0 mtu 1400", "address add 10.1.1.1/32 dev eth0", "route add 10.2.0.0/16 dev eth0",
            "rule add pref 5 table 5", "neigh add 192.168.50.7 lladdr 02:00:00:00:00:07 dev eth0",
            "-6 address add 2001:db8:7::1/128 dev eth0 nodad", "-6 route add 2001:db8:8::/48 dev eth0",
            "-6 rule add pref 5 table 5",
        ):  # fmt: skip
            events.read()
            host.ip(command)
            heard.append({event.change for event in events.read()})

    wanted = [
        Change.LINK,
        Change.ADDRESS,
        Change.ROUTE,
        Change.RULE,
        Change.NEIGHBOUR,
        Change.ADDRESS,
        Change.ROUTE,
        Change.RULE,
    ]
    assert [] == [(change, what) for change, what in zip(wanted, heard, strict=True) if change not in what]


def test_our_own_requests_are_not_heard(kernel, eth0):
    with RtnetlinkEvents(ignore_port=kernel.port) as events:
        kernel.replace_route(Route(ip_network("10.9.0.0/16"), TABLE, eth0, scope=SCOPE_LINK))
        kernel.add_rule(RULES[0])
        assert [] == events.read()


def test_lost_events_are_told(host, kernel, eth0):
    with RtnetlinkEvents() as events:
        with socket.socket(fileno=os.dup(events.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(50):
            kernel.replace_route(Route(ip_network((0x0B000000 + (number << 8), 24)), TABLE, eth0, scope=SCOPE_LINK))

        assert Event(Change.OVERRUN) in events.read()
        assert [] == events.read()


def test_the_sockets_are_not_inherited():
    with own_namespace(), Rtnetlink(), RtnetlinkEvents() as events:
        assert not os.get_inheritable(events.fileno())
        assert not os.get_blocking(events.fileno())


def test_a_kernel_without_ipv6_is_asked_for_ipv4_alone(host, kernel, monkeypatch):
    monkeypatch.setattr(rtnetlink, "IPV6_SWITCH", Path("/proc/sys/net/ipv6/conf/none/disable_ipv6"))
    now = kernel.snapshot()

    assert (False, False) == (now.ipv6, now.ipv6_enabled)
    assert {4} == {one.family for one in (*now.addresses, *now.routes, *now.rules)}
    assert not [one for one in kernel.neighbours() if one.address.version == 6]


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
