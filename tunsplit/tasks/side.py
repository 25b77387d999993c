"""A device of a side: how translated packets leave by it, and to which neighbour.

Theory of operation. On a device with link layer a packet needs the Ethernet address of its next hop. The
kernel's neighbour table knows it or finds it out: we ask (NTF_USE), keep the packet meanwhile, in bounds,
and go by the events. A next hop is one object, shared by all flows that go there, so that a gateway's new
address is written once; it lives as long as one of them, or a way, leads by it. On a tunnel there is nothing
to know.

What the kernel's table says is kept as it says it, so it needs no bounds of its own (gc_thresh3). An entry
that the kernel forgets, since it sees none of our frames, is no reason to stop: it is asked for again, and
its address used until the kernel says better.
"""

import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from tunsplit.engine.flow import FlowState, Rewrite
from tunsplit.host import FAMILIES, IPAddress, Link, Neighbour
from tunsplit.kernel.packet import PacketSocket
from tunsplit.wire import vnet

ETHERNET = 14  # bytes of an Ethernet header
# A frame buffer: room for an Ethernet header, the virtio header as the tun has it, the IP packet. On a device
# with link layer the virtio header goes to the very front, and the Ethernet header between the two.
HEADER = ETHERNET
HEADROOM = HEADER + vnet.SIZE
FRAME = HEADROOM + 65536
MOST_WAITING = 64  # packets a next hop
MOST_WAITING_OCTETS = 4 << 20  # of all next hops
_ETHERTYPE = {4: b"\x08\x00", 6: b"\x86\xdd"}


def frame_buffer() -> memoryview:
    """A buffer for one packet, with room in front for either kind of device."""
    return memoryview(bytearray(FRAME))


@dataclass(slots=True, eq=False, weakref_slot=True)
class NextHop:
    """Where packets go first. `ethernet` is the whole Ethernet header; empty on a tunnel, None while unknown."""

    address: IPAddress
    ethernet: bytes | None = None
    waiting: list[tuple[Rewrite, bytes]] = field(default_factory=list)


