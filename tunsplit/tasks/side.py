"""A device of a side: how translated packets leave by it, and to which neighbour.

Theory of operation. On a device with link layer a packet needs the Ethernet address of its next hop. The
kernel's neighbour table knows it or finds it out: we ask (NTF_USE), keep the packet meanwhile, in bounds,
and go by the events. A next hop is one object, shared by all flows that go there, so that a gateway's new
address is written once. On a tunnel there is nothing to know.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from tunsplit.engine.flow import Rewrite
from tunsplit.host import Link, Neighbour
from tunsplit.kernel.packet import PacketSocket
from tunsplit.wire import vnet

ETHERNET = 14  # bytes of an Ethernet header
# A frame buffer: room for an Ethernet header, the virtio header as the tun has it, the IP packet. On a device
# with link layer the virtio header goes to the very front, and the Ethernet header between the two.
HEADER = ETHERNET
HEADROOM = HEADER + vnet.SIZE
FRAME = HEADROOM + 65536
MOST_WAITING = 64  # packets a next hop
MOST_NEXT_HOPS = 1024
MOST_KNOWN = 8192  # neighbours; the kernel keeps 1024 of each family (gc_thresh3)
_ETHERTYPE = {4: b"\x08\x00", 6: b"\x86\xdd"}


def frame_buffer() -> memoryview:
    """A buffer for one packet, with room in front for either kind of device."""
    return memoryview(bytearray(FRAME))


@dataclass(slots=True, eq=False)
class NextHop:
    """Where packets go first. `ethernet` is the whole Ethernet header; empty on a tunnel, None while unknown."""

    address: IPv4Address | IPv6Address
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
        resolve: Callable[[int, IPv4Address | IPv6Address], None],
        too_big: Callable[[Rewrite, bytes, int], None],
        unreachable: Callable[[Rewrite, bytes], None],
    ) -> None:
        """`resolve` asks the kernel for a neighbour; the other two tell an app that its packet cannot go."""
        self.side = side
        self.link = link
        self.socket = socket
        self.mtu = link.mtu
        self.narrow = False  # whether the tun lets packets through that are too big for this device
        self.counters: Counter[str] = Counter()
        self._ethernet = socket.ethernet
        self._send = socket.send
        self._resolve = resolve
        self._too_big = too_big
        self._unreachable = unreachable
        self._next_hops: dict[IPv4Address | IPv6Address, NextHop] = {}
        self._known: dict[IPv4Address | IPv6Address, bytes] = {}  # what the kernel's table says now
        self.send = self._send_ethernet if socket.ethernet else self._send_plain

    def next_hop(self, address: IPv4Address | IPv6Address) -> NextHop:
        """The next hop with this address; the kernel starts to look for it, or to confirm it, at once."""
        next_hop = self._next_hops.get(address)
        if next_hop is None:
            if len(self._next_hops) >= MOST_NEXT_HOPS:
                self._next_hops = {key: one for key, one in self._next_hops.items() if one.waiting}
            next_hop = self._next_hops[address] = NextHop(address, None if self._ethernet else b"")
            if self._ethernet:
                if (mac := self._known.get(address)) is not None:
                    next_hop.ethernet = self._header(address, mac)
                self._resolve(self.link.index, address)
        return next_hop

    def confirm(self) -> None:
        """Have the kernel confirm who we send to: it sees none of our frames, so it would never ask by itself."""
        if self._ethernet:
            for address in self._next_hops:
                self._resolve(self.link.index, address)

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
        vnet.pack_ethernet(
            frame, 0, flags, gso_type, header_length, gso_size, checksum_start, checksum_offset, ethernet
        )
        try:
            self._send(frame[: HEADROOM + size])
        except OSError as error:
            self.counters[f"send_{error.errno}"] += 1

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
        if len(next_hop.waiting) >= MOST_WAITING:
            self.counters["neighbour_queue_full"] += 1
            return
        if not next_hop.waiting:
            self._resolve(self.link.index, next_hop.address)
        next_hop.waiting.append((rewrite, bytes(frame[: HEADROOM + size])))

    def neighbour_changed(self, neighbour: Neighbour) -> None:
        """The kernel's neighbour table says something new."""
        address = neighbour.address
        next_hop = self._next_hops.get(address)
        if neighbour.usable and neighbour.mac is not None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[address] = neighbour.mac
            if next_hop is not None:
                next_hop.ethernet = self._header(address, neighbour.mac)
                waiting, next_hop.waiting = next_hop.waiting, []
                for rewrite, frame in waiting:
                    self.send(memoryview(bytearray(frame)), len(frame) - HEADROOM, rewrite)
        elif neighbour.failed:
            self._known.pop(address, None)
            if next_hop is not None:
                next_hop.ethernet = None
                waiting, next_hop.waiting = next_hop.waiting, []
                for rewrite, frame in waiting:
                    self.counters["neighbour_failed"] += 1
                    self._unreachable(rewrite, frame[HEADROOM:])

    def close(self) -> None:
        """Close the socket; what waits for a neighbour is dropped."""
        self.socket.close()

    def _header(self, address: IPv4Address | IPv6Address, mac: bytes) -> bytes:
        assert self.link.mac is not None
        return mac + self.link.mac + _ETHERTYPE[address.version]

    def statistics(self) -> dict[str, int]:
        """What was sent in vain, and what came in."""
        received = self.socket.statistics()
        return {"received": received.packets, "receive_drops": received.drops, **self.counters}
