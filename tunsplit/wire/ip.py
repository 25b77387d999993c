"""IPv4 and IPv6 as they lie in the buffer (RFC 791 §3.1, RFC 8200 §3).

An IPv4 header without options has its addresses at bytes 12-20 and the transport's ports at once after
them; an IPv6 header without extension headers has them at 8-40 and the ports after. So the key of a
flow, its four-tuple, is read, never built: 12 bytes of the one, 36 bytes of the other.

Whatever does not look so simple (options, extension headers, fragments, other protocols than TCP and
UDP) is taken apart by `parse_untrusted`, once, on the slow path.
"""

import struct
from dataclasses import dataclass

from tunsplit.errors import MalformedPacket

# x2 total length · x2 flags+offset · x1 protocol · checksum · four-tuple
unpack_ipv4 = struct.Struct("!2xH2xHxBH12s").unpack_from
# checksum · four-tuple, at byte 10
pack_ipv4 = struct.Struct("!H12s").pack_into
# x4 payload length · next header · x1 four-tuple
unpack_ipv6 = struct.Struct("!4xHBx36s").unpack_from
# four-tuple, at byte 8
pack_ipv6 = struct.Struct("36s").pack_into
unpack_u16 = struct.Struct("!H").unpack_from
pack_u16 = struct.Struct("!H").pack_into
unpack_u32 = struct.Struct("!I").unpack_from
pack_u32 = struct.Struct("!I").pack_into

NO_OPTIONS = 0x45  # version 4, header of 5 words
FRAGMENT = 0x3FFF  # more fragments | offset
MORE_FRAGMENTS = 0x2000
DONT_FRAGMENT = 0x4000
OFFSET = 0x1FFF

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
DCCP, UDPLITE = 33, 136
NO_NEXT_HEADER = 59

# What any path takes, in bytes of an IP packet: RFC 8200 §5; for IPv4, where RFC 791's 68 is a dead letter, the least
# that Linux believes of a router (net/ipv4/route.c, DEFAULT_MIN_PMTU).
SMALLEST_PATH = {4: 552, 6: 1280}

# Where a transport keeps a checksum that covers the addresses (RFC 9293, 768, 4443, 4340, 3828).
CHECKSUM_AT = {TCP: 16, UDP: 6, ICMPV6: 2, DCCP: 6, UDPLITE: 6}

# IPv6 extension headers that may stand before the transport (RFC 8200 §4.1).
HOP_BY_HOP, ROUTING, FRAGMENT_HEADER, DESTINATION_OPTIONS = 0, 43, 44, 60
_MOST_EXTENSION_HEADERS = 8

# IPv4 options that make the destination field a lie (RFC 791 §3.1: loose and strict source routing).
_SOURCE_ROUTES = frozenset((131, 137))

NAMES = {
    ICMP: "icmp",
    TCP: "tcp",
    UDP: "udp",
    ICMPV6: "icmpv6",
    33: "dccp",
    47: "gre",
    50: "esp",
    51: "ah",
    132: "sctp",
    136: "udplite",
}


def protocol_name(protocol: int) -> str:
    """The protocol's lower-case name, or its number where it has none here."""
    return NAMES.get(protocol, str(protocol))


@dataclass(slots=True)
class Headers:
    """What stands before the transport's payload.

    `size` is the packet's own length in bytes (a frame may carry padding after it), `transport` the
    offset of the transport header, `identification` that of a fragment (None: not a fragment) and
    `offset` the fragment's place in bytes; `routed` says that the packet asks for a path of its own.
    """

    version: int
    size: int
    protocol: int
    transport: int
    source: bytes
    destination: bytes
    identification: bytes | None = None
    offset: int = 0
    more: bool = False
    options: bool = False
    routed: bool = False

    @property
    def has_transport(self) -> bool:
        """Whether the transport header is in this packet: not in a later fragment."""
        return not self.offset


