"""Packets as tcpdump writes them: `udp("10.0.0.2:5000 > 1.1.1.1:53", b"?")`.

dpkt builds them, so that every checksum that ours is compared with comes from a stranger's code. Only what dpkt
cannot build (an options field with its length, extension headers, fragments) is put together here.
"""

import struct
from dataclasses import dataclass
from ipaddress import ip_address

import dpkt

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
ICMP, TCP, UDP, ICMPV6, DCCP, UDPLITE, GRE = 1, 6, 17, 58, 33, 136, 47
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS = 0, 43, 44, 60
RECORD_ROUTE = bytes((7, 11, 4)) + bytes(8) + b"\0"  # one byte of end-of-options
LOOSE_SOURCE_ROUTE = bytes((131, 7, 4, 203, 0, 113, 1, 0))
PADDING = bytes((1, 4, 0, 0, 0, 0))  # PadN: with the two bytes before it, the shortest extension header

CHECKSUM_AT = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2, DCCP: 6, UDPLITE: 6}


@dataclass(frozen=True)
class Ends:
    """Where a packet comes from and goes to, packed."""

    source: bytes
    destination: bytes
    source_port: int = 0
    destination_port: int = 0

    @property
    def key(self) -> bytes:
        """The four-tuple as it lies on the wire."""
        return self.source + self.destination + struct.pack("!HH", self.source_port, self.destination_port)


def ends(text: str) -> Ends:
    """`1.2.3.4:5 > 6.7.8.9:10`, `[2001:db8::1]:5 > [2001:db8::2]:10`, or either without ports."""
    (source, source_port), (destination, destination_port) = (_end(one) for one in text.split(" > "))
    return Ends(source, destination, source_port, destination_port)


def _end(text: str) -> tuple[bytes, int]:
    address, _, port = text.rpartition(":") if "]:" in text or text.count(":") == 1 else (text, "", "0")
    return ip_address(address.strip("[]")).packed, int(port)


def address(text: str) -> bytes:
    """An address, packed."""
    return ip_address(text).packed


def ip(between: Ends, protocol: int, payload: bytes, *, identification: int = 0, flags: int = 0) -> bytes:
    """An IP packet around a payload that is finished; what only IPv4 has is left out of IPv6."""
    if len(between.source) == 4:
        return _ipv4(between, protocol, payload, identification, flags)
    header = dpkt.ip6.IP6(src=between.source, dst=between.destination, nxt=protocol, hlim=64, plen=len(payload))
    return bytes(header) + payload


def _ipv4(between: Ends, protocol: int, payload: bytes, identification: int, flags: int, options: bytes = b"") -> bytes:
    packet = dpkt.ip.IP(src=between.source, dst=between.destination, p=protocol, id=identification, data=payload)
    packet.hl = 5 + len(options) // 4
    packet.opts = options
    packet._flags_offset = flags  # noqa: SLF001  # dpkt's own name for the field as a whole
    return bytes(packet)


def tcp(
    text: str, data: bytes = b"", *, flags: int = ACK, seq: int = 1, ack: int = 0, options: bytes = b"", **header: int
) -> bytes:
    """A TCP segment."""
    segment = dpkt.tcp.TCP(
        sport=ends(text).source_port,
        dport=ends(text).destination_port,
        flags=flags,
        seq=seq,
        ack=ack,
        data=data,
        opts=options,
    )
    segment.off = 5 + len(options) // 4
    return transport(text, TCP, bytes(segment), **header)


def udp(text: str, data: bytes = b"", *, checksum: bool = True, **header: int) -> bytes:
    """A UDP datagram; without a checksum, if so wished (RFC 768)."""
    datagram = dpkt.udp.UDP(
        sport=ends(text).source_port, dport=ends(text).destination_port, ulen=8 + len(data), data=data
    )
    if not checksum:
        return ip(ends(text), UDP, bytes(datagram), **header)
    return transport(text, UDP, bytes(datagram), **header)


def echo(text: str, identifier: int, data: bytes = b"", *, reply: bool = False, **header: int) -> bytes:
    """An echo request or reply of the addresses' version."""
    message = bytes(dpkt.icmp.ICMP.Echo(id=identifier, seq=1, data=data))
    if len(ends(text).source) == 4:
        return transport(text, ICMP, bytes((0 if reply else 8, 0, 0, 0)) + message, **header)
    return transport(text, ICMPV6, bytes((129 if reply else 128, 0, 0, 0)) + message, **header)


def error(text: str, quoted: bytes, kind: int, code: int = 0, *, word: int = 0, **header: int) -> bytes:
    """An ICMP error about what is quoted; `word` is what stands before that: an MTU, a pointer."""
    protocol = ICMP if len(ends(text).source) == 4 else ICMPV6
    return transport(text, protocol, struct.pack("!BBHI", kind, code, 0, word) + quoted, **header)


