"""Connections that were ended here, and that their peers may hold to be open still: half-open (RFC 9293 §3.5.1).

The RST that ends a connection is believed only if it has the very number that the peer expects next; where packets
before it were lost or not sent any more, it does not. The peer then tells that number, with an ACK (RFC 5961 §3.2). So
whatever still comes in for such a connection gets another RST, as from a host that knows nothing of it (RFC 9293
§3.5.2): what was under way lets the number grow, so it is the last that counts. Data that the peer has sent before a
RST reached it, with the number that this RST has, gets none: there is no word more on the old side than it takes.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from tunsplit.engine.direction import reversed_key
from tunsplit.engine.flow import Flow, Rewrite
from tunsplit.engine.slowpath import Unknown
from tunsplit.tasks.side import HEADROOM, SideDevice
from tunsplit.wire import craft
from tunsplit.wire.ip import TCP, unpack_u32

UNDER_WAY_S = 1.0  # longer than a RST takes to its peer
REMEMBERED_S = 10.0  # the port rests for longer
MOST_REMEMBERED = 4096


class Ended(NamedTuple):
    """A connection that was ended: how its packets left, the numbers of the RSTs that have, and when that was."""

    original: Rewrite
    resets: tuple[int, ...]
    since: float


class HalfOpen(OrderedDict[tuple[Hashable, bytes], Ended]):
    """By device and the four-tuple of what comes in; bounded, the oldest is forgotten first.

    Whoever follows the network forgets all of them when an address or a device is lost: nothing may leave with an
    address that is another's by now.
    """

    def __init__(self, counters: Counter[str]) -> None:
        """`counters`: `half_open_reset` counts the RSTs."""
        super().__init__()
        self._counters = counters

    def remember(self, flow: Flow, now: float) -> None:
        """This flow is about to be ended."""
        if flow.protocol == TCP and flow.translated:
            self[flow.original.device, reversed_key(flow.outside)] = Ended(flow.original, flow.resets, now)
            if len(self) > MOST_REMEMBERED:
                self.popitem(last=False)

    def answer(self, device: SideDevice, unknown: Unknown, now: float) -> None:
        """Tell the peer, if what came in on this device, and is of no flow, is of such a connection."""
        ended = self.get((device, unknown.key)) if unknown.protocol == TCP else None
        if ended is None:
            return
        if now > ended.since + REMEMBERED_S:
            del self[device, unknown.key]
            return
        at = unknown.headers.transport
        (number,) = unpack_u32(unknown.packet, at + 8)
        has_data = unknown.headers.size > at + (unknown.packet[at + 12] >> 4) * 4
        if has_data and number in ended.resets and now < ended.since + UNDER_WAY_S:
            return
        if (reset := craft.reset(unknown.packet, unknown.headers)) is not None:
            self._counters["half_open_reset"] += 1
            device.send(memoryview(bytearray(HEADROOM) + reset), len(reset), ended.original)
