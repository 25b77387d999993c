"""A device of a side: how translated packets leave by it, and to which neighbour.

Theory of operation. On a device with link layer a packet needs the Ethernet address of its next hop. The
kernel's neighbour table knows it or finds it out: we ask (NTF_USE), keep the packet meanwhile, in bounds,
and go by the events. A next hop is one object, shared by all flows that go there, so that a gateway's new
address is written once; it lives as long as one of them, or a way, leads by it. On a tunnel there is nothing
to know.

While the host has no route for what a flow sends, but the device and the address that the flow uses are there, it
pauses: what it sends is refused, and as soon as there is a route it goes on. A kernel's own connection would as well.

What the kernel's table says is kept as it says it, so it needs no bounds of its own (gc_thresh3). An entry
that the kernel forgets, since it sees none of our frames, is no reason to stop: it is asked for again, and
its address used until the kernel says better.

What is too big for its path is made to fit where that changes nothing for the app: segments of TCP become smaller,
datagrams that any router might cut are cut. All else is told to the app. The kernel would do none of it: it does not
compare a super-packet's segments with the MTU, and they would vanish on the way.
"""

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from tunsplit.engine.direction import destination_of
from tunsplit.engine.flow import FlowState, Rewrite
from tunsplit.engine.paths import UNLIMITED, Paths
from tunsplit.engine.slowpath import Ready
from tunsplit.host import FAMILIES, IPAddress, Link, Neighbour
from tunsplit.kernel.packet import PacketSocket
from tunsplit.wire import cut, vnet
from tunsplit.wire.ip import TCP, parse_untrusted, unpack_u32

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
    """Where packets go first. `ethernet` is the whole Ethernet header; empty on a tunnel, None while unknown.

    Without `address` they go nowhere for now.
    """

    address: IPAddress | None
    ethernet: bytes | None = None
    waiting: list[tuple[Rewrite, bytes]] = field(default_factory=list)


NOWHERE = NextHop(None)


