"""What an observer has seen, kept by frame and counted by flow. Pure.

TCP and UDP are most of what passes, and the four-tuple lies unbroken in their headers: a flow that is known is
found by these octets and counted, without dpkt. Everything else is parsed frame by frame.
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

KEPT = 1000  # frames of a flow that are kept; all are counted
FLOWS = 50_000  # flows that are told apart: a port scan must not eat the memory
OTHERS = FlowKey("others", None, None, None, None)  # all flows beyond that
PORT = TUNNEL_PORT.to_bytes(2, "big")


@dataclass(slots=True)
class Count:
    """Frames of one flow so far; found by its octets, so that its addresses are hashed just once."""

    flow: FlowKey
    frames: int = 0


class Record:
    """Frames and flows of one wire."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
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
        """The frames to which all that is given applies, in order, the first thousand of each flow.

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
            seen
            for seen in self._seen
            if (seen.protocol == protocol if protocol else seen.protocol != "wireguard")
            and (destination is None or seen.destination == destination)
            and (source is None or seen.source == source)
            and (port is None or port in (seen.source_port, seen.destination_port))
            and (payload is None or payload in seen.payload)
            and (address is None or address in (seen.source, seen.destination))
        ]

    def flows(self) -> Counter[FlowKey]:
        """All frames by flow, each direction for itself, without the VPN's own."""
        counts = self._counts.values()
        return Counter({count.flow: count.frames for count in counts if count.flow.protocol != "wireguard"})

    def clear(self) -> None:
        """Forget what was seen."""
        self._seen.clear()
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
    ) -> Seen | None:
        """Parse a frame and write it down; None if there are enough of its flow. Never raises."""
        seen = parse_untrusted(frame, ethernet=ethernet, ethertype=ethertype)
        count = self._counts.get(seen.flow)
        if count is None:
            flow = seen.flow if len(self._counts) < FLOWS else OTHERS
            count = self._counts.setdefault(flow, Count(flow))
        key = get_key_untrusted(frame, ETHERNET_HEADER if ethernet else 0, ethertype)
        if key is not None and len(self._known) < FLOWS:
            self._known[key] = count
        count.frames += 1
        if count.frames > KEPT:
            return None
        seen = replace(seen, direction=direction, time=time, octets=octets, frame=frame)
        self._seen.append(seen)
        return seen


def get_key_untrusted(frame: bytes, at: int, ethertype: int) -> bytes | None:
    """Octets that are the same for all frames of a TCP or UDP flow and of no other; None where there are none.

    Args:
        frame: its head.
        at: where its packet begins.
        ethertype: what that is.
    """
    if len(frame) < at + 48:  # IPv6 and a UDP header; a shorter frame may well be parsed
        return None
    if ethertype == ETHERTYPE_IPV4:
        # With options, or a part of a packet (MF or offset).
        if frame[at] != 0x45 or frame[at + 6] & 0x3F or frame[at + 7]:
            return None
        protocol, start, end = frame[at + 9], at + 12, at + 24
    elif ethertype == ETHERTYPE_IPV6:
        protocol, start, end = frame[at + 6], at + 8, at + 44
    else:
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