def parse_untrusted(packet: bytes | bytearray | memoryview, size: int) -> Headers:
    """Take the headers of `packet` (its first `size` bytes) apart.

    Raises:
        MalformedPacket: the lengths in it do not fit, or it is neither IPv4 nor IPv6.
    """
    if size < 1:
        raise MalformedPacket("empty")
    version = packet[0] >> 4
    if version == 4:
        return _parse_ipv4(packet, size)
    if version == 6:
        return _parse_ipv6(packet, size)
    raise MalformedPacket(f"IP version {version}")


def _parse_ipv4(packet: bytes | bytearray | memoryview, size: int) -> Headers:
    header = (packet[0] & 15) * 4
    if header < 20 or size < header:
        raise MalformedPacket("IPv4 header is cut")
    (total,) = unpack_u16(packet, 2)
    if not header <= total <= size:
        raise MalformedPacket("IPv4 total length does not fit")
    (fragment,) = unpack_u16(packet, 6)
    headers = Headers(
        version=4,
        size=total,
        protocol=packet[9],
        transport=header,
        source=bytes(packet[12:16]),
        destination=bytes(packet[16:20]),
        offset=(fragment & OFFSET) * 8,
        more=bool(fragment & MORE_FRAGMENTS),
        options=header > 20,
    )
    if fragment & FRAGMENT:
        headers.identification = bytes(packet[4:6])
    if headers.options:
        headers.routed = _has_source_route(bytes(packet[20:header]))
    return headers


def _has_source_route(options: bytes) -> bool:
    at = 0
    while at < len(options) and (kind := options[at]):
        if kind == 1:  # no operation: one byte
            at += 1
            continue
        if kind in _SOURCE_ROUTES:
            return True
        if at + 1 >= len(options) or options[at + 1] < 2:
            raise MalformedPacket("IPv4 option is cut")
        at += options[at + 1]
    return False


def _parse_ipv6(packet: bytes | bytearray | memoryview, size: int) -> Headers:
    if size < 40:
        raise MalformedPacket("IPv6 header is cut")
    (payload,) = unpack_u16(packet, 4)
    end = 40 + payload
    if end > size:
        raise MalformedPacket("IPv6 payload length does not fit")
    headers = Headers(
        version=6,
        size=end,
        protocol=packet[6],
        transport=40,
        source=bytes(packet[8:24]),
        destination=bytes(packet[24:40]),
    )
    for _ in range(_MOST_EXTENSION_HEADERS + 1):
        at = headers.transport
        if headers.protocol == FRAGMENT_HEADER:
            if at + 8 > end:
                raise MalformedPacket("IPv6 fragment header is cut")
            if headers.identification is not None:  # once at most (RFC 8200 §4.1): it would have two names
                raise MalformedPacket("two IPv6 fragment headers")
            (fragment,) = unpack_u16(packet, at + 2)
            headers.identification = bytes(packet[at + 4 : at + 8])
            headers.offset = fragment & 0xFFF8
            headers.more = bool(fragment & 1)
            length = 8
        elif headers.protocol in (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS):
            if at + 8 > end:
                raise MalformedPacket("IPv6 extension header is cut")
            headers.options = True
            headers.routed = headers.routed or headers.protocol == ROUTING
            length = (packet[at + 1] + 1) * 8
        else:
            return headers
        if at + length > end:
            raise MalformedPacket("IPv6 extension header is cut")
        headers.protocol = packet[at]
        headers.transport = at + length
        if headers.offset:  # what follows is the middle of a datagram, whatever it looks like
            return headers
    raise MalformedPacket("too many IPv6 extension headers")


def without_options(packet: bytes | bytearray | memoryview) -> bytearray:
    """A copy of an IPv4 packet whose header has no options; its header checksum is right again."""
    header = (packet[0] & 15) * 4
    stripped = bytearray(packet[:20]) + packet[header:]
    stripped[0] = NO_OPTIONS
    pack_u16(stripped, 2, len(stripped))
    set_header_checksum(stripped)
    return stripped


def set_header_checksum(packet: bytearray | memoryview) -> None:
    """Compute the header checksum of an IPv4 packet anew, in place."""
    header = (packet[0] & 15) * 4
    pack_u16(packet, 10, 0)
    value = int.from_bytes(packet[:header], "big")
    pack_u16(packet, 10, -value % 0xFFFF)