class SideDevice:
    """One device of one side. The tunnel has one; the uplink may have one for each IP version."""

    def __init__(
        self,
        side: str,
        link: Link,
        socket: PacketSocket,
        *,
        resolve: Callable[[int, IPAddress], bool],
        too_big: Callable[[Rewrite, bytes, int], bool],
        unreachable: Callable[[Rewrite, bytes], None],
        no_way: Callable[[Rewrite, bytes], None],
    ) -> None:
        """`resolve` asks the kernel for a neighbour, False where it does not take the question.

        The others tell an app that its packet cannot go: it is too big, nobody answers, there is no route; `too_big` is
        False where the app knows already and sends on.
        """
        self.side = side
        self.link = link
        self.socket = socket
        self.paths = Paths(link.mtu)
        self.narrowest = UNLIMITED  # whatever is smaller fits every path
        self.closed = False
        self.counters: Counter[str] = Counter()
        self._ethernet = socket.ethernet
        self._send = socket.send
        self._resolve = resolve
        self._too_big = too_big
        self._unreachable = unreachable
        self._no_way = no_way
        # By the IP version of the packets and the address: IPv4 may go by an IPv6 gateway (RFC 5549).
        self._next_hops: WeakValueDictionary[tuple[int, IPAddress], NextHop] = WeakValueDictionary()
        self._waiting_octets = 0
        self._tun_mtu = 0
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
                mac = self._known.get(address)
                if mac is None and self.link.is_noarp:
                    mac = self.link.mac  # as the kernel does (net/ipv4/arp.c, arp_constructor; no event tells of it)
                if mac is not None:
                    next_hop.ethernet = self._header(version, mac)
                self._resolve(self.link.index, address)
        return next_hop

    @property
    def can_pause(self) -> bool:
        """Whether flows may wait here for a route: on a tunnel nothing is looked up that could be missing."""
        return self._ethernet

    def next_hops(self) -> list[IPAddress]:
        """Every address that packets go to just now; empty on a tunnel."""
        return [address for _, address in tuple(self._next_hops)] if self._ethernet else []

    def is_still(self, link: Link) -> bool:
        """Whether a device that looks like this now is ours, so that flows go on: its Ethernet address may be another.

        Not without ARP, where its neighbours' is its own.
        """
        own = self.link
        same = (link.name, link.is_layer2, link.is_noarp) == (own.name, own.is_layer2, own.is_noarp)
        return same and (link.mac == own.mac or not link.is_noarp) and self.socket.is_bound()

    def moved(self, link: Link) -> None:
        """The device has another Ethernet address of its own."""
        self.link = link
        for (version, _), next_hop in list(self._next_hops.items()):
            if next_hop.ethernet:
                next_hop.ethernet = self._header(version, next_hop.ethernet[:6])

    def mac_of(self, address: IPAddress) -> bytes | None:
        """A neighbour's Ethernet address, as far as the kernel knows it."""
        return self._known.get(address)

    def _send_ethernet(self, frame: memoryview, size: int, rewrite: Rewrite) -> None:
        """Send the packet of `size` bytes in a frame buffer; what is in front of it is overwritten."""
        next_hop: NextHop = rewrite.next_hop  # type: ignore[assignment]  # opaque to the engine
        if size > self.narrowest and not self._fits(frame, size, rewrite):
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
        if size > self.narrowest and not self._fits(frame, size, rewrite):
            return
        try:
            self._send(frame[HEADER : HEADROOM + size])
        except OSError as error:
            self.counters[f"send_{error.errno}"] += 1

    # Sizes

    def measure(self, mtu: int, tun_mtu: int) -> None:
        """The device takes packets of `mtu` bytes; the tun lets those of `tun_mtu` through."""
        self.paths.mtu = mtu
        self._tun_mtu = tun_mtu
        self._measure()

    def _measure(self) -> None:
        own = self.paths.mtu if self.paths.mtu < self._tun_mtu else UNLIMITED
        self.narrowest = min(own, self.paths.narrowest)

    def learn(self, error: Ready, now: float) -> int:
        """A router says that a packet of ours was too big; how big the app's may be, 0 if that is none of its business.

        TCP is never told: its segments are made to fit.
        """
        told, flow = error.too_big, error.rewrite.flow
        if told is None or told.size <= told.mtu:
            self.counters["path_mtu_absurd"] += 1
            return 0
        destination = destination_of(flow.outside)
        if told.sequence is not None:
            self.paths.suspect(flow.outside, told.sequence, told.mtu, now)
        else:
            self.paths.learn(destination, told.mtu, now)
        self._measure()
        return 0 if flow.protocol == TCP else self.paths.mtu_to(destination)

    def expire(self, now: float) -> None:
        """Forget paths that may have become wider."""
        if self.paths.expire(now):
            self._measure()

    def _fits(self, frame: memoryview, size: int, rewrite: Rewrite) -> bool:
        """Whether the packet may go as it is now; else it was cut, or told."""
        flags, gso_type, header_length, gso_size, start, offset = vnet.unpack(frame, HEADER)
        packet = frame[HEADROOM : HEADROOM + size]
        if gso_type:
            is_tcp = offset == cut.CHECKSUM_OFFSET
            end = start + ((packet[start + 12] >> 4) * 4 if is_tcp else 8)
            mtu = self._mtu_for(packet, start, end, rewrite) if is_tcp else self._mtu_of(rewrite)
            if end + gso_size <= mtu:
                return True
            if is_tcp:
                vnet.pack(frame, HEADER, flags, gso_type, header_length, mtu - end, start, offset)
            elif not self._too_big(rewrite, bytes(packet), mtu):
                self.counters["too_big"] += 1
            return bool(is_tcp)
        headers = parse_untrusted(packet, size)
        if headers.protocol == TCP and headers.identification is None:
            end = headers.transport + (packet[headers.transport + 12] >> 4) * 4
            mtu = self._mtu_for(packet, headers.transport, end, rewrite)
            if size > mtu:
                cut.into_segments(frame[HEADER:HEADROOM], packet, headers, mtu)
            return True
        mtu = self._mtu_of(rewrite)
        if size <= mtu:
            return True
        if cut.may_be_cut(packet, headers) or not self._too_big(rewrite, bytes(packet), mtu):
            whole = bytearray(packet)
            if flags & vnet.NEEDS_CSUM and start < headers.transport:  # it would go over the addresses
                self.counters["send_malformed"] += 1
                return False
            if flags & vnet.NEEDS_CSUM:
                cut.finish_checksum(whole, start, offset, headers.protocol)
            pieces = cut.into_fragments(whole, headers, mtu, os.urandom(4))
            for piece in pieces:
                self.send(memoryview(bytearray(HEADROOM) + piece), len(piece), rewrite)
            self.counters["cut" if pieces else "too_big"] += 1
        return False

    def _mtu_of(self, rewrite: Rewrite) -> int:
        return self.paths.mtu_to(destination_of(rewrite.four_tuple))

    def _mtu_for(self, packet: memoryview, at: int, end: int, rewrite: Rewrite) -> int:
        """The path's MTU for a segment of TCP, which may be what shows that a router's word about it is true."""
        destination = destination_of(rewrite.four_tuple)
        sequence = unpack_u32(packet, at + 4)[0] + len(packet) - end
        if self.paths.confirm(rewrite.four_tuple, destination, sequence, rewrite.last_seen):
            self._measure()
        return self.paths.mtu_to(destination)

    def _wait(self, frame: memoryview, size: int, rewrite: Rewrite, next_hop: NextHop) -> None:
        if next_hop.address is None:
            self.counters["no_way"] += 1
            self._no_way(rewrite, bytes(frame[HEADROOM : HEADROOM + size]))
            return
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
