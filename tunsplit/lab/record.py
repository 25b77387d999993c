"""What an observer has seen, kept by frame and counted by flow. Pure.

TCP and UDP are most of what passes, and the four-tuple lies unbroken in their headers: a flow that is known is
found by these octets and counted, and its frames are parsed only when they are asked for, so that who watches keeps
up. Everything else is parsed frame by frame.
"""

from collections import Counter
from dataclasses import dataclass, replace
from ipaddress import ip_address

from tunsplit.lab.addresses import TUNNEL_PORT, Address
from tunsplit.lab.frames import (
    ETHERNET_HEADER,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    TCP,
    UDP,
    WIREGUARD_TYPES,
    Direction,
    FlowKey,
    Seen,
    parse_untrusted,
)

KEPT = 4000  # frames of a flow that are kept; all are counted
FLOWS = 50_000  # flows that are told apart: a port scan must not eat the memory
OTHERS = FlowKey("others", None, None, None, None)  # all flows beyond that
PORT = TUNNEL_PORT.to_bytes(2, "big")


@dataclass(slots=True)
class Count:
    """Frames of one flow so far; found by its octets, so that its addresses are hashed just once."""

    flow: FlowKey
    frames: int = 0


@dataclass(slots=True)
class Kept:
    """A frame that is kept, and what it says, once somebody has asked."""

    flow: FlowKey
    frame: bytes
    ethernet: bool
    ethertype: int
    direction: Direction
    time: float
    octets: int
    parsed: Seen | None = None

    @property
    def seen(self) -> Seen:
        """What it says."""
        if self.parsed is None:
            self.parsed = replace(
                parse_untrusted(self.frame, ethernet=self.ethernet, ethertype=self.ethertype),
                direction=self.direction,
                time=self.time,
                octets=self.octets,
                frame=self.frame,
            )
        return self.parsed


class Record:
    """Frames and flows of one wire."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []
        self._counts: dict[FlowKey, Count] = {}
        self._known: dict[bytes, Count] = {}

    def seen(
        self,
        protocol: str | None = None,
        destination: str | Address | None = None,
        source: str | Address | None = None,
        port: int | None = None,
        payload: bytes | None = None,
        *,
        address: str | Address | None = None,
    ) -> list[Seen]:
        """The frames to which all that is given applies, in order, the first `KEPT` of each flow.

        The VPN's own are left out unless `protocol` is wireguard.

        Args:
            protocol: as in `Seen`.
            destination: address that it goes to, or that ARP or NDP asks for.
            source: address that it comes from.
            port: the port at either end.
            payload: octets that it carries somewhere.
            address: the address at either end.
        """
        destination, source, address = (_to_address(given) for given in (destination, source, address))
        return [
            kept.seen
            for kept in self._kept
            if (kept.flow.protocol == protocol if protocol else kept.flow.protocol != "wireguard")
            and (destination is None or kept.flow.destination == destination)
            and (source is None or kept.flow.source == source)
            and (port is None or port in (kept.flow.source_port, kept.flow.destination_port))
            and (address is None or address in (kept.flow.source, kept.flow.destination))
            and (payload is None or (payload in kept.frame and payload in kept.seen.payload))
        ]

    def flows(self) -> Counter[FlowKey]:
        """All frames by flow, each direction for itself, without the VPN's own."""
        counts = self._counts.values()
        return Counter({count.flow: count.frames for count in counts if count.flow.protocol != "wireguard"})

    def clear(self) -> None:
        """Forget what was seen."""
        self._kept.clear()
        self._counts.clear()
        self._known.clear()

    def count_untrusted(self, frame: bytes, *, ethernet: bool, ethertype: int) -> bool:
        """Count a frame of a flow of which enough are kept; False: it is for `keep_untrusted`."""
        key = get_key_untrusted(frame, ETHERNET_HEADER if ethernet else 0, ethertype)
        if key is None or (count := self._known.get(key)) is None or count.frames < KEPT:
            return False
        count.frames += 1
        return True

    def keep_untrusted(
        self, frame: bytes, *, ethernet: bool, ethertype: int, direction: Direction, time: float, octets: int
    ) -> bool:
        """Count a frame and write it down; False if there are enough of its flow. Never raises."""
        key = get_key_untrusted(frame, ETHERNET_HEADER if ethernet else 0, ethertype)
        kept = Kept(OTHERS, frame, ethernet, ethertype, direction, time, octets)
        count = None if key is None else self._known.get(key)
        if count is None or count.flow is OTHERS:
            kept.flow = kept.seen.flow
            count = self._count_of(kept.flow)
            if key is not None and len(self._known) < FLOWS:
                self._known[key] = count
        else:
            kept.flow = count.flow
        count.frames += 1
        if count.frames > KEPT:
            return False
        self._kept.append(kept)
        return True

    def _count_of(self, flow: FlowKey) -> Count:
        count = self._counts.get(flow)
        if count is None:
            counted = flow if len(self._counts) < FLOWS else OTHERS
            count = self._counts.setdefault(counted, Count(counted))
        return count


def get_key_untrusted(frame: bytes, at: int, ethertype: int) -> bytes | None:
    """Octets that are the same for all frames of a TCP or UDP flow and of no other; None where there are none.

    Args:
        frame: its head.
        at: where its packet begins.
        ethertype: what that is.
    """
    if ethertype == ETHERTYPE_IPV4:
        # With options, or a part of a packet (MF or offset).
        if len(frame) < at + 28 or frame[at] != 0x45 or frame[at + 6] & 0x3F or frame[at + 7]:
            return None
        length, shortest = int.from_bytes(frame[at + 2 : at + 4], "big"), 28
        protocol, start, end = frame[at + 9], at + 12, at + 24
    elif ethertype == ETHERTYPE_IPV6:
        if len(frame) < at + 48:
            return None
        length, shortest = int.from_bytes(frame[at + 4 : at + 6], "big"), 8
        protocol, start, end = frame[at + 6], at + 8, at + 44
    else:
        return None
    if 0 < length < shortest:  # no room for ports; 0: a super-packet of more than 64 KiB
        return None
    if protocol == TCP:
        return b"\x06" + frame[start:end]
    if protocol != UDP:
        return None
    if PORT in (frame[end - 4 : end - 2], frame[end - 2 : end]):
        # Clear text on the VPN's own port is another flow than the VPN's.
        return (b"\x12" if frame[end + 4 : end + 8] in WIREGUARD_TYPES else b"\x11") + frame[start:end]
    return b"\x11" + frame[start:end]


def _to_address(given: str | Address | None) -> Address | None:
    return ip_address(given) if isinstance(given, str) else given
