"""What the netdev table relies on from Linux: what a frame shows at a device's egress of how it came there."""

import errno
import socket
import struct
from collections.abc import Callable

import pytest

from tests.craft import udp
from tests.hosts import FAR4, FAR6, HOST4, LAN4, ROUTER4, ROUTER6, UPLINK, open_host, run

pytestmark = pytest.mark.netns

TABLE = """table netdev t {
    counter routed { }
    counter owned { }
    counter unowned { }
    counter shown { }
    chain c {
        type filter hook egress devices = { "eth0" } priority filter; policy accept;
        meta l4proto ipv6-icmp accept
        ether type 0x888e counter name shown
        meta rtclassid >= 0 counter name routed accept
        meta skuid >= 0 counter name owned accept
        counter name unowned
    }
}
"""
SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
IPV4, EAPOL = 0x0800, 0x888E
ARP_MAY_COME = {"unowned"}  # the router asks, too
PACKET = udp(f"{HOST4}:4000 > {FAR4}:9", b"below")


@pytest.fixture
def host():
    with open_host() as made:
        made.ip(f"route replace default via {ROUTER4} dev {UPLINK}")
        made.ip(f"-6 route replace default via {ROUTER6} dev {UPLINK}")
        yield made


def counted(send: Callable[[], object]) -> set[str]:
    """The counters that count while this is sent; neighbour discovery, which comes any time, is left out."""
    run("nft", "-f", "-", text=TABLE)
    try:
        send()
        listed = run("nft", "list", "counters", "table", "netdev", "t")
    finally:
        run("nft", "delete", "table", "netdev", "t")
    blocks = listed.split("counter ")[1:]
    return {block.split()[0] for block in blocks if "packets 0 " not in block}


def datagram(to: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.sendto(b"x", (to, 9))


def raw(to: str) -> None:
    """With a header of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as own:
        own.sendto(PACKET, (to, 0))


def frame(told: int, shown: int, *, bypass: bool = False) -> None:
    """By a packet socket that tells the kernel of a protocol, and shows one on the wire."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as own:
        own.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, int(bypass))
        own.sendto(b"\xff" * 6 + bytes(6) + struct.pack("!H", shown) + PACKET.ljust(46), (UPLINK, told))


@pytest.mark.parametrize("to", [FAR4, FAR6])
def test_what_has_been_through_ip_carries_a_route_of_whatever_class(host, to):
    host.ip(f"neighbour replace {ROUTER4} lladdr 02:00:00:00:00:01 dev {UPLINK}")
    host.ip(f"neighbour replace {ROUTER6} lladdr 02:00:00:00:00:01 dev {UPLINK}")

    assert {"routed"} == counted(lambda: datagram(to)) - ARP_MAY_COME
    assert {"routed"} == counted(lambda: raw(FAR4)) - ARP_MAY_COME
    host.ip(f"route replace default via {ROUTER4} dev {UPLINK} realm 7")
    assert {"routed"} == counted(lambda: datagram(FAR4)) - ARP_MAY_COME


def test_the_kernels_own_arp_has_neither_a_route_nor_an_owner(host):
    assert {"unowned"} == counted(lambda: datagram(LAN4)) - {"routed"}  # of whom nothing is known yet


@pytest.mark.parametrize("bypass", [False, True])
def test_a_packet_sockets_frame_has_an_owner_and_no_route(host, bypass):
    assert {"owned"} == counted(lambda: frame(IPV4, IPV4, bypass=bypass)) - ARP_MAY_COME


def test_what_is_on_the_wire_is_seen_whatever_the_sender_tells(host):
    assert {"owned", "shown"} == counted(lambda: frame(IPV4, EAPOL)) - ARP_MAY_COME
    assert {"owned"} == counted(lambda: frame(EAPOL, IPV4)) - ARP_MAY_COME


def test_the_sender_of_what_is_dropped_hears_of_it(host):
    run("nft", "-f", "-", text=TABLE.replace("owned accept", "owned drop"))

    for bypass in (False, True):
        with pytest.raises(OSError, match="buffer space") as raised:
            frame(IPV4, IPV4, bypass=bypass)
        assert errno.ENOBUFS == raised.value.errno
