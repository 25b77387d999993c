"""Steering on a real host: routes and rules, what outlives what, and that nothing is left."""

import os
import socket
from dataclasses import replace

import pytest

from tests.hosts import (
    DOWN,
    FAR4,
    FAR6,
    FORWARDED,
    FWMARK,
    HOST4,
    LAN4,
    LAN_ALLOWED,
    RELAY4,
    ROUTER4,
    ROUTER6,
    STEER,
    TUN,
    TUN6,
    TUNNEL,
    UP,
    UPLINK,
    open_tun,
    without_tun,
)
from tunsplit.host import Link, Sysctl
from tunsplit.kernel import hostconfig, nft

pytestmark = pytest.mark.netns

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
    config.apply(host.plan(LAN_ALLOWED))
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
    config.apply(host.plan(LAN_ALLOWED))
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


def test_release_leaves_the_host_as_it_was(host, config):
    before = host.state()
    config.apply(host.plan(LAN_ALLOWED))
    assert before != host.state()

    config.release()

    assert before.splitlines() == without_tun(host.state(), before)


def test_undo_without_anything_but_the_namespace_leaves_the_host_as_it_was(host, config):
    before = [line for line in host.state().splitlines() if TUN not in line and "link/none" not in line]
    host.sysctl("net/ipv4/ip_local_reserved_ports", "8080,50000-50010")
    config.apply(host.plan(LAN_ALLOWED))
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
    config.apply(host.plan(LAN_ALLOWED))
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


@pytest.fixture
def forwarded():
    tun = open_tun(FORWARDED)
    yield tun
    os.close(tun)


def test_what_guests_send_has_a_tun_of_its_own_which_undo_takes_away_too(host, config, forwarded):
    host.ip("link add docker0 type bridge")
    host.ip("link set docker0 up")
    host.ip("address add 172.17.0.1/16 dev docker0")
    host.sysctl("net/ipv4/ip_forward", "1")
    config.apply(host.plan())

    assert FORWARDED == host.way(f"{FAR4} from 172.17.0.2 iif docker0")
    assert "docker0" == host.way(f"172.17.0.2 from {FAR4} iif {FORWARDED}")
    closed = (
        f"{FAR4} from 172.17.0.2 iif {UPLINK}",
        f"172.17.0.2 from {LAN4} iif {UPLINK}",
        f"{LAN4} from {FAR4} iif {FORWARDED}",
    )
    assert {"closed"} == {host.way(one) for one in closed}
    assert "docker0" == host.way("172.17.0.2")  # what comes from there is where the reverse-path test looks for it
    assert TUN == host.way(f"172.17.0.2 {DNS}")
    assert 2 == (nft.listing() or "").count('comment "tun ')
    assert {f"device {TUN}", f"device {FORWARDED}"} <= set(hostconfig.undo())


def test_a_preview_changes_nothing_and_says_what_applying_does(host, config, forwarded):
    before = host.state()
    wanted = host.plan(LAN_ALLOWED)
    planned, sysctls = hostconfig.preview(wanted)
    assert before == host.state()

    assert all(host.sysctl(path) == (now or "").strip() for path, now, _ in sysctls if now is not None)
    config.apply(wanted)
    assert all(host.sysctl(path) == then for path, _, then in sysctls)
    assert nft.normal_form(planned.rulesets, wanted.sets) == {family: nft.listing(family) for family in nft.FAMILIES}
    assert [] == hostconfig.preview(host.plan(LAN_ALLOWED))[1]


def test_a_preview_tells_of_a_tun_that_is_to_come(host):
    nowhere = replace(host.plan(), tun=Link(0, "ts-later", 1500), sysctls=(Sysctl("net/ipv4/conf/ts-later/x", "1"),))

    assert [("net/ipv4/conf/ts-later/x", None, "1")] == hostconfig.preview(nowhere)[1]


def test_a_tun_that_was_left_goes_with_undo(host, config):
    config.apply(host.plan())

    assert f"device {TUN}" in hostconfig.undo()
    assert TUN not in host.ip("link")
