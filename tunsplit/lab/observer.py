"""Observers: what really passed on a wire.

Some facts about packet sockets (net/packet/af_packet.c)
- One that is bound to ETH_P_ALL sees both directions; the address it gives with each frame says which.
- A veth's frames wait at its other end by the CPU that sent them (net/core/dev.c, enqueue_to_backlog): in order
  on one CPU, in no order between two. So a marker is sent on each of them.
- A super-packet (GSO) is one frame.
"""

import errno
import fcntl
import itertools
import os
import socket
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import dpkt
import trio

from tunsplit.errors import KernelError
from tunsplit.lab.frames import ETHERTYPE_IPV4, Direction
from tunsplit.lab.netns import Namespace
from tunsplit.lab.record import Record
from tunsplit.lab.ring import SLOT, Frame, Ring
from tunsplit.names import FRAME_PRIORITY

SIOCGIFFLAGS, IFF_RUNNING = 0x8913, 0x40  # include/uapi/linux/sockios.h, if.h
BATCH = 256  # frames between two looks at other tasks

# A marker is of no protocol that anybody speaks: an experimental Ethernet type (IEEE 802 §9.2.3) where there is
# Ethernet, else an IPv4 packet with a checksum of 0, which its receiver drops without an answer.
ETHERTYPE_MARKER = 0x88B5
MARKER_ETHERNET = b"\xff" * 6 + b"\x02" + bytes(5) + ETHERTYPE_MARKER.to_bytes(2, "big")
MARKER_IPV4 = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 60, 0, 0, 1, 253, 0, bytes((10, 64, 0, 2)), bytes((10, 64, 0, 1)))
MARKER_SIZE = 60  # the shortest Ethernet frame; and MARKER_IPV4's total length
MARKER_S = 0.5  # a marker that has not arrived by then may be lost, and is sent again
MARKER_TRIES = 20
WIRE_IS_DOWN = (errno.ENETDOWN, errno.ENODEV, errno.ENXIO)

Wire = tuple[Namespace, str]  # a namespace and a device in it


