"""Packets: out of the tun, in from a side, inside each other."""

import struct
from collections import Counter

from tests import craft
from tests.fakes.devices import (
    FAR4,
    FAR6,
    HOST4,
    HOST6,
    ICMP,
    ICMPV6,
    ROUTER4,
    ROUTER6,
    ROUTER_MAC,
    TCP,
    TUN4,
    TUN6,
    UDP,
    WG0,
    FakeTun,
    Side,
    nat,
    opened,
)
from tests.fuzz.target import Target, joined, split, target
from tunsplit.engine.flow import Flow
from tunsplit.engine.nat import Nat
from tunsplit.engine.slowpath import SlowPath, Unknown, is_for_nobody
from tunsplit.errors import MalformedPacket
from tunsplit.lab import frames, record
from tunsplit.tasks import inbound, outbound
from tunsplit.tasks.dnscapture import datagram_untrusted
from tunsplit.tasks.halfopen import HalfOpen
from tunsplit.tasks.side import HEADER, HEADROOM, frame_buffer
from tunsplit.tasks.tuns import Tuns
from tunsplit.wire import craft as our
from tunsplit.wire import cut, icmp, tcpoptions, vnet
from tunsplit.wire.ip import parse_untrusted

TARGETS: dict[str, Target] = {}

NARROW = 600  # of a path: so that much is too big
OUT = {
    "udp": craft.udp(f"{TUN4}:5000 > {FAR4}:53", b"question" * 5),
    "udp6": craft.udp(f"[{TUN6}]:5000 > [{FAR6}]:53", b"question" * 5),
    "large": craft.udp(f"{TUN4}:5000 > {FAR4}:53", bytes(1400)),
    "tcp": craft.tcp(f"{TUN4}:5000 > {FAR4}:443", b"hello", flags=craft.SYN, options=b"\x02\x04\x05\xb4"),
    "tcp6": craft.tcp(f"[{TUN6}]:5000 > [{FAR6}]:443", bytes(1000), options=b"\x01\x01\x08\x0a" + bytes(8)),
    "echo": craft.echo(f"{TUN4} > {FAR4}", 5000, b"ping"),
    "echo6": craft.echo(f"{TUN6} > {FAR6}", 5000, b"ping"),
    "error": craft.error(
        f"{TUN4} > {FAR4}", craft.udp(f"{FAR4}:53 > {TUN4}:5000", b"late"), 3, 3
    ),
    "gre": craft.transport(f"{TUN4} > {FAR4}", craft.GRE, bytes(12)),
    "stranger": craft.tcp(f"{TUN4}:6000 > 203.0.113.9:80", b"", flags=craft.SYN),
}  # fmt: skip
BACK = {
    "udp": craft.udp(f"{FAR4}:53 > {HOST4}:50000", b"answer" * 5),
    "udp6": craft.udp(f"[{FAR6}]:53 > [{HOST6}]:50000", b"answer" * 5),
    "tcp": craft.tcp(f"{FAR4}:443 > {HOST4}:50000", b"hello", flags=craft.FIN | craft.ACK),
    "tcp6": craft.tcp(f"[{FAR6}]:443 > [{HOST6}]:50000", b"hello", flags=craft.RST),
    "echo": craft.echo(f"{FAR4} > {HOST4}", 50000, b"ping", reply=True),
    "echo6": craft.echo(f"{FAR6} > {HOST6}", 50000, b"ping", reply=True),
    "too big": craft.error(
        f"{FAR4} > {HOST4}", craft.udp(f"{HOST4}:50000 > {FAR4}:53", bytes(1200)), 3, 4, word=NARROW
    ),
    "too big 6": craft.error(
        f"{FAR6} > {HOST6}", craft.tcp(f"[{HOST6}]:50000 > [{FAR6}]:443", bytes(1200)), 2, word=1280
    ),
    "unreachable": craft.error(f"{FAR4} > {HOST4}", craft.echo(f"{HOST4} > {FAR4}", 50000), 3, 1),
}  # fmt: skip
GSO_TCP4, GSO_UDP = 1, 5


def super_header(gso_type: int, size: int, start: int, offset: int) -> bytes:
    return struct.pack("<BBHHHH", vnet.NEEDS_CSUM, gso_type, start + 20, size, start, offset)


HEADERS = [
    vnet.NONE,
    super_header(GSO_TCP4, 500, 20, 16),
    super_header(GSO_TCP4, 1400, 40, 16),
    super_header(GSO_UDP, 20, 20, 6),
]


