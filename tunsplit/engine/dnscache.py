"""Answers that may be given again.

Theory of operation. A key begins with its partition's number (a route and its resolvers), so that no side's answer is
another's. What was used last goes last; when entries or bytes exceed their bound, the first goes. Answers count
their TTLs down, and are gone when the shortest ends.
"""

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field

from tunsplit.wire.dns import Answer, aged

PARTITION = 8  # bytes of a partition's number
MOST_ENTRIES = 16_384
MOST_OCTETS = 8 << 20
OVERHEAD = 600  # bytes that Python's objects of an entry take beside the message and a TTL each
TTL_OVERHEAD = 120


@dataclass(slots=True, eq=False)
class Entry:
    """An answer, and how it looks in the second in which it was last given."""

    answer: Answer
    stored: float
    octets: int
    age: int = 0
    shown: bytes = field(default=b"", repr=False)


class DnsCache:
    """Bounded; keys are bytes. `now` is a clock that goes on while the host sleeps."""

    def __init__(self, most_entries: int = MOST_ENTRIES, most_octets: int = MOST_OCTETS) -> None:
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._most_entries, self._most_octets = most_entries, most_octets
        self._octets = 0

    def get(self, key: bytes, now: float) -> Entry | None:
        """The entry, with the answer as of now in `shown`."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        age = int(now - entry.stored)
        if age >= entry.answer.lifetime:
            del self._entries[key]
            self._octets -= entry.octets
            return None
        if age != entry.age:
            entry.age, entry.shown = age, aged(entry.answer.message, entry.answer.ttls, age)
        self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, answer: Answer, now: float) -> None:
        """Store an answer, if it may be."""
        if not answer.lifetime:
            return
        octets = len(key) + 2 * len(answer.message) + OVERHEAD + TTL_OVERHEAD * len(answer.ttls)
        if (before := self._entries.pop(key, None)) is not None:
            self._octets -= before.octets
        self._entries[key] = Entry(answer, now, octets, shown=answer.message)
        self._octets += octets
        while self._octets > self._most_octets or len(self._entries) > self._most_entries:
            _, first = self._entries.popitem(last=False)
            self._octets -= first.octets

    def flush(self, partitions: Set[bytes]) -> None:
        """Forget what these partitions hold."""
        kept = [(key, entry) for key, entry in self._entries.items() if key[:PARTITION] not in partitions]
        self._entries = OrderedDict(kept)
        self._octets = sum(entry.octets for entry in self._entries.values())

    def statistics(self) -> dict[str, int]:
        """How much it holds."""
        return {"cache_entries": len(self._entries), "cache_octets": self._octets}
