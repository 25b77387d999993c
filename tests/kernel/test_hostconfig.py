"""Steering on a real host: routes and rules, what outlives what, and that nothing is left."""

import os
import socket
import time
from dataclasses import replace
from ipaddress import ip_interface, ip_network

import pytest

from tests.hosts import (
    FAR4,
    FAR6,
    FWMARK,
    HOST4,
    LAN4,
    RELAY4,
    ROUTER4,
    ROUTER6,
    SETTINGS,
    TUN,
    TUN4,
    TUN6,
    TUNNEL,
    UPLINK,
    run,
)
from tunsplit.host import Link, Sysctl
from tunsplit.kernel import hostconfig, nft
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.rtnetlink import Rtnetlink, RtnetlinkEvents

pytestmark = pytest.mark.netns

LAN = replace(SETTINGS, lan_allow=True)
UP, DOWN, STEER = "mark 0x7501", "mark 0x7502", "mark 0x7503"
DNS = "ipproto udp dport 53"
TRANSPORT = f"mark {FWMARK} ipproto udp dport 51820"


WAYS = [
    (FAR4, TUN),
    (FAR6, TUN),
    (f"{FAR4} {UP}", f"{UPLINK} via {ROUTER4}"),
    (f"{FAR6} {UP}", f"{UPLINK} via {ROUTER6}"),
    (f"{LAN4} {UP}", UPLINK),
    (f"2001:db8:50::7 {UP}", UPLINK),
    (f"{FAR4} {UP} oif {UPLINK}", f"{UPLINK} via {ROUTER4}"),
    (f"{FAR4} {DOWN}", TUNNEL),
    (f"{FAR6} {DOWN}", TUNNEL),
    (f"{LAN4} {DOWN}", TUNNEL),
    (f"{FAR4} {STEER}", TUN),
    (f"{FAR6} {STEER}", TUN),
    (LAN4, TUN),
    (f"{LAN4} {DNS}", TUN),
    ("255.255.255.255", TUN),
    ("224.0.0.251", TUN),
    (f"{RELAY4} {TRANSPORT}", f"{UPLINK} via {ROUTER4}"),
    (f"{RELAY4} mark {FWMARK} ipproto tcp dport 51820", TUN),
    (f"{FAR4} {TRANSPORT}", TUN),
    (RELAY4, TUN),
    (f"{ROUTER4} ipproto udp sport 68 dport 67", UPLINK),
    (f"{ROUTER6} ipproto udp sport 546 dport 547", UPLINK),
    (f"{FAR6} oif {UPLINK}", "closed"),
    (f"{FAR4} from 192.168.50.7 iif {UPLINK}", "closed"),
    (f"{FAR6} from 2001:db8:50::7 iif {UPLINK}", "closed"),
    ("127.0.0.1", "lo"),
    (HOST4, "lo"),
    ("::1", "lo"),
]


@pytest.mark.parametrize("rp_filter", ["0", "1", "2"])
def test_every_packet_has_its_way(host, config, rp_filter):
    host.sysctl("net/ipv4/conf/all/rp_filter", rp_filter)
    host.sysctl("net/ipv4/conf/eth0/rp_filter", rp_filter)
    config.apply(host.plan())

    assert WAYS == [(question, host.way(question)) for question, _ in WAYS]


def test_a_local_network_that_is_allowed_is_reached_beside_the_tunnel_but_for_names(host, config):
    config.apply(host.plan(LAN))
    ways = [
        (LAN4, UPLINK),
        ("224.0.0.251", UPLINK),
        ("239.255.255.250", UPLINK),
        ("255.255.255.255", UPLINK),
        (f"{LAN4} {DNS}", TUN),
        (f"{LAN4} ipproto tcp dport 853", TUN),
        (FAR4, TUN),
        ("2001:db8:50::7", TUN),  # on-link and not private: no local network of ours
        ("10.64.0.9", TUN),
        ("233.1.1.1", TUN),
    ]

    assert ways == [(question, host.way(question)) for question, _ in ways]