class Observer(Record):
    """Sees one wire. `seen`, `flows` and `clear` are those of `Record`.

    Args:
        name: for messages.
        wire: where to look.
        find_sender: from where markers are to come at the moment; None: from the device that is looked at.
        ours_is_out: what this device sends is on its way out of the host, as at the host's own end of a wire.
        dump: a pcapng file to write the frames to that are kept.
    """

    def __init__(
        self,
        name: str,
        wire: Wire,
        *,
        find_sender: Callable[[], Wire | None] = lambda: None,
        ours_is_out: bool = False,
        dump: Path | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self._wire = wire
        self._find_sender = find_sender
        self._ours_is_out = ours_is_out
        self._dump_path = dump
        self._dump: tuple[BinaryIO, Any] | None = None
        self._ring: Ring | None = None
        self._attached = trio.Event()
        self._has_looked = False
        self._dropped = 0  # by rings that are closed
        self._markers: dict[bytes, trio.Event] = {}
        self._numbers = itertools.count()

    @property
    def dropped(self) -> int:
        """Frames that passed too fast for us: if there are any, what was seen is not all."""
        return self._dropped + (0 if self._ring is None else self._ring.dropped)

    def clear(self) -> None:
        """Forget what was seen so far, also what is not read yet."""
        self._read_all()
        super().clear()

    def attach(self) -> None:
        """Start to look, or look at the device that has taken the old one's place."""
        self.detach()
        namespace, device = self._wire
        self._ring = Ring(namespace, device)
        if self._dump_path is not None and self._dump is None:
            file = self._dump_path.open("wb")
            linktype = dpkt.pcapng.DLT_EN10MB if self._ring.ethernet else dpkt.pcapng.DLT_RAW
            self._dump = file, dpkt.pcapng.Writer(file, snaplen=SLOT, linktype=linktype)
        self._has_looked = True
        self._attached.set()

    def detach(self) -> None:
        """Look no more for now; what was seen stays."""
        self._read_all()
        self._dropped = self.dropped
        if self._ring is not None:
            trio.lowlevel.notify_closing(self._ring.socket)
            self._ring.close()
            self._ring = None
            self._attached = trio.Event()

    def close(self) -> None:
        """Look no more, and end the file."""
        self.detach()
        if self._dump is not None:
            self._dump[0].close()
            self._dump = None

    async def watch(self) -> None:
        """Read what passes, until cancelled."""
        while True:
            await self._attached.wait()
            if self._ring is not None:
                try:
                    await trio.lowlevel.wait_readable(self._ring.socket)
                except trio.ClosedResourceError:
                    continue  # another device takes its place, or none
                self._read(BATCH)

    async def settle(self) -> None:
        """Wait until all that the host has sent on this wire so far has been seen.

        Raises:
            KernelError: nothing comes through, though the wire is up; or this observer has never looked.
        """
        if self._ring is None:
            if not self._has_looked:
                raise KernelError(f"observer {self.name}: the lab was opened without observers")
            return  # the device is gone, and what it brought was read when it went
        send = partial(self._send, ethernet=self._ring.ethernet)
        number = next(self._numbers)
        markers = {cpu: struct.pack("!QQ", number, cpu) for cpu in os.sched_getaffinity(0)}
        arrived = {token: trio.Event() for token in markers.values()}
        self._markers.update(arrived)
        try:
            for _ in range(MARKER_TRIES):
                namespace, device = self._find_sender() or self._wire
                await namespace.call(partial(send, device, markers))
                with trio.move_on_after(MARKER_S):
                    for event in arrived.values():
                        await event.wait()
                    return
        except OSError as error:
            if error.errno not in WIRE_IS_DOWN:
                raise
            self._read_all()  # nothing more comes
            return
        finally:
            for token in arrived:
                del self._markers[token]
        raise KernelError(f"observer {self.name}: no marker came through from {namespace.name} {device}")

    def _send(self, device: str, markers: Mapping[int, bytes], *, ethernet: bool) -> None:
        """Send one marker on each CPU; in a thread of its own, whose place it changes."""
        header, ethertype = (MARKER_ETHERNET, ETHERTYPE_MARKER) if ethernet else (MARKER_IPV4, ETHERTYPE_IPV4)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as own:
            # As tunsplit's own frames are: its netdev table lets nothing else of a packet socket pass.
            own.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, FRAME_PRIORITY)
            own.bind((device, ethertype))
            flags = struct.unpack_from("H", fcntl.ioctl(own, SIOCGIFFLAGS, device.encode().ljust(32, b"\0")), 16)[0]
            if not flags & IFF_RUNNING:
                raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
            for cpu, token in markers.items():
                os.sched_setaffinity(0, {cpu})
                try:
                    own.send((header + token).ljust(MARKER_SIZE, b"\0"))
                except OSError as error:
                    # A full queue, or a veth whose carrier is just being lost; the next try will tell.
                    if error.errno != errno.ENOBUFS:
                        raise

    def _read_all(self) -> None:
        while self._read(BATCH) == BATCH:
            pass

    def _read(self, most: int) -> int:
        """Read up to so many frames; give how many there were."""
        if self._ring is None:
            return 0
        count = 0
        for count, frame in enumerate(self._ring.read(most), 1):  # noqa: B007 - the last one is the answer
            self._take(frame, ethernet=self._ring.ethernet)
        return count

    def _take(self, frame: Frame, *, ethernet: bool) -> None:
        if self.count_untrusted(frame.head, ethernet=ethernet, ethertype=frame.ethertype):
            return
        header = MARKER_ETHERNET if ethernet else MARKER_IPV4
        if frame.head.startswith(header):
            token = frame.head[len(header) : len(header) + 16]
            if token in self._markers:
                self._markers[token].set()
            return
        direction: Direction = "out" if frame.sent_here == self._ours_is_out else "in"
        kept = self.keep_untrusted(
            frame.head,
            ethernet=ethernet,
            ethertype=frame.ethertype,
            direction=direction,
            time=frame.time,
            octets=frame.octets,
        )
        if kept and self._dump is not None:
            self._dump[1].writepkt(frame.head, ts=frame.time)
