"""What steering relies on from Linux: one assertion each."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address, ip_network

import pytest

from tests.hosts import (
    FAR4,
    FAR6,
    HOST4,
    LAN4,
    ROUTER4,
    ROUTER6,
    TUN,
    TUN4,
    TUN6,
    UPLINK,
    Host,
    awaited,
    describe_frame,
    open_host,
    own_namespace,
    run,
)
from tunsplit.host import Route, RouteType
from tunsplit.kernel.netlink import HEADER, NLM_F_DUMP, NLM_F_REQUEST
from tunsplit.kernel.rtmessages import RTM_GETLINK
from tunsplit.kernel.rtnetlink import Rtnetlink

pytestmark = pytest.mark.netns

IP_UNICAST_IF, IPV6_UNICAST_IF = 50, 76
SO_BINDTODEVICE = socket.SO_BINDTODEVICE


@pytest.fixture
def host() -> Iterator[Host]:
    with open_host() as host:
        run("ip", "link", "set", TUN, "up")
        run("ip", "address", "add", f"{TUN4}/32", "dev", TUN)
        run("ip", "address", "add", f"{TUN6}/128", "dev", TUN, "nodad")
        yield host


def into_tun(host: Host) -> None:
    """A table with the tun's default and under it the closed way, for everything that this host sends."""
    for family in ("-4", "-6"):
        host.ip(f"{family} route add default dev {TUN} metric 1 table 7500")
        host.ip(f"{family} route add unreachable default metric 4278198272 table 7500")
        host.ip(f"{family} rule add pref 81 iif lo lookup 7500")


def steer(host: Host) -> None:
    """Mark what is about to leave by the uplink, and send the mark into the tun."""
    for family in ("-4", "-6"):
        host.ip(f"{family} rule add pref 76 fwmark 0x7503 iif lo lookup 7500")
    marks = f'oifname "{UPLINK}" udp dport 9 meta mark set 0x7503'
    chain = f"type route hook output priority mangle;\n {marks}\n"
    run("nft", "-f", "-", text=f"table inet t {{\n chain c {{\n {chain} }}\n}}\n")


def send(destination: str, *options: tuple[int, int, bytes], port: int = 9) -> OSError | None:
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        for option in options:
            sender.setsockopt(*option)
        try:
            sender.sendto(b"x", (destination, port))
        except OSError as error:
            return error
    return None


def unicast_if() -> tuple[int, int, bytes]:
    return socket.IPPROTO_IP, IP_UNICAST_IF, struct.pack("!I", socket.if_nametoindex(UPLINK))


def test_iif_lo_on_a_rule_means_sent_by_this_host(host):
    into_tun(host)
    host.sysctl("net/ipv4/ip_forward", "1")

    assert (TUN, f"{UPLINK} via {ROUTER4}") == (host.way(FAR4), host.way(f"{FAR4} from 192.168.50.7 iif {UPLINK}"))


@pytest.mark.parametrize("destination", [FAR4, FAR6])
def test_a_vanished_tun_leaves_the_closed_way(host, destination):
    into_tun(host)
    os.close(host.tun)
    refused = send(destination)

    assert refused is not None
    assert refused.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)


@pytest.mark.parametrize("connected", [True, False])
def test_a_port_rule_catches_connected_and_unconnected_sockets(host, connected):
    host.ip(f"route add default dev {TUN} table 7500")
    host.ip("rule add pref 79 ipproto udp dport 53 lookup 7500")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        if connected:
            asker.connect((LAN4, 53))
            asker.send(b"?")
        else:
            asker.sendto(b"?", (LAN4, 53))

    assert host.in_tun(f"> {LAN4}:53")


@pytest.mark.parametrize("named", ["device", "unicast"])
def test_a_socket_that_names_a_device_escapes_the_rules_in_ipv4(host, named):
    into_tun(host)
    host.ip("rule add pref 83 unreachable")
    host.drained()
    send(LAN4, unicast_if() if named == "unicast" else (socket.SOL_SOCKET, SO_BINDTODEVICE, UPLINK.encode()))

    assert host.on_wire(f"> {LAN4}:9")


def test_a_socket_that_names_a_device_is_closed_by_the_last_rule_in_ipv6(host):
    into_tun(host)
    host.ip("-6 rule add pref 83 unreachable")

    assert send(FAR6, (socket.SOL_SOCKET, SO_BINDTODEVICE, UPLINK.encode())) is not None


def test_a_route_chain_steers_what_names_a_device_without_being_bound_to_it(host):
    into_tun(host)
    steer(host)
    send(FAR4, unicast_if())

    assert host.in_tun(f"> {FAR4}:9")


