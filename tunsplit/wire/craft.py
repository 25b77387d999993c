"""Packets of our own, all for the apps behind the tun: resets and ICMP errors.

Each answers a packet that the app sent and is made from it: addresses and ports turned round, nothing
invented but the sender of an ICMP error.
"""

import struct

from tunsplit.wire import icmp
from tunsplit.wire.checksum import internet_checksum, pseudo_header
from tunsplit.wire.ip import (
    DONT_FRAGMENT,
    ICMP,
    ICMPV6,
    NO_OPTIONS,
    TCP,
    UDP,
    Headers,
    pack_u16,
    set_header_checksum,
    unpack_u32,
)

# version+IHL · x total length · x2 flags · TTL · protocol · checksum · four-tuple · UDP length · UDP checksum
pack_udp4 = struct.Struct("!BxHxxHBBH12sHH").pack
# version · x3 payload length · next header · hop limit · four-tuple · UDP length · UDP checksum
pack_udp6 = struct.Struct("!BxxxHBB36sHH").pack
FIN, SYN, RST, ACK = 1, 2, 4, 16
_HOP_LIMIT = 64
_MOST_QUOTED = {4: 576 - 28, 6: 1280 - 48}  # RFC 1812 §4.3.2.3, RFC 4443 §2.4 (c)