def transport(text: str, protocol: int, payload: bytes, **header: int) -> bytes:
    """A packet of any protocol, with its checksum where there is one."""
    between = ends(text)
    return ip(between, protocol, with_checksum(between, protocol, payload), **header)


def with_checksum(between: Ends, protocol: int, payload: bytes) -> bytes:
    """A transport's bytes with their checksum, computed by dpkt, in its place."""
    at = CHECKSUM_AT.get(protocol)
    if at is None:
        return payload
    payload = payload[:at] + bytes(2) + payload[at + 2 :]
    covered = b"" if protocol == ICMP else pseudo_header(between, protocol, len(payload))
    value = dpkt.dpkt.in_cksum(covered + payload)
    if not value and protocol in (UDP, UDPLITE):
        value = 0xFFFF
    return payload[:at] + struct.pack("!H", value) + payload[at + 2 :]


def pseudo_header(between: Ends, protocol: int, length: int) -> bytes:
    """What a checksum covers besides the transport's own bytes, in an order of our own: a sum has none."""
    form = "!4s4sBBH" if len(between.source) == 4 else "!16s16sBBH"
    return struct.pack(form, between.source, between.destination, 0, protocol, length & 0xFFFF) + (
        struct.pack("!H", length >> 16)
    )


def unfinished(packet: bytes) -> bytes:
    """The same packet as checksum offloading leaves it: the field holds the pseudo-header's plain sum."""
    between, protocol, at = _taken_apart(packet)
    value = 0xFFFF ^ dpkt.dpkt.in_cksum(pseudo_header(between, protocol, len(packet) - at))
    at += CHECKSUM_AT[protocol]
    return packet[:at] + struct.pack("!H", value) + packet[at + 2 :]


def finished(packet: bytes) -> bytes:
    """What a network card makes of an unfinished packet: the sum from the transport on, complemented, in its place."""
    _, protocol, start = _taken_apart(packet)
    at = start + CHECKSUM_AT[protocol]
    value = dpkt.dpkt.in_cksum(packet[start:])
    if not value and protocol == UDP:
        value = 0xFFFF
    return packet[:at] + struct.pack("!H", value) + packet[at + 2 :]


def _taken_apart(packet: bytes) -> tuple[Ends, int, int]:
    if packet[0] >> 4 == 4:
        return Ends(packet[12:16], packet[16:20]), packet[9], (packet[0] & 15) * 4
    return Ends(packet[8:24], packet[24:40]), packet[6], 40


def with_options(packet: bytes, options: bytes) -> bytes:
    """An IPv4 packet with options in its header."""
    between, protocol, at = _taken_apart(packet)
    identification, flags = struct.unpack_from("!HH", packet, 4)
    return _ipv4(between, protocol, packet[at:], identification, flags, options)


def with_extensions(packet: bytes, *headers: tuple[int, bytes]) -> bytes:
    """An IPv6 packet with extension headers, each given as its kind and all that follows its length."""
    between, following, _ = _taken_apart(packet)
    payload = packet[40:]
    for kind, body in reversed(headers):
        length = 0 if kind == FRAGMENT else (len(body) + 2) // 8 - 1
        payload = bytes((following, length)) + body + payload
        following = kind
    return ip(between, following, payload)


def fragment_header(offset: int, *, more: bool, identification: int) -> tuple[int, bytes]:
    """A fragment header for `with_extensions`; the offset in bytes."""
    return FRAGMENT, struct.pack("!HI", offset | more, identification)


def fragments(packet: bytes, size: int = 1280, *, identification: int = 7) -> list[bytes]:
    """The packet in pieces of `size` bytes of payload, in order."""
    between, protocol, at = _taken_apart(packet)
    payload = packet[at:]
    pieces = []
    for offset in range(0, len(payload), size):
        piece, more = payload[offset : offset + size], offset + size < len(payload)
        if at == 40:
            header = fragment_header(offset, more=more, identification=identification)
            pieces.append(with_extensions(ip(between, protocol, piece), header))
        else:
            flags = offset // 8 | (0x2000 if more else 0)
            pieces.append(ip(between, protocol, piece, identification=identification, flags=flags))
    return pieces


def put_together(pieces: list[bytes]) -> bytes:
    """The datagram that these fragments are, whatever their order."""
    payload: dict[int, bytes] = {}
    for piece in pieces:
        between, protocol, at = _taken_apart(piece)
        if at == 40:
            protocol = piece[40]
            payload[struct.unpack_from("!H", piece, 42)[0] & 0xFFF8] = piece[48:]
        else:
            payload[(struct.unpack_from("!H", piece, 6)[0] & 0x1FFF) * 8] = piece[at:]
    return ip(between, protocol, b"".join(payload[offset] for offset in sorted(payload)))
