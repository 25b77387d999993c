"""What NAT writes over the packets of a flow, worked out when it opens."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache, lru_cache

from tunsplit.engine.direction import reversed_key
from tunsplit.engine.flow import Flow, Rewrite
from tunsplit.wire.checksum import checksum_delta
from tunsplit.wire.ip import CHECKSUM_AT, ICMP, TCP, UDP

_SHORTEST = {TCP: 20, UDP: 8}  # bytes of the transport header


@dataclass(slots=True, frozen=True)
class Way:
    """How a flow leaves: its side, the device there, the next hop, and the side's address towards its destination."""

    side: str
    device: Hashable
    next_hop: object
    source: bytes


def rewrites(flow: Flow, way: Way, now: float) -> tuple[Rewrite, Rewrite]:
    """The original's and the reply's: what the one adds to a sum the other takes away."""
    key, outside = flow.key, flow.outside
    version4, check_at, shortest = _layout(flow.protocol, len(key))
    addresses = _addresses_delta(key[:-4], outside[:-4])
    ports = checksum_delta(key[-4:], outside[-4:])
    # ICMP's checksum has no pseudo-header (RFC 792): only the identifier moves it.
    transport = ports if flow.protocol == ICMP else (addresses + ports) % 0xFFFF
    pseudo = 0 if flow.protocol == ICMP else addresses
    original = Rewrite(
        flow, outside, check_at, shortest, addresses if version4 else 0, transport, pseudo,
        way.device, way.next_hop, now,
    )  # fmt: skip
    reply = Rewrite(
        flow, reversed_key(key), check_at, shortest, -addresses % 0xFFFF if version4 else 0, -transport % 0xFFFF,
        -pseudo % 0xFFFF, way.device, way.next_hop, now,
    )  # fmt: skip
    return original, reply


@cache
def _layout(protocol: int, key_size: int) -> tuple[bool, int, int]:
    """Whether a flow is IPv4's, where its transport's checksum is, and how long its packets are at least."""
    header = 20 if key_size == 12 else 40
    return key_size == 12, header + CHECKSUM_AT.get(protocol, 0), header + _SHORTEST.get(protocol, 0)


@lru_cache(maxsize=256)
def _addresses_delta(old: bytes, new: bytes) -> int:
    """The same number for all flows between two addresses is one object: 100,000 flows have few of them."""
    size = len(old) // 2
    source, destination = checksum_delta(old[:size], new[:size]), checksum_delta(old[size:], new[size:])
    return (source + destination) % 0xFFFF if source and destination else source or destination
