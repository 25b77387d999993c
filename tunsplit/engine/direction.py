"""One direction of all flows: their keys, and the fast path of a packet through NAT."""

from collections import defaultdict
from collections.abc import Callable, Iterator

from tunsplit.engine.flow import OPEN, Flow, Rewrite
from tunsplit.wire.ip import (
    FRAGMENT,
    NO_OPTIONS,
    TCP,
    UDP,
    pack_ipv4,
    pack_ipv6,
    pack_u16,
    unpack_ipv4,
    unpack_ipv6,
    unpack_u16,
)

FIN, SYN, RST, ACK = 1, 2, 4, 16
CONTROL = FIN | SYN | RST


def reversed_key(key: bytes) -> bytes:
    """The four-tuple of the other direction."""
    size = (len(key) - 4) // 2
    return key[size:-4] + key[:size] + key[-2:] + key[-4:-2]


def source_of(key: bytes) -> bytes:
    """The source address in a four-tuple."""
    return key[: (len(key) - 4) // 2]


def destination_of(key: bytes) -> bytes:
    """The destination address in a four-tuple."""
    return key[(len(key) - 4) // 2 : -4]


class Direction:
    """One direction's rewrites, by protocol and four-tuple; and the fast path."""

    def __init__(self, *, outbound: bool, on_close: Callable[[Flow], None], owned: bool | None = None) -> None:
        """`owned`: these are packets of this host's sockets; None: if they are outbound."""
        self._outbound = outbound
        self.owned = outbound if owned is None else owned
        self._on_close = on_close
        self._rewrites: defaultdict[int, dict[bytes, Rewrite]] = defaultdict(dict)
        # Only TCP and UDP begin with their ports; for all others the fast path has to find nothing.
        self._fast: list[dict[bytes, Rewrite]] = [{}] * 256
        self._fast[TCP], self._fast[UDP] = self._rewrites[TCP], self._rewrites[UDP]
        # Of UDP servers' answers that left from another address than the app's own: what comes in is the kernel's, but
        # it cannot tell the socket how narrow the path is.
        self.answered: dict[bytes, Rewrite] = {}

    def find(self, protocol: int, key: bytes) -> Rewrite | None:
        """The rewrite for this four-tuple."""
        return self._rewrites[protocol].get(key)

    def __iter__(self) -> Iterator[Rewrite]:
        for rewrites in self._rewrites.values():
            yield from rewrites.values()

    def add(self, protocol: int, key: bytes, rewrite: Rewrite) -> None:
        """Put a rewrite in its place."""
        self._rewrites[protocol][key] = rewrite

    def remove(self, protocol: int, key: bytes) -> None:
        """Take a rewrite out."""
        del self._rewrites[protocol][key]

    def translate(self, packet: bytearray | memoryview, size: int, finished: bool, now: float) -> Rewrite | None:
        """Rewrite the packet in place; None means that it needs the slow path and is as it was.

        `finished` is False where the transport's checksum field holds only the pseudo-header's sum
        (VIRTIO_NET_HDR_F_NEEDS_CSUM): that one rises with the addresses, a finished checksum falls with
        addresses and ports.
        """
        header_check = -1
        if packet[0] == NO_OPTIONS:
            length, fragment, protocol, header_check, four_tuple = unpack_ipv4(packet)
            # `packet` is reused: past `size` lie the previous packet's bytes, not an error.
            if length != size or fragment & FRAGMENT:
                return None
        elif packet[0] >> 4 == 6:
            length, protocol, four_tuple = unpack_ipv6(packet)
            if length + 40 != size:
                return None
        else:
            return None
        rewrite: Rewrite | None = self._fast[protocol].get(four_tuple)
        if rewrite is None or size < rewrite.shortest:
            return None
        at = rewrite.check_at
        (check,) = unpack_u16(packet, at)
        if protocol == TCP:
            flags = packet[at - 3]
            if flags & CONTROL and not self.control(rewrite, flags):
                return None
            check += -rewrite.transport_delta if finished else rewrite.pseudo_delta
            pack_u16(packet, at, check % 0xFFFF)
        else:
            # A port can change hands: once a batch, its socket is asked for.
            if self.owned and now != rewrite.last_seen:
                return None
            if check or not finished:  # UDP: 0 means "none" (RFC 768), so a computed 0 goes out as 0xFFFF
                check += -rewrite.transport_delta if finished else rewrite.pseudo_delta
                pack_u16(packet, at, check % 0xFFFF or 0xFFFF)
        if header_check < 0:
            pack_ipv6(packet, 8, rewrite.four_tuple)
        else:
            pack_ipv4(packet, 10, (header_check - rewrite.ip_delta) % 0xFFFF, rewrite.four_tuple)
        rewrite.last_seen = now
        rewrite.packets += 1
        rewrite.octets += size
        return rewrite

    def control(self, rewrite: Rewrite, flags: int) -> bool:
        """Follow a segment with SYN, FIN or RST; False if it opens a connection and has to be judged first."""
        flow = rewrite.flow
        if flags & SYN:
            # With ACK it is a server's word, or of two ends that open at once, of which we have seen the SYN.
            return not self._outbound or bool(flags & ACK and flow.translated)
        if flags & FIN:
            # What comes in for one that is not translated passes us by: its own end is all that we shall see.
            flow.closed_ways |= (1 if self._outbound else 2) if flow.translated else 3
        if (flags & RST or flow.closed_ways == 3) and flow.state is OPEN:
            self._on_close(flow)
        return True
