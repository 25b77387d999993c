"""`struct virtio_net_hdr` (include/uapi/linux/virtio_net.h), in front of each packet of the tun and of a packet socket.

Ten bytes, little-endian here as on every machine that we support: flags, gso_type, hdr_len, gso_size,
csum_start, csum_offset. `hdr_len` and `csum_start` count from the start of the frame, so that an
Ethernet header in front moves them by its 14 bytes.
"""

import struct

SIZE = 10
NONE = bytes(SIZE)

NEEDS_CSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM: the transport's checksum field holds the pseudo-header's sum only

unpack = struct.Struct("<BBHHHH").unpack_from
pack = struct.Struct("<BBHHHH").pack_into


# The header and an Ethernet header after it.
pack_ethernet = struct.Struct("<BBHHHH14s").pack_into


def shift(header: bytearray | memoryview, by: int) -> None:
    """Move what counts from the start of the frame by `by` bytes, in place."""
    move(header, 0, header, 0, by)


def move(source: bytearray | memoryview, at: int, target: bytearray | memoryview, to: int, by: int) -> None:
    """Write the header at `at` of `source` to `to` of `target`, for a frame that is `by` bytes longer in front."""
    flags, gso_type, header_length, gso_size, checksum_start, checksum_offset = unpack(source, at)
    if flags & NEEDS_CSUM:
        checksum_start += by
    if gso_type:
        header_length += by
    try:
        pack(target, to, flags, gso_type, header_length, gso_size, checksum_start, checksum_offset)
    except struct.error:  # what the device wrote leads out of the frame
        pack(target, to, flags, gso_type, _fit(header_length), gso_size, _fit(checksum_start), checksum_offset)


def _fit(value: int) -> int:
    return min(max(value, 0), 0xFFFF)
