"""Packets that are too big for their path, made to fit.

A segment of TCP becomes a super-packet, which the kernel cuts (virtio_net_hdr with gso_size): to the other end it is
as if the app's TCP had sent smaller segments. All else is cut into fragments, as the host that a packet comes from may
(RFC 791 §3.2, RFC 8200 §4.5).
"""

from tunsplit.wire import vnet
from tunsplit.wire.checksum import internet_checksum, pseudo_header
from tunsplit.wire.ip import (
    DONT_FRAGMENT,
    FRAGMENT_HEADER,
    MORE_FRAGMENTS,
    TCP,
    UDP,
    Headers,
    pack_u16,
    set_header_checksum,
    unpack_u16,
)

GSO_TCPV4, GSO_TCPV6, GSO_ECN = 1, 4, 0x80  # VIRTIO_NET_HDR_GSO_*
CWR = 0x80  # of TCP's flags: only the first segment keeps it (RFC 3168 §6.1.2), which the kernel has to be told
CHECKSUM_OFFSET = 16  # of TCP


def into_segments(header: memoryview, packet: memoryview, headers: Headers, mtu: int) -> None:
    """Make a whole segment of TCP a super-packet of segments that fit; `header` is its virtio header. In place."""
    at = headers.transport
    end = at + (packet[at + 12] >> 4) * 4
    gso_type = (GSO_TCPV4 if headers.version == 4 else GSO_TCPV6) | (GSO_ECN if packet[at + 13] & CWR else 0)
    if not header[0] & vnet.NEEDS_CSUM:
        covered = pseudo_header(headers.source + headers.destination, TCP, headers.size - at)
        pack_u16(packet, at + CHECKSUM_OFFSET, -internet_checksum(covered) % 0xFFFF)
    vnet.pack(header, 0, vnet.NEEDS_CSUM, gso_type, end, mtu - end, at, CHECKSUM_OFFSET)


def finish_checksum(packet: bytearray, start: int, offset: int, protocol: int) -> None:
    """Finish the transport's checksum over everything from `start` on, in place."""
    value = internet_checksum(packet[start:])
    # The field holds the pseudo-header's sum, so it is part of what is added up. UDP's 0 means "none" (RFC 768).
    pack_u16(packet, start + offset, value or 0xFFFF if protocol == UDP else value)


def into_fragments(packet: bytes | bytearray, headers: Headers, mtu: int, identification: bytes) -> list[bytes]:
    """Cut a packet whose checksums are finished; `identification`: 4 bytes, for a packet that has none.

    A fragment of IPv4 is cut further; nothing comes of one of IPv6, nor of a packet with extension headers.
    """
    if headers.version == 4:
        return _cut_ipv4(packet, headers, mtu, identification)
    if headers.identification is not None or headers.options:
        return []
    room = (mtu - 48) & ~7
    pieces = []
    for start in range(40, headers.size, room):
        data = packet[start : min(start + room, headers.size)]
        header = bytearray(packet[:40])
        pack_u16(header, 4, 8 + len(data))
        header[6] = FRAGMENT_HEADER
        more = start + room < headers.size
        header += bytes((headers.protocol, 0)) + (start - 40 | more).to_bytes(2, "big") + identification
        pieces.append(bytes(header) + data)
    return pieces


def _cut_ipv4(packet: bytes | bytearray, headers: Headers, mtu: int, identification: bytes) -> list[bytes]:
    start_of_data = (packet[0] & 15) * 4
    room = (mtu - start_of_data) & ~7
    name = bytes(packet[4:6])
    if name == bytes(2) and headers.identification is None:
        name = identification[:2]
    pieces = []
    for start in range(start_of_data, headers.size, room):
        data = packet[start : min(start + room, headers.size)]
        header = bytearray(packet[:start_of_data])
        pack_u16(header, 2, start_of_data + len(data))
        header[4:6] = name
        more = headers.more or start + room < headers.size
        offset = (headers.offset + start - start_of_data) // 8
        pack_u16(header, 6, offset | (MORE_FRAGMENTS if more else 0))
        set_header_checksum(header)
        pieces.append(bytes(header) + data)
    return pieces


def may_be_cut(packet: bytes | bytearray | memoryview, headers: Headers) -> bool:
    """Whether any router might cut this packet: IPv4 without "don't fragment"."""
    return headers.version == 4 and not unpack_u16(packet, 6)[0] & DONT_FRAGMENT
