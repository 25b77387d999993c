"""What an observer has seen, kept by frame and counted by flow. Pure.

TCP and UDP are most of what passes, and the four-tuple lies unbroken in their headers: a flow that is known is
found by these octets and counted, without dpkt. Everything else is parsed frame by frame.
"""

from collections import Counter
from dataclasses import replace
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


class Record:
    """Frames and flows of one wire."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._counts: Counter[FlowKey] = Counter()
        self._known: dict[bytes, FlowKey] = {}

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
        return Counter({flow: count for flow, count in self._counts.items() if flow.protocol != "wireguard"})

    def clear(self) -> None:
        """Forget what was seen."""
        self._seen.clear()
        self._counts.clear()
        self._known.clear()

    def add_untrusted(
        self, frame: bytes, *, ethernet: bool, ethertype: int, direction: Direction, time: float, octets: int
    ) -> None:
        """Write down one frame, given as in `parse_untrusted`; never raises."""
        key = _get_key_untrusted(frame, ETHERNET_HEADER if ethernet else 0, ethertype)
        flow = None if key is None else self._known.get(key)
        if flow is None or self._counts[flow] < KEPT:
            seen = parse_untrusted(frame, ethernet=ethernet, ethertype=ethertype)
            flow = seen.flow
            if flow not in self._counts and len(self._counts) >= FLOWS:
                flow = OTHERS
            elif key is not None:
                self._known[key] = flow
            if self._counts[flow] < KEPT:
                self._seen.append(replace(seen, direction=direction, time=time, octets=octets, frame=frame))
        self._counts[flow] += 1


def _get_key_untrusted(frame: bytes, at: int, ethertype: int) -> bytes | None:
    """Octets that are the same for all frames of a TCP or UDP flow and of no other; None where there are none."""
    if ethertype == ETHERTYPE_IPV4:
        # Version 4 without options, and no fragment.
        if frame[at : at + 1] != b"\x45" or int.from_bytes(frame[at + 6 : at + 8], "big") & 0x3FFF:
            return None
        protocol, start, size = frame[at + 9 : at + 10], at + 12, 12
    elif ethertype == ETHERTYPE_IPV6:
        protocol, start, size = frame[at + 6 : at + 7], at + 8, 36
    else:
        return None
    four_tuple = frame[start : start + size]
    if protocol not in (bytes((TCP,)), bytes((UDP,))) or len(four_tuple) < size:
        return None
    if protocol[0] == UDP and TUNNEL_PORT.to_bytes(2, "big") in (four_tuple[-4:-2], four_tuple[-2:]):
        # Clear text on the VPN's own port is another flow than the VPN's.
        transport = frame[start + size + 4 : start + size + 8] in WIREGUARD_TYPES
        return protocol + four_tuple + bytes((transport,))
    return protocol + four_tuple


def _to_address(given: str | Address | None) -> Address | None:
    return ip_address(given) if isinstance(given, str) else given
