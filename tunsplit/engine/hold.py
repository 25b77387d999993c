"""Where first packets wait until their app is known, in order and in bounds.

Theory of operation. The first packet of a flow whose owner is not known at once is held here, and so is
all that the flow sends until the verdict. `release` gives the packets back in the order in which they
came. Whatever is held for longer than the configured time is given back by `expire` to be refused: a
packet waits, or it goes, or it is refused, but it is never lost silently. No user may take more than a quarter
of the room.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tunsplit.engine.slowpath import Unknown

MOST_FLOWS = 4096
MOST_PACKETS_A_FLOW = 64
MOST_OCTETS = 64 << 20
SHARE = 4  # a user has one in so many of the flows, and of the octets

Key = tuple[int, bytes]


@dataclass(slots=True)
class _Held:
    since: float
    user: int | None
    packets: list[Unknown] = field(default_factory=list)


class Hold:
    """The flows that wait for their verdict."""

    def __init__(self, longest_s: float) -> None:
        self.longest_s = longest_s
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._octets = 0
        self._flows_of: Counter[int | None] = Counter()
        self._octets_of: Counter[int | None] = Counter()

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Key]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def add(self, packet: Unknown, now: float, user: int | None = None) -> bool:
        """Hold a packet; False where there is no room for it: the caller refuses it.

        `user` is whose socket sends the flow, as far as that is known. It counts with the flow's first packet.
        """
        key, size = (packet.protocol, packet.key), len(packet.packet)
        held = self._held.get(key)
        if held is not None:
            user = held.user
        if self._octets + size > MOST_OCTETS or self._octets_of[user] + size > MOST_OCTETS // SHARE:
            return False
        if held is None:
            if len(self._held) >= MOST_FLOWS or self._flows_of[user] >= MOST_FLOWS // SHARE:
                return False
            held = self._held[key] = _Held(now, user)
            self._flows_of[user] += 1
        elif len(held.packets) >= MOST_PACKETS_A_FLOW:
            return False
        held.packets.append(packet)
        self._octets += size
        self._octets_of[user] += size
        return True

    def release(self, key: Key) -> list[Unknown]:
        """Give back what this flow has sent so far, in order; nothing if it is not held (any more)."""
        held = self._held.pop(key, None)
        if held is None:
            return []
        octets = sum(len(packet.packet) for packet in held.packets)
        self._octets -= octets
        self._octets_of[held.user] -= octets
        self._flows_of[held.user] -= 1
        if not self._flows_of[held.user]:
            del self._flows_of[held.user], self._octets_of[held.user]
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
