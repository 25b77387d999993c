"""ICMP and ICMPv6: echo, and errors with the packet that they speak of inside (RFC 792, RFC 4443, RFC 5508)."""

from tunsplit.errors import MalformedPacket
from tunsplit.wire.ip import ICMP, ICMPV6, Headers, parse_untrusted, unpack_u16, unpack_u32

# Type of an echo request and of its reply, by protocol.
ECHO_REQUEST = {ICMP: 8, ICMPV6: 128}
ECHO_REPLY = {ICMP: 0, ICMPV6: 129}

UNREACHABLE = {4: 3, 6: 1}
FRAGMENTATION_NEEDED = 4  # code of IPv4's unreachable (RFC 1191 §4)
PACKET_TOO_BIG = 2  # type of ICMPv6 (RFC 4443 §3.2)

# Codes of "administratively prohibited": the kernel ends a connected UDP socket's wait on them at once
# (icmp_err_convert in net/ipv4/icmp.c, tab_unreach in net/ipv6/icmp.c).
PROHIBITED = {4: 13, 6: 1}
HOST_UNREACHABLE = {4: 1, 6: 3}

# Errors carry what caused them. Source quench and redirects are none of an app's business any more
# (RFC 6633, RFC 1122 §3.2.2.2), so they are not in here.
ERRORS = {ICMP: frozenset((3, 11, 12)), ICMPV6: frozenset((1, 2, 3, 4))}

HEADER = 8  # bytes of ICMP before the embedded packet, or before an echo's data


def is_error(protocol: int, icmp_type: int) -> bool:
    """Whether this type is an error that carries the packet which caused it."""
    return icmp_type in ERRORS.get(protocol, ())


def path_mtu(packet: bytes | bytearray | memoryview, headers: Headers) -> int | None:
    """How large a packet may be, says an error about one that was too big; None for any other error.

    0 from routers older than RFC 1191. The error's header has to be there whole.
    """
    at = headers.transport
    if headers.protocol == ICMPV6:
        return int(unpack_u32(packet, at + 4)[0]) if packet[at] == PACKET_TOO_BIG else None
    if (packet[at], packet[at + 1]) != (UNREACHABLE[4], FRAGMENTATION_NEEDED):
        return None
    return int(unpack_u16(packet, at + 6)[0])


def embedded_untrusted(packet: bytes | bytearray | memoryview, outer: Headers) -> tuple[int, Headers]:
    """Where the embedded packet starts in `packet`, and its headers (offsets counted from that start).

    Routers quote as little as 8 bytes of the transport (RFC 792) and leave the lengths as they were, so
    they do not have to fit.

    Raises:
        MalformedPacket: not even the first 8 bytes of the transport are there.
    """
    at = outer.transport + HEADER
    quoted = bytearray(packet[at : outer.size])
    if len(quoted) >= 40 and quoted[0] >> 4 == 6:
        quoted[4:6] = (len(quoted) - 40).to_bytes(2, "big")
    elif len(quoted) >= 20 and quoted[0] >> 4 == 4:
        quoted[2:4] = len(quoted).to_bytes(2, "big")
    headers = parse_untrusted(quoted, len(quoted))
    if headers.version != outer.version:
        raise MalformedPacket("error of one IP version about another")
    if not headers.has_transport or headers.transport + 8 > headers.size:
        raise MalformedPacket("too little of the packet is quoted")
    return at, headers