def shapes(packets: list[bytes]) -> list[bytes]:
    """Packets as they are, with options and extension headers, and in pieces."""
    found = list(packets)
    for packet in packets:
        if packet[0] == 0x45:
            found.append(craft.with_options(packet, craft.RECORD_ROUTE))
            found.append(craft.with_options(packet, craft.LOOSE_SOURCE_ROUTE))
        else:
            found.append(craft.with_extensions(packet, (craft.DESTINATION_OPTIONS, craft.PADDING)))
            found.append(craft.with_extensions(packet, (craft.ROUTING, craft.PADDING)))
        found += craft.fragments(packet, 16)[:2]
    return found


def batches(packets: list[bytes]) -> list[bytes]:
    """Inputs of packets behind their virtio headers; one holds all."""
    wrapped = [header + packet for packet in shapes(packets) for header in HEADERS]
    return [joined(one) for one in wrapped] + [joined(*wrapped[:8]), joined(*wrapped[-8:])]


def plain() -> list[bytes]:
    """Inputs of one packet."""
    return shapes([*OUT.values(), *BACK.values()])


class Network:
    """Two devices and a tun whose kernel is the fuzzer, and a flow of each kind."""

    def __init__(self) -> None:
        self.tun = FakeTun()
        self.uplink, self.tunnel = Side(), Side("tunnel", WG0)
        self.table = nat()
        self.uplink.neighbour(ROUTER4, ROUTER_MAC)
        self.uplink.neighbour(ROUTER6, ROUTER_MAC)
        for side in (self.uplink, self.tunnel):
            side.device.measure(NARROW, 9000)
        self.counters: Counter[str] = Counter()
        self.out = SlowPath(self.table.outbound, self.counters, outbound=True)
        self.flows = list(open_flows(self.table, self.uplink))
        self.frame = frame_buffer()
        self.ahead = outbound.Ahead()
        self.heard: list[int] = []

    def close(self) -> None:
        for one in (self.tun, self.uplink, self.tunnel):
            one.close()

    def passed_by(self, header: bytes, packet: bytes, now: float) -> None:
        outcome = self.out.translate_untrusted(header, packet, now)
        if isinstance(outcome, Unknown):
            is_for_nobody(outcome)
            self.out.refuse_fragments(outcome, now)
            answer(outcome.packet)
            return
        for ready in outcome:
            size = len(ready.packet)
            self.frame[HEADER:HEADROOM] = ready.vnet
            self.frame[HEADROOM : HEADROOM + size] = ready.packet
            ready.rewrite.device.send(self.frame, size, ready.rewrite)  # type: ignore[attr-defined]  # opaque to the engine


def open_flows(table: Nat, side: Side) -> list[Flow]:
    """One flow of each protocol and family."""
    flows = []
    for protocol, port in ((UDP, 53), (TCP, 443)):
        way4, way6 = side.way(ROUTER4), side.way(ROUTER6, version=6, source=HOST6)
        flows.append(opened(table, f"{TUN4}:5000 > {FAR4}:{port}", way4, protocol=protocol))
        flows.append(opened(table, f"[{TUN6}]:5000 > [{FAR6}]:{port}", way6, protocol=protocol))
    flows.append(opened(table, f"{TUN4}:5000 > {FAR4}:0", side.way(ROUTER4), protocol=ICMP))
    flows.append(
        opened(table, f"[{TUN6}]:5000 > [{FAR6}]:0", side.way(ROUTER6, version=6, source=HOST6), protocol=ICMPV6)
    )
    return flows


@target(TARGETS, lambda: batches(list(OUT.values())))
def out_of_the_tun(data: bytes) -> None:
    """Whatever is in the tun ends as a packet with the side's address, as an answer, or as a count."""
    network = Network()
    try:
        for number, packet in enumerate(split(data, 8)):
            if len(packet) > vnet.SIZE:
                network.tun.sends(packet[vnet.SIZE :], header=packet[: vnet.SIZE])
            while network.ahead.read(network.tun):  # type: ignore[arg-type]  # a fake tun
                outbound.carry(network.ahead, network.table.outbound, network.passed_by, number)
        for sent in network.uplink.socket.packets:
            assert sent[12:16] == craft.address(HOST4) if sent[0] >> 4 == 4 else sent[8:24] == craft.address(HOST6)
        assert not network.tunnel.socket.packets
    finally:
        network.close()