def test_a_route_chain_steers_ipv6_only_where_the_named_device_has_a_way(host):
    into_tun(host)
    steer(host)
    named = (socket.IPPROTO_IPV6, IPV6_UNICAST_IF, struct.pack("!I", socket.if_nametoindex(UPLINK)))
    host.ip("-6 rule add pref 84 unreachable")
    before = send(FAR6, named)
    host.ip(f"-6 route add default dev {UPLINK} table 7505")
    host.ip("-6 rule add pref 82 iif lo ipproto udp fwmark 0/0xffffffff lookup 7505")

    assert (True, None) == (before is not None, send(FAR6, named))
    assert host.in_tun(f"> {FAR6}:9")


def test_a_second_look_up_in_ipv6_forgets_a_named_device_and_keeps_one_that_is_bound_to(host):
    into_tun(host)
    steer(host)
    host.ip(f"-6 route add default dev {UPLINK} table 7505")
    host.ip("-6 rule add pref 82 iif lo ipproto udp fwmark 0/0xffffffff lookup 7505")
    host.ip("-6 rule add pref 84 unreachable")
    host.drained()

    assert send(FAR6, (socket.SOL_SOCKET, SO_BINDTODEVICE, UPLINK.encode())) is not None
    assert [] == [what for what in [*host.drained(), *host.drained_tun()] if FAR6 in what]


@pytest.mark.parametrize(("state", "found"), [("stale", 1), ("failed", 0)])
def test_ipv6_passes_over_a_gateway_that_did_not_answer_unless_its_device_is_named(host, state, found):
    host.ip("link set lo up")
    host.ip(f"-6 route add default via {ROUTER6} dev {UPLINK} table 7501")
    host.ip("-6 route add unreachable default metric 4278198272 table 7501")
    host.ip("-6 rule add pref 73 fwmark 0x7501 lookup 7501")
    address = " lladdr 02:00:00:00:00:99" if found else ""
    host.ip(f"-6 neighbour replace {ROUTER6} dev {UPLINK}{address} nud {state}")
    devices = None, socket.if_nametoindex(UPLINK)
    with Rtnetlink() as rtnetlink:
        hops = [rtnetlink.route_get(ip_address(FAR6), mark=0x7501, oif=oif) for oif in devices]

    assert [found, 1] == [hop is not None and hop.gateway == ip_address(ROUTER6) for hop in hops]


def test_reject_in_the_output_hook_comes_before_arp(host):
    chain = f'type filter hook output priority filter;\n oifname "{UPLINK}" reject\n'
    run("nft", "-f", "-", text=f"table inet t {{\n chain c {{\n {chain} }}\n}}\n")
    host.drained()
    send(LAN4)

    assert [] == [what for what in host.drained() if what.startswith("ARP")]


@pytest.mark.parametrize(("scope", "found"), [("link", TUN), ("global", UPLINK)])
def test_a_gateway_is_looked_for_by_the_rules_among_routes_of_link_scope(host, scope, found):
    host.ip(f"route add default dev {TUN} scope {scope} table 7500")
    host.ip("rule add pref 81 iif lo lookup 7500")
    host.ip(f"route add 203.0.113.0/24 via {ROUTER4}")

    assert f"dev {found}" in host.ip("route show 203.0.113.0/24")


def test_strict_rp_filter_drops_a_neighbours_arp_question_that_is_not_marked(host):
    into_tun(host)
    host.sysctl("net/ipv4/conf/eth0/rp_filter", "1")
    with host.at_router():
        send(HOST4)

    assert awaited(host.wire.fileno(), lambda: host.wire.recv(2048), "ARP 2", describe_frame, 0.5) is None


