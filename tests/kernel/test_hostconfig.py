"""Steering on a real host: where packets go, what outlives what, and that nothing is left."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_interface, ip_network

import dpkt
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
    Host,
    open_host,
    run,
)
from tunsplit.kernel import hostconfig, nft
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.rtnetlink import Rtnetlink, RtnetlinkEvents

pytestmark = pytest.mark.netns

LAN = replace(SETTINGS, lan_allow=True)
UP, DOWN, STEER = "mark 0x7501", "mark 0x7502", "mark 0x7503"
DNS = "ipproto udp dport 53"
TRANSPORT = f"mark {FWMARK} ipproto udp dport 51820"


@pytest.fixture
def host() -> Iterator[Host]:
    with open_host() as host:
        yield host


@pytest.fixture
def rtnetlink(host) -> Iterator[Rtnetlink]:
    with Rtnetlink() as rtnetlink:
        yield rtnetlink


@pytest.fixture
def config(rtnetlink) -> HostConfig:
    return HostConfig(rtnetlink)


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


def test_a_tun_that_was_left_goes_with_undo(host, config):
    config.apply(host.plan())

    assert f"device {TUN}" in hostconfig.undo()
    assert TUN not in host.ip("link")


def test_applied_twice_nothing_changes(host, config):
    assert config.apply(host.plan(LAN))
    with RtnetlinkEvents() as events:
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


# Sockets.


def udp(destination: str, port: int, *, device: str = "", unicast_if: str = "", source: str = "") -> OSError | None:
    """Send a datagram; return the error, if there is one."""
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        if device:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        if unicast_if:
            index = struct.pack("!I", socket.if_nametoindex(unicast_if))
            if family == socket.AF_INET:
                sender.setsockopt(socket.IPPROTO_IP, 50, index)  # IP_UNICAST_IF
            else:
                sender.setsockopt(socket.IPPROTO_IPV6, 76, index)  # IPV6_UNICAST_IF
        if source:
            sender.bind((source, 0))
        try:
            sender.sendto(b"x", (destination, port))
        except OSError as error:
            return error
    return None


@pytest.mark.parametrize("destination", [FAR4, LAN4, FAR6, ROUTER6])
@pytest.mark.parametrize("port", [53, 7001])
@pytest.mark.parametrize("device", [UPLINK, TUNNEL])
def test_what_names_a_device_goes_into_the_tun(host, config, destination, port, device):
    config.apply(host.plan())
    host.drained()

    udp(destination, port, unicast_if=device)

    assert host.in_tun(f"> {destination}:{port}")
    assert [] == [what for what in host.drained() if destination in what]


@pytest.mark.parametrize("destination", [FAR4, LAN4, FAR6, ROUTER6])
@pytest.mark.parametrize("firewall", [True, False])
def test_what_is_bound_to_a_device_goes_nowhere(host, config, destination, firewall):
    config.apply(host.plan(replace(SETTINGS, firewall=firewall)))
    host.drained()

    udp(destination, 7001, device=UPLINK)
    with socket.socket(socket.AF_INET6 if ":" in destination else socket.AF_INET) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, UPLINK.encode())
        client.settimeout(0.05)  # without the firewall, the SYN is sent again and again
        with pytest.raises(OSError, match=r"timed out|refused|unreachable"):
            client.connect((destination, 7001))

    assert [] == [what for what in [*host.drained(), *host.drained_tun()] if destination in what]


def test_gateways_that_others_name_are_found_where_they_are(host, config):
    config.apply(host.plan())

    host.ip(f"route add 203.0.113.99/32 via {ROUTER4}")
    host.ip(f"route add 203.0.113.98/32 via {ROUTER4} dev {UPLINK}")
    host.ip(f"-6 route add 2001:db8:113::99/128 via {ROUTER6}")

    assert [] == [line for line in host.ip("route").splitlines() if TUN in line]
    assert f"via {ROUTER6} dev {UPLINK}" in host.ip("-6 route show 2001:db8:113::99")


@pytest.mark.parametrize("destination", [FAR4, FAR6, LAN4, ROUTER6])
@pytest.mark.parametrize("settings", [SETTINGS, LAN], ids=["", "lan"])
def test_what_is_bound_to_a_device_is_refused_before_anybody_is_asked(host, config, destination, settings):
    config.apply(host.plan(settings))
    host.drained()

    udp(destination, 53, device=UPLINK)
    if not (settings is LAN and destination == LAN4):
        udp(destination, 7001, device=UPLINK)

    assert [] == [what for what in host.drained() if destination in what or "ICMP6 type 135" in what]


def test_with_the_tun_gone_an_app_is_refused_at_once(host, config):
    config.apply(host.plan())
    host.drained()
    os.close(host.tun)

    for destination in (FAR4, FAR6):
        refused = udp(destination, 7001)
        assert refused is not None
        assert refused.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
    assert [] == [what for what in host.drained() if FAR4 in what or FAR6 in what]


def test_the_local_network_is_reached_when_allowed_with_the_uplinks_address_only(host, config):
    config.apply(host.plan(LAN))
    host.drained()

    assert udp(LAN4, 9) is None
    assert host.on_wire(f"> {LAN4}:9")
    assert udp(LAN4, 9, source=TUN4) is None
    assert host.in_tun(f"UDP {TUN4}")
    assert [] == [what for what in host.drained() if TUN4 in what]


def test_our_own_sockets_leave_by_their_side(host, config):
    config.apply(host.plan())
    for mark, device in ((0x7501, UPLINK), (0x7502, TUNNEL)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            own.sendto(b"x", (FAR4, 53))

    assert host.on_wire(f"{HOST4}:")
    assert os.read(host.tunnel, 2048)


def test_a_mark_alone_opens_nothing_for_another_user(host, config):
    config.apply(host.plan(replace(SETTINGS, uid=4711)))
    host.drained()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x7501)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, UPLINK.encode())
        with pytest.raises(OSError):  # noqa: PT011 - whatever the kernel calls it
            other.sendto(b"x", (FAR4, 7001))

    assert [] == [what for what in host.drained() if FAR4 in what]


def test_the_transport_leaves_by_the_uplink(host, config):
    config.apply(host.plan())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as transport:
        transport.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, FWMARK)
        transport.sendto(b"x", (RELAY4, 51820))

    assert host.on_wire(f"> {RELAY4}:51820")


@pytest.mark.parametrize("killed", [False, True])
def test_no_socket_outlives_the_tuns_address(host, config, killed):
    config.apply(host.plan())
    with ExitStack() as stack:
        apps = []
        for source, destination in ((TUN4, FAR4), (TUN6, FAR6), (f"::ffff:{TUN4}", f"::ffff:{FAR4}")):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                family = socket.AF_INET6 if ":" in source else socket.AF_INET
                app = stack.enter_context(socket.socket(family, kind))
                app.setblocking(False)
                app.bind((source, 0))
                app.connect_ex((destination, 7001))
                apps.append(app)
        other = stack.enter_context(socket.create_server((HOST4, 8080)))
        host.drained()
        if killed:
            os.close(host.tun)
            assert "6 sockets of the tun" in hostconfig.undo()
        else:
            config.release()

        for app in apps:
            with pytest.raises(OSError):  # noqa: PT011 - each protocol and family has its own word for it
                app.send(b"x")
        assert 8080 == other.getsockname()[1]
        assert [] == [what for what in host.drained() if TUN4 in what or TUN6 in what]


@pytest.mark.parametrize("rp_filter", ["0", "1", "2"])
def test_a_server_hears_the_uplink_and_answers_into_the_tun(host, config, rp_filter):
    host.sysctl("net/ipv4/conf/all/rp_filter", rp_filter)
    host.sysctl("net/ipv4/conf/eth0/rp_filter", rp_filter)
    host.sysctl("net/ipv4/tcp_fwmark_accept", "1")
    config.apply(host.plan())
    with socket.create_server((HOST4, 8080)), host.at_router(), socket.socket() as client:
        client.setblocking(False)
        client.connect_ex((HOST4, 8080))
        answer = host.in_tun("[S.]")

    assert answer is not None
    assert f"TCP {HOST4}:8080 >" in answer.what


def frame(host: Host, packet: bytes) -> None:
    """Send a packet from the router to the host, as it is."""
    host_mac = host.link(UPLINK).mac
    assert host_mac is not None
    with host.at_router(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.bind(("toh", 0))
        raw.send(host_mac + b"\x02\x00\x00\x00\x00\x01\x08\x00" + packet)


def answer_packet(destination: str, port: int, protocol: str) -> bytes:
    if protocol == "tcp":
        data = dpkt.tcp.TCP(sport=7000, dport=port, flags=dpkt.tcp.TH_SYN | dpkt.tcp.TH_ACK, ack=1)
    elif protocol == "udp":
        data = dpkt.udp.UDP(sport=7000, dport=port, data=b"x")
        data.ulen = 9
    else:
        data = dpkt.icmp.ICMP(type=0, data=dpkt.icmp.ICMP.Echo(id=port, seq=1, data=b"x"))
    number = {"tcp": 6, "udp": 17, "icmp": 1}[protocol]
    packet = dpkt.ip.IP(src=socket.inet_aton(ROUTER4), dst=socket.inet_aton(destination), p=number, data=data)
    packet.len = len(packet)
    return bytes(packet)


@pytest.mark.parametrize(("protocol", "reaction"), [("tcp", "[R"), ("udp", "ICMP type 3")])
def test_a_live_port_is_the_nats_and_any_other_the_kernels(host, config, protocol, reaction):
    config.apply(host.plan())
    with nft.LivePorts() as live:
        live.add(f"nat_{protocol}", [50000])
    host.drained_tun()

    frame(host, answer_packet(HOST4, 50000, protocol))
    frame(host, answer_packet(HOST4, 50001, protocol))

    shown = host.in_tun(reaction)
    assert shown is not None
    assert "50000" not in shown.what
    assert "counter replies" in run("nft", "list", "counters", "table", *nft.MAIN.split())
    assert "packets 1 " in run("nft", "list", "counter", *nft.MAIN.split(), "replies")


def test_a_live_echo_identifier_is_the_nats(host, config):
    config.apply(host.plan())
    with nft.LivePorts() as live:
        live.add("nat_echo4", [50000])
    frame(host, answer_packet(HOST4, 50000, "icmp"))
    frame(host, answer_packet(HOST4, 50001, "icmp"))

    assert "packets 1 " in run("nft", "list", "counter", *nft.MAIN.split(), "replies")


@pytest.mark.parametrize("address", [TUN4, "10.64.0.2"])
def test_the_uplinks_neighbours_cannot_find_the_inner_addresses(host, config, address):
    config.apply(host.plan())
    host.drained_tun()
    frame(host, answer_packet(address, 44444, "tcp"))
    frame(host, answer_packet(HOST4, 44445, "tcp"))

    reaction = host.in_tun("[R")
    assert reaction is not None
    assert f"{HOST4}:44445" in reaction.what
    assert "packets 1 " in run("nft", "list", "counter", *nft.MAIN.split(), "arrived_for_other_side")


def test_the_uplinks_neighbours_get_no_arp_answer_for_the_inner_addresses(host, config):
    config.apply(host.plan())
    host.drained()
    with host.at_router():
        for address in (TUN4, "10.64.0.2", HOST4):
            run("ip", "route", "replace", f"{address}/32", "dev", "toh")
            udp(address, 9)

    assert host.on_wire(f"ARP 2 {HOST4}")
    assert [] == [what for what in host.drained() if f"ARP 2 {TUN4}" in what or "ARP 2 10.64" in what]
