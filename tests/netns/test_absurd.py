"""Absurd packets, from outside and from apps: counted, never raised, and traffic goes on (SPEC.md, "Robustness")."""

import random
import socket
import struct

import dpkt
import pytest

from tests.netns.stage import HOST, RELAY, SERVER, until

pytestmark = pytest.mark.netns

SEED = 20
ROUNDS = 400


def absurdities(chance, target, port):
    """Frames' payloads for an address and a live port: whole, cut, with header fields drawn by lot."""
    server, own = SERVER[4].packed, target[4].packed
    server6, own6 = SERVER[6].packed, target[6].packed
    whole = []
    for transport, number in (
        (dpkt.udp.UDP(sport=7, dport=port, ulen=20, data=bytes(12)), 17),
        (dpkt.tcp.TCP(sport=7, dport=port, flags=chance.randrange(256), data=bytes(12)), 6),
        (dpkt.icmp.ICMP(type=0, data=dpkt.icmp.ICMP.Echo(id=port, seq=1, data=bytes(12))), 1),
        (dpkt.icmp.ICMP(type=3, code=4, data=dpkt.icmp.ICMP.Unreach(data=bytes(chance.randrange(40)))), 1),
        (b"", 47),
    ):
        ip = dpkt.ip.IP(src=server, dst=own, p=number, ttl=9, data=transport)
        whole.append((0x0800, bytes(ip)))
        body = bytes(transport)
        whole.append((0x86DD, bytes(dpkt.ip6.IP6(src=server6, dst=own6, nxt=number, plen=len(body), data=body))))
        whole.append((0x86DD, bytes(dpkt.ip6.IP6(src=server6, dst=own6, nxt=0, plen=len(body) + 8, data=b""))
                      + bytes((number, 0, 1, 4, 0, 0, 0, 0)) + body))  # fmt: skip
        whole.append((0x86DD, bytes(dpkt.ip6.IP6(src=server6, dst=own6, nxt=44, plen=len(body) + 8, data=b""))
                      + struct.pack("!BBHI", number, 0, chance.choice((0, 1, 0xFFF8, 0xFFF9)), 7) + body))  # fmt: skip
        fragment = dpkt.ip.IP(src=server, dst=own, p=number, id=9, data=transport, offset=chance.randrange(0x1FFF))
        whole.append((0x0800, bytes(fragment)))
    for _ in range(ROUNDS):
        ethertype, packet = chance.choice(whole)
        broken = bytearray(packet)
        for _ in range(chance.randrange(4)):
            # Addresses stay, so that it arrives.
            at = chance.choice([at for at in range(len(broken)) if not (12 <= at < 20 or (8 <= at < 40 < len(broken)))])
            broken[at] = chance.randrange(256)
        yield ethertype, bytes(broken[: chance.randrange(1, len(broken) + 40)]) + bytes(chance.choice((0, 0, 30)))


async def assert_traffic_goes_on(excluded, included):
    for version in (4, 6):
        for protocol in ("tcp", "udp", "echo"):
            assert await excluded(f"ask('{protocol}', SERVER{version})") in (str(HOST[version]), "")
            assert await included(f"ask('{protocol}', SERVER{version})") in (str(RELAY[version]), "")


async def test_absurd_frames_on_the_uplink(stage, excluded, included):
    """Sent by the router to a live port of NAT: whatever arrives, the flow that has the port goes on."""
    await excluded("own = udp(SERVER4); own.send(b'?'); own.recv(100)")
    port = int((await stage.flow_of(excluded))["nat"].rpartition(":")[2])
    before = await stage.counter("uplink_received")
    header = await stage.mac() + b"\2\0\0\0\0\1"
    with stage.lab.router.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind(("lan0", 0))
        for ethertype, packet in absurdities(random.Random(SEED), HOST, port):
            wire.send(header + struct.pack("!H", ethertype) + packet)

    async def have_arrived():
        return await stage.counter("uplink_received") > before + 50

    await until(have_arrived, "the daemon has read some of them")
    await excluded("own.setblocking(False)\nwith contextlib.suppress(OSError):\n    while own.recv(2048): pass")
    await excluded("own.settimeout(3); own.send(b'still here')")
    assert (await excluded("own.recv(100)")).endswith(b"still here")
    await assert_traffic_goes_on(excluded, included)
    assert 0 < await stage.counter("inbound_no_flow")


async def test_absurd_packets_from_an_app(stage, excluded, included):
    """Written whole by raw sockets: IPv4 as it comes, IPv6 by protocol; no owner, or nonsense, or both."""
    packets = [
        packet for ethertype, packet in absurdities(random.Random(SEED), SERVER, 7) if ethertype == 0x0800
    ][:150]  # fmt: skip
    await excluded(
        "own = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)\nsent = 0\n"
        "for packet in packets:\n"
        "    with contextlib.suppress(OSError): own.sendto(bytes.fromhex(packet), (SERVER4, 0)); sent += 1\n"
        "for number in (0, 6, 17, 43, 44, 47, 50, 58, 60, 132, 253):\n"
        "    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_RAW, number) as own6:\n"
        "        for size in (0, 1, 3, 7, 8, 40, 1300): own6.sendto(bytes(size), (SERVER6, 0))",
        packets=[packet.hex() for packet in packets],
    )
    assert await excluded("sent") > 20

    await assert_traffic_goes_on(excluded, included)
    assert 0 < await stage.counter("refused")


async def test_a_datagram_of_the_largest_size_is_no_absurdity(stage, excluded):
    """RFC 791: 65507 octets, in fragments, both ways but for the server's own line."""
    await excluded("own = udp(SERVER4); own.send(bytes(65400))")
    assert 65400 < await excluded("len(own.recv(65536))")