def test_no_route_in_main_changes_the_way_of_an_app(host, config):
    for route in (
        f"0.0.0.0/1 via 192.168.50.9 dev {UPLINK}", f"128.0.0.0/1 via 192.168.50.9 dev {UPLINK}",
        f"10.0.0.0/8 dev {TUNNEL}", f"198.51.100.0/24 dev {UPLINK}", f"2000::/3 dev {UPLINK}",
        f"2001:db8:100::/48 dev {TUNNEL}",
    ):  # fmt: skip
        host.ip(f"{'-6' if ':' in route else '-4'} route add {route}")
    config.apply(host.plan(LAN))
    ways = [
        (FAR4, TUN), (FAR6, TUN), ("10.9.9.9", TUN), ("64.1.1.1", TUN),
        # What the VPN's server routes is not the uplink's; what DHCP routes is the uplink's own business.
        (f"{FAR6} {UP}", UPLINK), (f"10.9.9.9 {UP}", f"{UPLINK} via 192.168.50.9"), (f"10.9.9.9 {DOWN}", TUNNEL),
    ]  # fmt: skip

    assert ways == [(question, host.way(question)) for question, _ in ways]


def test_other_policy_rules_stay_and_do_not_matter(host, config):
    host.ip(f"rule add pref 100 to {FAR4} lookup main")
    host.ip("rule add pref 32764 not fwmark 51820 lookup 51820")
    before = host.state()
    config.apply(host.plan())

    assert TUN == host.way(FAR4)
    config.release()
    assert before.splitlines() == without_tun(host.state(), before)


def without_tun(after: str, before: str) -> list[str]:
    """The state, with the tun's own lines as they were: it is no host's but ours, and ends with us."""
    old, new = before.splitlines(), after.splitlines()
    tun = [line for line in old if TUN in line]
    own = [line for line in new if TUN in line]
    assert len(tun) == len(own)
    swapped = dict(zip(own, tun, strict=True))
    return [swapped.get(line, line) for line in new]


def test_release_leaves_the_host_as_it_was(host, config):
    before = host.state()
    config.apply(host.plan(LAN))
    assert before != host.state()

    config.release()

    assert before.splitlines() == without_tun(host.state(), before)


def test_undo_without_anything_but_the_namespace_leaves_the_host_as_it_was(host, config):
    before = [line for line in host.state().splitlines() if TUN not in line and "link/none" not in line]
    host.sysctl("net/ipv4/ip_local_reserved_ports", "8080,50000-50010")
    config.apply(host.plan(LAN))
    os.close(host.tun)

    assert hostconfig.undo()

    after = [line for line in host.state().splitlines() if "tun type tun" not in line and "link/none" not in line]
    assert "8080,50000-50010" == host.sysctl("net/ipv4/ip_local_reserved_ports")
    host.sysctl("net/ipv4/ip_local_reserved_ports", "\n")
    assert [line for line in before if "tun type tun" not in line] == [
        line.replace("8080,50000-50010", "") for line in after
    ]
    assert [] == hostconfig.undo()


def test_what_stays_closed_is_closed_without_the_tun_until_undo(host, config):
    before = [line for line in host.state().splitlines() if TUN not in line and "link/none" not in line]
    config.apply(host.plan(LAN))
    config.stays_closed = True
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as own:
        own.bind((TUN6, 0))
        config.release()
        with pytest.raises(ConnectionAbortedError):
            own.recv(1)
    os.close(host.tun)

    assert ["closed", "closed", "closed"] == [host.way(to) for to in (FAR4, FAR6, "8.8.8.8")]
    assert f"{UPLINK} via {ROUTER4}" == host.way(f"{RELAY4} {TRANSPORT}")
    assert nft.listing()
    hostconfig.undo()
    assert [line for line in before if "tun type tun" not in line] == [
        line for line in host.state().splitlines() if "tun type tun" not in line and "link/none" not in line
    ]


def test_a_preview_changes_nothing_and_says_what_applying_does(host, config):
    before = host.state()
    wanted = host.plan(LAN)
    bodies, sysctls = hostconfig.preview(wanted)
    assert before == host.state()

    assert all(host.sysctl(path) == (now or "").strip() for path, now, _ in sysctls if now is not None)
    config.apply(wanted)
    assert all(host.sysctl(path) == then for path, _, then in sysctls)
    assert nft.normal_form(bodies) == {family: nft.listing(family) for family in nft.FAMILIES}
    assert [] == hostconfig.preview(host.plan(LAN))[1]


