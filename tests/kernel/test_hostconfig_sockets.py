"""Steering on a real host, as sockets and neighbours meet it."""

import errno
import os
import socket
import struct
from contextlib import ExitStack
from dataclasses import replace

import dpkt
import pytest

from tests.hosts import (
    FAR4,
    FAR6,
    FWMARK,
    HOST4,
    LAN4,
    LAN_ALLOWED,
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
    run,
)
from tunsplit.kernel import hostconfig, nft
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.liveports import LivePorts

pytestmark = pytest.mark.netns


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
@pytest.mark.parametrize("settings", [SETTINGS, LAN_ALLOWED], ids=["", "lan"])
def test_what_is_bound_to_a_device_is_refused_before_anybody_is_asked(host, config, destination, settings):
    config.apply(host.plan(settings))
    host.drained()

    udp(destination, 53, device=UPLINK)
    if not (settings is LAN_ALLOWED and destination == LAN4):
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
    config.apply(host.plan(LAN_ALLOWED))
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


@pytest.mark.parametrize("end", ["released", "undone", "taken over"])
def test_no_socket_outlives_the_tuns_address(host, config, rtnetlink, end):
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
        if end == "released":
            config.release()
        elif end == "undone":
            os.close(host.tun)
            assert "6 sockets of the tun" in hostconfig.undo()
        else:
            HostConfig(rtnetlink).apply(host.plan())

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
    with LivePorts() as live:
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
    with LivePorts() as live:
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