class SideDevice:
    """One device of one side. The tunnel has one; the uplink may have one for each IP version."""

    def __init__(
        self,
        side: str,
        link: Link,
        socket: PacketSocket,
        *,
        resolve: Callable[[int, IPAddress], bool],
        too_big: Callable[[Rewrite, bytes, int], None],
        unreachable: Callable[[Rewrite, bytes], None],
    ) -> None:
        """`resolve` asks the kernel for a neighbour, False where it does not take the question.

        The other two tell an app that its packet cannot go.
        """
        self.side = side
        self.link = link
        self.socket = socket
        self.mtu = link.mtu
        self.narrow = False  # whether the tun lets packets through that are too big for this device
        self.closed = False
        self.counters: Counter[str] = Counter()
        self._ethernet = socket.ethernet
        self._send = socket.send
        self._resolve = resolve
        self._too_big = too_big
        self._unreachable = unreachable
        # By the IP version of the packets and the address: IPv4 may go by an IPv6 gateway (RFC 5549).
        self._next_hops: WeakValueDictionary[tuple[int, IPAddress], NextHop] = WeakValueDictionary()
        self._waiting_octets = 0
        self._known: dict[IPAddress, bytes] = {}  # what the kernel's table says now
        self.send = self._send_ethernet if socket.ethernet else self._send_plain

    def next_hop(self, address: IPAddress, version: int) -> NextHop:
        """The next hop with this address, for packets of one IP version.

        The kernel starts to look for it, or to confirm it, at once.
        """
        next_hop = self._next_hops.get((version, address))
        if next_hop is None:
            next_hop = self._next_hops[version, address] = NextHop(address, None if self._ethernet else b"")
            if self._ethernet:
                if (mac := self._known.get(address)) is not None:
                    next_hop.ethernet = self._header(version, mac)
                self._resolve(self.link.index, address)
        return next_hop

    def next_hops(self) -> list[IPAddress]:
        """Every address that packets go to just now; empty on a tunnel."""
        return [address for _, address in tuple(self._next_hops)] if self._ethernet else []

    def mac_of(self, address: IPAddress) -> bytes | None:
        """A neighbour's Ethernet address, as far as the kernel knows it."""
        return self._known.get(address)

    def _send_ethernet(self, frame: memoryview, size: int, rewrite: Rewrite) -> None:
        """Send the packet of `size` bytes in a frame buffer; what is in front of it is overwritten."""
        next_hop: NextHop = rewrite.next_hop  # type: ignore[assignment]  # opaque to the engine
        if self.narrow and size > self.mtu and not self._fits(frame, size):
            self._too_big(rewrite, bytes(frame[HEADROOM : HEADROOM + size]), self.mtu)
            return
        if (ethernet := next_hop.ethernet) is None:
            self._wait(frame, size, rewrite, next_hop)
            return
        flags, gso_type, header_length, gso_size, checksum_start, checksum_offset = vnet.unpack(frame, HEADER)
        if flags & vnet.NEEDS_CSUM:
            checksum_start += ETHERNET
        if gso_type:
            header_length = min(header_length + ETHERNET, 0xFFFF)
        try:
            vnet.pack_ethernet(
                frame, 0, flags, gso_type, header_length, gso_size, checksum_start, checksum_offset, ethernet
            )
            self._send(frame[: HEADROOM + size])
        except OSError as error:
            self.counters[f"send_{error.errno}"] += 1
        except struct.error:  # a header that ends beyond what 16 bits can say
            self.counters["send_malformed"] += 1

    def _send_plain(self, frame: memoryview, size: int, rewrite: Rewrite) -> None:
        """The same on a device without link layer."""
        if self.narrow and size > self.mtu and not self._fits(frame, size):
            self._too_big(rewrite, bytes(frame[HEADROOM : HEADROOM + size]), self.mtu)
            return
        try:
            self._send(frame[HEADER : HEADROOM + size])
        except OSError as error:
            self.counters[f"send_{error.errno}"] += 1

    def _fits(self, frame: memoryview, size: int) -> bool:
        _, gso_type, _, gso_size, checksum_start, checksum_offset = vnet.unpack(frame, HEADER)
        if not gso_type:
            return size <= self.mtu
        # The kernel does not compare gso_size with the MTU: oversize segments would leave, and vanish on the way.
        is_tcp = checksum_offset == 16
        transport = (frame[HEADROOM + checksum_start + 12] >> 4) * 4 if is_tcp else 8
        return bool(checksum_start + transport + gso_size <= self.mtu)

    def _wait(self, frame: memoryview, size: int, rewrite: Rewrite, next_hop: NextHop) -> None:
        if len(next_hop.waiting) >= MOST_WAITING or self._waiting_octets + size > MOST_WAITING_OCTETS:
            self.counters["neighbour_queue_full"] += 1
            return
        if not next_hop.waiting and not self._resolve(self.link.index, next_hop.address):
            self.counters["neighbour_refused"] += 1  # no event would ever come
            self._unreachable(rewrite, bytes(frame[HEADROOM : HEADROOM + size]))
            return
        next_hop.waiting.append((rewrite, bytes(frame[: HEADROOM + size])))
        self._waiting_octets += size

    def neighbours(self, table: Iterable[Neighbour]) -> None:
        """Take over the kernel's whole neighbour table: at the start, and when events of it were lost."""
        self._known.clear()
        for neighbour in table:
            self.neighbour_changed(neighbour)
        for (_, address), next_hop in list(self._next_hops.items()):
            if next_hop.waiting:
                self._resolve(self.link.index, address)

    def neighbour_changed(self, neighbour: Neighbour) -> None:
        """The kernel's neighbour table says something new."""
        address = neighbour.address
        mac = neighbour.mac if neighbour.usable else None
        if mac is not None:
            self._known[address] = mac
        elif neighbour.failed or not neighbour.state:
            self._known.pop(address, None)
        for version in FAMILIES:
            next_hop = self._next_hops.get((version, address))
            if next_hop is None:
                continue
            if mac is not None:
                next_hop.ethernet = self._header(version, mac)
                self._go_on(next_hop)
            elif neighbour.failed:
                next_hop.ethernet = None
                self._give_up(next_hop)
            elif not neighbour.state and not self._resolve(self.link.index, address):
                self._give_up(next_hop)  # the entry was deleted, and what waits for it would do so for ever

    def _go_on(self, next_hop: NextHop) -> None:
        for rewrite, frame in self._taken(next_hop):
            # What was ended while it waited has lost its leave to go.
            if rewrite.flow.state in (FlowState.OPEN, FlowState.CLOSING):
                self.send(memoryview(bytearray(frame)), len(frame) - HEADROOM, rewrite)

    def _give_up(self, next_hop: NextHop) -> None:
        for rewrite, frame in self._taken(next_hop):
            self.counters["neighbour_failed"] += 1
            self._unreachable(rewrite, frame[HEADROOM:])

    def _taken(self, next_hop: NextHop) -> list[tuple[Rewrite, bytes]]:
        waiting, next_hop.waiting = next_hop.waiting, []
        self._waiting_octets -= sum(len(frame) - HEADROOM for _, frame in waiting)
        return waiting

    def close(self) -> None:
        """Close the socket; what waits for a neighbour is dropped."""
        self.closed = True
        self.socket.close()

    def _header(self, version: int, mac: bytes) -> bytes:
        return mac + (self.link.mac or bytes(6)) + _ETHERTYPE[version]

    def statistics(self) -> dict[str, int]:
        """What was sent in vain, and what came in."""
        received = self.socket.statistics()
        return {"received": received.packets, "receive_drops": received.drops, **self.counters}