def test_a_preview_tells_of_a_tun_that_is_to_come(host):
    nowhere = replace(host.plan(), tun=Link(0, "ts-later", 1500), sysctls=(Sysctl("net/ipv4/conf/ts-later/x", "1"),))

    assert [("net/ipv4/conf/ts-later/x", None, "1")] == hostconfig.preview(nowhere)[1]


def test_a_tun_that_was_left_goes_with_undo(host, config):
    config.apply(host.plan())

    assert f"device {TUN}" in hostconfig.undo()
    assert TUN not in host.ip("link")


def test_applied_twice_nothing_changes(host, config):
    with RtnetlinkEvents() as events:
        assert config.apply(host.plan(LAN))
        while events.read():  # of addresses the kernel tells a little later
            time.sleep(0.2)
        assert not config.apply(host.plan(LAN))
        assert [] == events.read()


def test_the_leftovers_of_a_killed_daemon_are_taken_over(host, rtnetlink):
    before = host.state()
    first = HostConfig(rtnetlink)
    first.apply(host.plan(LAN))
    host.ip("route add 203.0.113.0/24 dev eth0 table 7503")
    run("nft", "add", "element", *nft.MAIN.split(), "nat_tcp", "{ 50000 }")
    second = HostConfig(rtnetlink)

    assert second.apply(host.plan())
    assert not second.apply(host.plan())
    assert TUN == host.way(LAN4)
    assert "50000" not in run("nft", "list", "table", *nft.MAIN.split())
    second.release()
    assert before.splitlines() == without_tun(host.state(), before)


def test_what_others_take_away_comes_back_with_the_live_ports(host, rtnetlink):
    config = HostConfig(rtnetlink, live_ports=lambda: {"nat_tcp": [50001, 50002], "nat_udp": []})
    config.apply(host.plan())
    shown = host.state()
    run("nft", "flush", "ruleset")
    host.ip("rule del pref 81")
    host.ip("-6 route flush table 7501")

    assert config.apply(host.plan())

    assert "50001, 50002" in run("nft", "list", "set", *nft.MAIN.split(), "nat_tcp")
    assert sorted(shown.splitlines()) == sorted(host.state().splitlines())


def test_live_ports_and_counters_outlive_a_changed_ruleset(host, config):
    config.apply(host.plan())
    run("nft", "add", "element", *nft.MAIN.split(), "nat_udp", "{ 50000 }")
    host.ip("address add 10.64.0.3/32 dev wg0")

    assert config.apply(host.plan())

    table = run("nft", "list", "table", *nft.MAIN.split())
    assert "elements = { 50000 }" in table
    assert "10.64.0.3" in table


def test_a_renumbered_uplink_changes_its_own_table_and_nothing_else(host, config):
    config.apply(host.plan())
    shown = host.ip("route show table 7502"), host.ip("rule")
    host.ip("address del 192.168.50.2/24 dev eth0")
    host.ip("address add 192.168.60.2/24 dev eth0")
    host.ip("route add default via 192.168.60.1")

    assert config.apply(host.plan())

    assert f"{UPLINK} via 192.168.60.1" == host.way(f"{FAR4} {UP}")
    assert "192.168.50" not in host.ip("route show table 7501")
    assert shown == (host.ip("route show table 7502"), host.ip("rule"))


def test_a_new_uplink_takes_over_and_the_old_one_gets_its_sysctls_back(host, config):
    config.apply(host.plan())
    host.ip("link add wlan0 type veth peer name far")
    host.ip("link set wlan0 up")
    host.ip("link set far up")
    host.ip("address add 172.20.0.2/24 dev wlan0")
    host.ip("route del default")
    host.ip("-6 route del default")
    host.ip("route add default via 172.20.0.1")

    config.apply(host.plan())

    assert "wlan0 via 172.20.0.1" == host.way(f"{FAR4} {UP}")
    assert ("0", "1") == (host.sysctl("net/ipv4/conf/eth0/arp_ignore"), host.sysctl("net/ipv4/conf/wlan0/arp_ignore"))
    assert not config.apply(host.plan())