def test_a_mark_set_before_routing_makes_strict_rp_filter_look_by_it(host):
    into_tun(host)
    host.sysctl("net/ipv4/conf/eth0/rp_filter", "1")
    host.sysctl("net/ipv4/conf/eth0/src_valid_mark", "1")
    host.ip("route add 192.168.50.0/24 dev eth0 table 7501")
    host.ip("rule add pref 75 fwmark 0x7501 lookup 7501")
    for family, hook in (("arp", "input"), ("inet", "prerouting")):
        chain = f"type filter hook {hook} priority -310;\n meta mark set 0x7501\n"
        run("nft", "-f", "-", text=f"table {family} t {{\n chain c {{\n {chain} }}\n}}\n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((HOST4, 9))
        server.settimeout(5)
        with host.at_router():
            send(HOST4)

        assert server.recv(9) == b"x"


def test_arp_answers_for_every_address_of_the_host_unless_told_not_to(host):
    def answered() -> bool:
        with host.at_router():
            run("ip", "route", "replace", f"{TUN4}/32", "dev", "toh")
            run("ip", "neigh", "flush", "dev", "toh")
            send(TUN4)
        found = awaited(host.wire.fileno(), lambda: host.wire.recv(2048), f"ARP 2 {TUN4}", describe_frame, 0.5)
        return found is not None

    before = answered()
    host.sysctl("net/ipv4/conf/eth0/arp_ignore", "1")
    assert (True, False) == (before, answered())


@pytest.mark.parametrize(("mtu", "kept"), [(1280, True), (1279, False)])
def test_ipv6_leaves_a_device_whose_mtu_falls_under_1280_and_stays_away(host, mtu, kept):
    host.ip(f"link set {TUN} mtu {mtu}")
    host.ip(f"link set {TUN} mtu 1420")

    assert kept == (TUN6 in host.ip(f"address show dev {TUN}"))


def test_a_device_with_addr_gen_mode_none_says_nothing_when_it_comes_up(host):
    host.ip(f"link set {TUN} down")
    host.sysctl(f"net/ipv6/conf/{TUN}/addr_gen_mode", "1")
    host.drained_tun()
    host.ip(f"link set {TUN} up")

    assert [] == [what for what in host.drained_tun() if "type 133" in what or "fe80" in what]


def test_an_explicit_bind_ignores_reserved_ports(host):
    host.sysctl("net/ipv4/ip_local_reserved_ports", "49152-65535")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bold:
        bold.bind(("", 50000))

        assert 50000 == bold.getsockname()[1]


def test_a_port_chosen_by_the_kernel_is_never_a_reserved_one(host):
    host.sysctl("net/ipv4/ip_local_port_range", "49150 49153")
    host.sysctl("net/ipv4/ip_local_reserved_ports", "49152-65535")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as first,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as second,
    ):
        first.bind(("", 0))
        second.bind(("", 0))

        assert {49150, 49151} == {first.getsockname()[1], second.getsockname()[1]}


@pytest.mark.parametrize(
    ("tun", "first"),
    [("2001:2:0:5::1", socket.AF_INET6), ("3fff:0:0:5::1", socket.AF_INET6), ("fd00:7::1", socket.AF_INET)],
)
def test_the_tuns_ipv6_address_decides_which_family_apps_prefer(host, tun, first, tmp_path):
    into_tun(host)
    host.ip(f"-6 address replace {tun}/128 dev {TUN} nodad")
    host.ip(f"-6 route replace default dev {TUN} src {tun} metric 1 table 7500")
    names = tmp_path / "hosts"
    names.write_text("1.1.1.1 both.test\n2606:4700::1111 both.test\n")
    ask = "import socket; print(int(socket.getaddrinfo('both.test', 80, type=1)[0][0]))"
    script = f'mount --bind {names} /etc/hosts && exec python3 -c "{ask}"'

    assert str(int(first)) == run("unshare", "--mount", "sh", "-c", script).strip()


def test_a_flushed_table_keeps_the_elements_of_its_sets():
    with own_namespace():
        run(
            "nft",
            "-f",
            "-",
            text="table inet t {\n set s {\n type inet_service\n elements = { 7 }\n }\n chain c {\n }\n}\n",
        )
        run("nft", "flush", "table", "inet", "t")

        assert "elements = { 7 }" in run("nft", "list", "table", "inet", "t")


def test_a_rules_comment_comes_back_with_the_table():
    with own_namespace():
        run("nft", "-f", "-", text=f'table inet t {{\n chain c {{\n return comment "{"x" * 120}"\n }}\n}}\n')

        assert "x" * 120 in run("nft", "list", "table", "inet", "t")


def test_a_netlink_request_is_answered_before_it_returns():
    with own_namespace(), closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)) as netlink:
        netlink.setblocking(False)
        netlink.send(HEADER.pack(32, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + bytes(16))

        assert netlink.recv(65536)


def test_a_route_that_was_replaced_is_not_deleted_in_place_of_the_old_one():
    with own_namespace(), Rtnetlink() as kernel:
        kernel.link_set(1, up=True)
        old = Route(ip_network("10.0.0.0/8"), 7501, oif=1, scope=253, protocol=117)
        kernel.replace_route(Route(ip_network("10.0.0.0/8"), 7501, type=RouteType.UNREACHABLE, protocol=117))
        kernel.delete_route(old)

        assert 1 == len(kernel.routes(4, 7501))


def test_rules_of_ipv6_can_be_made_while_it_is_switched_off(host):
    host.sysctl("net/ipv6/conf/all/disable_ipv6", "1")
    host.ip("-6 rule add pref 83 unreachable")

    assert "unreachable" in host.ip("-6 rule")
