"""Frames of one device, read from a ring that the kernel fills (Documentation/networking/packet_mmap.rst).

A plain socket is charged the whole of a super-packet, 64 KiB, for the few octets of its head that we want, and
overflows within a thousand of them. A ring's slots hold heads only.
"""

import mmap
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from tunsplit.lab.netns import Namespace

ETH_P_ALL = 3
ARPHRD_ETHER = 1
SOL_PACKET = 263
PACKET_RX_RING, PACKET_STATISTICS, PACKET_VERSION = 5, 6, 10  # include/uapi/linux/if_packet.h
TPACKET_V2 = 1
STATUS_KERNEL = 0
SLOT = 384  # octets: header, address, and what is left of the frame, over 256
BLOCK = SLOT * 512  # whole pages
BLOCKS = 128  # 24 MiB, 65536 frames: a second of the busiest wire
SLOTS = BLOCK * BLOCKS // SLOT

# struct tpacket2_hdr: status · length · captured · offset of the frame · (network header) · seconds · nanoseconds
unpack_header = struct.Struct("=IIIHHII").unpack_from
# struct sockaddr_ll behind it: (family) · protocol · (interface, hardware type) · packet type
unpack_address = struct.Struct("!2xH6xB").unpack_from
ADDRESS = 32  # offset of that
pack_status = struct.Struct("=I").pack_into


class Frame(NamedTuple):
    """The head of a frame.

    Attributes:
        head: from the link header on.
        octets: the frame's full length.
        ethertype: the device's word for what is in it.
        sent_here: the device sends it; else it has received it.
        time: seconds since the epoch.
    """

    head: bytes
    octets: int
    ethertype: int
    sent_here: bool
    time: float


class Ring:
    """A packet socket on one device, both directions, with its ring."""

    def __init__(self, namespace: Namespace, device: str) -> None:
        self._next = 0
        self._dropped = 0
        self.socket = namespace.socket(socket.AF_PACKET, socket.SOCK_RAW)
        try:
            self.socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
            request = struct.pack("=4I", BLOCK, BLOCKS, SLOT, SLOTS)
            self.socket.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
            self._memory = mmap.mmap(self.socket.fileno(), BLOCK * BLOCKS)
            self.socket.bind((device, ETH_P_ALL))
        except BaseException:
            self.socket.close()
            raise
        self.ethernet = self.socket.getsockname()[3] == ARPHRD_ETHER

    @property
    def dropped(self) -> int:
        """Frames that found the ring full."""
        # The kernel sets these to zero when they are read.
        _, drops = struct.unpack("II", self.socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self._dropped += drops
        return self._dropped

    def read(self, most: int) -> Iterator[Frame]:
        """Give the frames that are there, up to so many."""
        memory = self._memory
        for _ in range(most):
            at = self._next * SLOT
            status, octets, captured, offset, _, seconds, nanoseconds = unpack_header(memory, at)
            if status == STATUS_KERNEL:
                # A device that goes down leaves an error, for which the socket counts as readable until it is read.
                self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                return
            ethertype, packet_type = unpack_address(memory, at + ADDRESS)
            head = memory[at + offset : at + offset + captured]
            pack_status(memory, at, STATUS_KERNEL)
            self._next = (self._next + 1) % SLOTS
            sent_here = packet_type == socket.PACKET_OUTGOING
            yield Frame(head, octets, ethertype, sent_here, seconds + nanoseconds / 1e9)

    def close(self) -> None:
        """Close the socket and give the ring's memory back."""
        self._memory.close()
        self.socket.close()
