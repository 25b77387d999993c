"""Where first packets wait until their app is known, in order and in bounds.

Theory of operation. The first packet of a flow whose owner is not known at once is held here, and so is
all that the flow sends until the verdict. `release` gives the packets back in the order in which they
came. Whatever is held for longer than the configured time is given back by `expire` to be refused: a
packet waits, or it goes, or it is refused, but it is never lost silently.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from tunsplit.engine.slowpath import Unknown

MOST_FLOWS = 4096
MOST_PACKETS_A_FLOW = 64
MOST_OCTETS = 64 << 20

Key = tuple[int, bytes]


@dataclass(slots=True)
class _Held:
    since: float
    packets: list[Unknown] = field(default_factory=list)


class Hold:
    """The flows that wait for their verdict."""

    def __init__(self, longest_s: float) -> None:
        self.longest_s = longest_s
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._octets = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def add(self, packet: Unknown, now: float) -> bool:
        """Hold a packet; False where there is no room for it: the caller refuses it."""
        key = (packet.protocol, packet.key)
        held = self._held.get(key)
        if self._octets + len(packet.packet) > MOST_OCTETS:
            return False
        if held is None:
            if len(self._held) >= MOST_FLOWS:
                return False
            held = self._held[key] = _Held(now)
        elif len(held.packets) >= MOST_PACKETS_A_FLOW:
            return False
        held.packets.append(packet)
        self._octets += len(packet.packet)
        return True

    def release(self, key: Key) -> list[Unknown]:
        """Give back what this flow has sent so far, in order; nothing if it is not held (any more)."""
        held = self._held.pop(key, None)
        if held is None:
            return []
        self._octets -= sum(len(packet.packet) for packet in held.packets)
        return held.packets

    def expire(self, now: float) -> list[list[Unknown]]:
        """Give back the flows whose time is up, to be refused."""
        late = []
        while self._held and (oldest := next(iter(self._held.items())))[1].since + self.longest_s <= now:
            late.append(self.release(oldest[0]))
        return late

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next; None while nothing is held."""
        return next(iter(self._held.values())).since + self.longest_s if self._held else None

    def statistics(self) -> dict[str, int]:
        """How many flows wait, with how much."""
        return {"held_flows": len(self._held), "held_octets": self._octets}