def ip_packet(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytearray:
    """An IP packet of the addresses' version around a finished `payload`."""
    if len(source) == 4:
        packet = bytearray((NO_OPTIONS, 0)) + (20 + len(payload)).to_bytes(2, "big") + bytes(2)
        packet += DONT_FRAGMENT.to_bytes(2, "big") + bytes((_HOP_LIMIT, protocol, 0, 0)) + source + destination
        set_header_checksum(packet)
    else:
        packet = bytearray((0x60, 0, 0, 0)) + len(payload).to_bytes(2, "big")
        packet += bytes((protocol, _HOP_LIMIT)) + source + destination
    return packet + payload


class Datagrams:
    """UDP packets of one flow, in this direction: what they have in common is worked out once."""

    def __init__(self, four_tuple: bytes) -> None:
        """Take addresses and ports as they lie on the wire."""
        self._four_tuple = four_tuple
        self._version4 = len(four_tuple) == 12
        # The pseudo-header and the ports, but for the length, which counts twice: there, and in UDP's own header.
        self._sum = (int.from_bytes(four_tuple, "big") + UDP) % 0xFFFF
        # The IPv4 header but for its length.
        header = pack_udp4(NO_OPTIONS, 0, DONT_FRAGMENT, _HOP_LIMIT, UDP, 0, four_tuple[:12], 0, 0)[:20]
        self._header_sum = int.from_bytes(header, "big") % 0xFFFF

    def packet(self, payload: bytes) -> bytes:
        """One packet, its checksums finished."""
        length = 8 + len(payload)
        data = int.from_bytes(payload, "big")
        if length & 1:
            data <<= 8
        # A computed 0 goes out as 0xFFFF, since 0 means "none" (RFC 768).
        check = -(self._sum + 2 * length + data) % 0xFFFF or 0xFFFF
        if self._version4:
            size = 20 + length
            header = -(self._header_sum + size) % 0xFFFF
            return (
                pack_udp4(NO_OPTIONS, size, DONT_FRAGMENT, _HOP_LIMIT, UDP, header, self._four_tuple, length, check)
                + payload
            )
        return pack_udp6(0x60, length, UDP, _HOP_LIMIT, self._four_tuple, length, check) + payload


def shortest(protocol: int, four_tuple: bytes) -> bytearray:
    """The shortest packet of a flow: an empty datagram, an echo request, or a bare header of any other protocol.

    Its transport has no checksum: it is to be quoted, not sent.
    """
    transport = b""
    if protocol == UDP:
        transport = four_tuple[-4:] + bytes((0, 8, 0, 0))
    elif protocol in icmp.ECHO_REQUEST:
        transport = bytes((icmp.ECHO_REQUEST[protocol], 0, 0, 0)) + four_tuple[-4:-2] + bytes(2)
    size = 4 if len(four_tuple) == 12 else 16
    return ip_packet(four_tuple[:size], four_tuple[size : 2 * size], protocol, transport)


def reset(packet: bytes | bytearray | memoryview, headers: Headers) -> bytearray | None:
    """The RST that refuses the TCP segment in `packet` (RFC 9293 §3.5.2); None where it has to stay unanswered."""
    at = headers.transport
    if headers.protocol != TCP or not headers.has_transport or at + 20 > headers.size:
        return None
    data = headers.size - at - (header := (packet[at + 12] >> 4) * 4)
    flags = packet[at + 13]
    if flags & RST or header < 20 or data < 0:
        return None
    sequence = acknowledged = 0
    if flags & ACK:
        (sequence,) = unpack_u32(packet, at + 8)
        answer = RST
    else:
        acknowledged = unpack_u32(packet, at + 4)[0] + data + bool(flags & SYN) + bool(flags & FIN)
        answer = RST | ACK
    segment = bytearray(packet[at + 2 : at + 4]) + packet[at : at + 2]
    segment += sequence.to_bytes(4, "big") + (acknowledged & 0xFFFFFFFF).to_bytes(4, "big")
    segment += bytes((0x50, answer, 0, 0, 0, 0, 0, 0))
    addresses = headers.destination + headers.source
    pack_u16(segment, 16, internet_checksum(pseudo_header(addresses, TCP, len(segment)) + segment))
    return ip_packet(headers.destination, headers.source, TCP, bytes(segment))


def icmp_error(
    packet: bytes | bytearray | memoryview, headers: Headers, sender: bytes, icmp_type: int, code: int, *, mtu: int = 0
) -> bytearray | None:
    """The ICMP error about `packet`, sent to its source as if by `sender`; None where none may be sent.

    No error answers an ICMP error, a later fragment, or what was sent to many, or from many or nowhere
    (RFC 1122 §3.2.2, RFC 4443 §2.4 (e)).
    """
    if not headers.has_transport or not any(headers.source):
        return None
    if is_multicast(headers.source) or is_multicast(headers.destination):
        return None
    if headers.protocol in icmp.ERRORS:
        at = headers.transport
        if at >= headers.size or packet[at] not in (
            icmp.ECHO_REQUEST[headers.protocol],
            icmp.ECHO_REPLY[headers.protocol],
        ):
            return None
    quoted = bytes(packet[: min(headers.size, _MOST_QUOTED[headers.version])])
    message = bytearray((icmp_type, code, 0, 0)) + mtu.to_bytes(4, "big") + quoted
    if headers.version == 4:
        protocol, covered = ICMP, b""
    else:
        protocol, covered = ICMPV6, pseudo_header(sender + headers.source, ICMPV6, len(message))
    pack_u16(message, 2, internet_checksum(covered + message))
    return ip_packet(sender, headers.source, protocol, bytes(message))


def too_big(packet: bytes | bytearray | memoryview, headers: Headers, sender: bytes, mtu: int) -> bytearray | None:
    """Fragmentation needed (RFC 1191 §4) or Packet Too Big (RFC 4443 §3.2) about `packet`."""
    if headers.version == 4:
        return icmp_error(packet, headers, sender, icmp.UNREACHABLE[4], icmp.FRAGMENTATION_NEEDED, mtu=mtu)
    return icmp_error(packet, headers, sender, icmp.PACKET_TOO_BIG, 0, mtu=mtu)


def refusal(packet: bytes | bytearray | memoryview, headers: Headers, sender: bytes) -> bytearray | None:
    """What tells an app at once that this packet goes nowhere: RST for TCP, "prohibited" for all else."""
    if headers.protocol == TCP:
        return reset(packet, headers)
    return icmp_error(packet, headers, sender, icmp.UNREACHABLE[headers.version], icmp.PROHIBITED[headers.version])


def is_multicast(address: bytes) -> bool:
    """Whether packets to this address are for many, limited broadcast included."""
    return address[0] >= 224 if len(address) == 4 else address[0] == 0xFF