def test_a_tunnel_that_is_gone_closes_its_way_and_leaves_the_uplink_alone(host, config):
    config.apply(host.plan())
    os.close(host.tunnel)
    config.apply(host.plan())

    assert "closed" == host.way(f"{FAR4} {DOWN}")
    assert f"{UPLINK} via {ROUTER4}" == host.way(f"{FAR4} {UP}")
    assert TUN == host.way(FAR4)


def test_an_uplink_that_is_gone_closes_its_way(host, config):
    config.apply(host.plan())
    host.ip("link del eth0")
    config.apply(host.plan())

    assert "closed" == host.way(f"{FAR4} {UP}")
    assert TUNNEL == host.way(f"{FAR4} {DOWN}")


def test_no_default_route_is_no_error(host, config):
    host.ip("route del default")
    host.ip("-6 route del default")

    config.apply(host.plan())

    assert "closed" == host.way(f"{FAR4} {UP}")
    assert UPLINK == host.way(f"{LAN4} {UP}")
    assert TUN == host.way(FAR4)


def test_without_ipv6_there_is_no_ipv6_part_but_the_closed_way(host, config):
    host.sysctl("net/ipv6/conf/all/disable_ipv6", "1")
    before = host.state()
    config.apply(host.plan())

    rules = [line for line in host.ip("-6 rule").splitlines() if "proto 117" in line]
    assert ["84:\tfrom all unreachable proto 117"] == rules
    assert TUN == host.way(FAR4)
    config.release()
    assert before.splitlines() == without_tun(host.state(), before)


def test_ipv6_that_comes_back_is_steered(host, config):
    host.sysctl("net/ipv6/conf/all/disable_ipv6", "1")
    config.apply(host.plan())
    host.sysctl("net/ipv6/conf/all/disable_ipv6", "0")
    host.ip("address add 2001:db8:50::2/64 dev eth0 nodad")
    config.apply(host.plan())

    assert TUN == host.way(FAR6)


def test_stricter_values_stay_and_what_others_changed_stays(host, config):
    host.sysctl("net/ipv4/conf/eth0/arp_ignore", "2")
    config.apply(host.plan())
    assert "2" == host.sysctl("net/ipv4/conf/eth0/arp_ignore")

    host.sysctl("net/ipv4/conf/eth0/arp_announce", "1")
    config.release()

    assert ["2", "1"] == [host.sysctl(f"net/ipv4/conf/eth0/arp_{name}") for name in ("ignore", "announce")]


def test_the_tun_has_its_addresses_and_the_smaller_mtu(host, config):
    config.apply(host.plan())

    with Rtnetlink() as rtnetlink:
        now = rtnetlink.snapshot()
    tun = now.link(TUN)
    assert tun is not None
    assert (True, 1420) == (tun.up, tun.mtu)
    assert {ip_interface(TUN4), ip_interface(TUN6)} == {address.interface for address in now.addresses_of(tun)}
    assert not [route for route in now.routes_of(254) if route.oif == tun.index]


def test_a_family_leaves_the_tun_when_no_side_has_it(host, config):
    config.apply(host.plan())
    host.ip("-6 address flush dev eth0 scope global")
    host.ip("-6 address flush dev wg0 scope global")
    config.apply(host.plan())

    assert "closed" == host.way(FAR6)
    assert TUN6 not in host.ip("address show dev tunsplit0")
    assert TUN == host.way(FAR4)


def test_a_route_that_the_kernel_refuses_stops_nothing_else(host, config):
    plan = host.plan()
    bad = replace(plan.routes[0], destination=ip_network("10.9.0.0/16"), table=7501, type=plan.routes[0].type.UNICAST)

    with pytest.raises(Exception, match=r"10\.9\.0\.0/16"):
        config.apply(replace(plan, routes=(bad, *plan.routes)))

    assert TUN == host.way(FAR4)
    assert f"{UPLINK} via {ROUTER4}" == host.way(f"{FAR4} {UP}")