@target(TARGETS, lambda: batches(list(BACK.values())))
def in_from_a_side(data: bytes) -> None:
    """Whatever a side brings ends as a packet for the app, or as a count; on the other side it is nobody's."""
    network = Network()
    try:
        for side in (network.tunnel, network.uplink):
            direction = network.table.inbound(side.device)
            slow = SlowPath(direction, network.counters, outbound=False)
            for number, packet in enumerate(split(data, 8)):
                if len(packet) > vnet.SIZE:
                    side.socket.delivers(packet[vnet.SIZE :], header=packet[: vnet.SIZE], padding=number)
                inbound.carry(
                    side.device, Tuns(network.tun, network.tun), direction, slow,  # type: ignore[arg-type]  # fake tuns
                    lambda *heard: network.heard.append(heard[2]), HalfOpen(network.counters).answer, network.counters,
                    network.frame, number,
                )  # fmt: skip
            assert side is network.uplink or not network.tun.answers
        for packet in network.tun.answers:
            is_for_app = packet[16:20] == craft.address(TUN4) if packet[0] >> 4 == 4 else (
                packet[24:40] == craft.address(TUN6)
            )  # fmt: skip
            assert is_for_app
    finally:
        network.close()


def answer(packet: bytes) -> None:
    """What we would say to the sender of this packet is a whole packet, or nothing."""
    try:
        headers = parse_untrusted(packet, len(packet))
    except MalformedPacket:
        return
    for sender in (craft.address(TUN4), craft.address(TUN6)):
        if len(sender) == len(headers.source):
            for said in (our.refusal(packet, headers, sender), our.too_big(packet, headers, sender, 1280)):
                assert said is None or parse_untrusted(said, len(said)).size == len(said)


@target(TARGETS, plain)
def one_packet(data: bytes) -> None:
    """Headers fit the packet, what is quoted in it too, and the pieces that it is cut into are all of it."""
    answer(data)
    try:
        headers = parse_untrusted(data, len(data))
        assert headers.transport <= headers.size <= len(data)
        assert {4: 4, 6: 16}[headers.version] == len(headers.source) == len(headers.destination)
        pieces = cut.into_fragments(data[: headers.size], headers, NARROW if headers.version == 4 else 1280, b"name")
        assert all(parse_untrusted(piece, len(piece)).size == len(piece) for piece in pieces)
        at, inner = icmp.embedded_untrusted(data, headers)
        assert at + inner.transport + 8 <= headers.size
    except MalformedPacket:
        pass


@target(TARGETS, lambda: [OUT["udp"], OUT["udp6"], *shapes([OUT["udp"], OUT["udp6"]])])
def a_datagram(data: bytes) -> None:
    """A question's place in its packet."""
    try:
        start, end = datagram_untrusted(memoryview(data))
    except MalformedPacket:
        return
    assert 0 < start <= end <= len(data)


@target(TARGETS, lambda: [OUT["tcp"][20:], OUT["tcp6"][40:], bytes(12) + b"\xf0" + bytes(7) + b"\x22\x0a" + bytes(38)])
def options_of_a_segment(data: bytes) -> None:
    """What is hidden leaves all else in its place."""
    segment = bytearray(data.ljust(20, b"\0"))
    hidden = bytearray(segment)
    tcpoptions.hide_untrusted(hidden, frozenset((8, 34)))
    assert all(new in (old, 1) for old, new in zip(segment, hidden, strict=True))
    assert segment[:20] == hidden[:20]


ETHERTYPES = (0x0800, 0x86DD, 0x0806, 0x8100)


@target(TARGETS, lambda: [bytes((number % 8,)) + packet for number, packet in enumerate(plain() * 8)])
def an_observed_frame(data: bytes) -> None:
    """The lab's observers write down whatever passes."""
    kind, frame = data[:1] or b"\0", data[1:]
    ethernet, ethertype = bool(kind[0] & 1), ETHERTYPES[kind[0] >> 1 & 3]
    seen = frames.parse_untrusted(frame, ethernet=ethernet, ethertype=ethertype)
    assert seen.protocol
    assert str(seen)
    record.get_key_untrusted(frame, 14 * ethernet, ethertype)
    kept = record.Record()
    kept.keep_untrusted(frame, ethernet=ethernet, ethertype=ethertype, direction="in", time=0.0, octets=len(frame))
    kept.count_untrusted(frame, ethernet=ethernet, ethertype=ethertype)
    assert 1 == len(kept.seen(seen.protocol))
