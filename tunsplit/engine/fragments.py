"""Later fragments follow the first: only that one has ports (RFC 791 §3.2, RFC 8200 §4.5, RFC 3022 §6.3).

Theory of operation. The first fragment of a datagram finds its rewrite like any packet, and leaves it here
under the datagram's name (addresses, protocol, identification). Later fragments are looked up by that
name. Those that arrive before their first are held until it comes, in bounds: the oldest datagram gives way.
What never gets its first is dropped when its time is up.

Names come round again (IPv4 has 65,536 a pair of hosts), so a first fragment that has to wait for its verdict
takes away at once what an older datagram of that name has left here: the new one may belong on the other side.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from tunsplit.engine.flow import Rewrite
from tunsplit.wire.ip import Headers

KNOWN_S = 30.0  # ipfrag_time of the kernel: nobody waits longer for the rest
MOST_KNOWN = 4096  # datagrams
MOST_HELD = 512  # fragments
MOST_HELD_OCTETS = 4 << 20

Name = tuple[int, bytes, bytes, int, bytes]


def datagram_name(headers: Headers) -> Name:
    """What all fragments of one datagram have in common (IPv6 leaves the protocol out: RFC 8200 §4.5)."""
    assert headers.identification is not None
    protocol = headers.protocol if headers.version == 4 else 0
    return headers.version, headers.source, headers.destination, protocol, headers.identification


class Refused(Exception):
    """The fragment's datagram goes nowhere."""


@dataclass(slots=True)
class _Waiting:
    since: float
    fragments: list[tuple[bytes, bytes]] = field(default_factory=list)


class Fragments:
    """The datagrams of one direction that are under way in pieces."""

    def __init__(self) -> None:
        self._known: OrderedDict[Name, tuple[float, Rewrite | None]] = OrderedDict()
        self._waiting: OrderedDict[Name, _Waiting] = OrderedDict()
        self._held = 0
        self._held_octets = 0

    def first(self, headers: Headers, rewrite: Rewrite, now: float) -> list[tuple[bytes, bytes]]:
        """The first fragment takes this rewrite; gives back (vnet header, packet) of those that waited for it."""
        name = datagram_name(headers)
        self._know(name, rewrite, now)
        return self._forget_waiting(name)

    def start(self, headers: Headers) -> None:
        """A first fragment whose flow is not known yet: what an older datagram of its name has left is void."""
        self._known.pop(datagram_name(headers), None)

    def later(self, headers: Headers) -> Rewrite | None:
        """The rewrite that the first fragment of this datagram has taken, while its flow lives.

        Raises:
            Refused: the first fragment was refused, or the flow has ended since.
        """
        known = self._known.get(datagram_name(headers))
        if known is None:
            return None
        rewrite = known[1]
        if rewrite is None or not rewrite.flow.passes:
            raise Refused
        return rewrite

    def hold(self, headers: Headers, vnet: bytes, packet: bytes, now: float) -> int:
        """Keep a later fragment until its first arrives; how many older ones had to give way."""
        dropped = 0
        while self._waiting and (self._held >= MOST_HELD or self._held_octets + len(packet) > MOST_HELD_OCTETS):
            dropped += len(self._forget_waiting(next(iter(self._waiting))))
        waiting = self._waiting.setdefault(datagram_name(headers), _Waiting(now))
        waiting.fragments.append((vnet, packet))
        self._held += 1
        self._held_octets += len(packet)
        return dropped

    def refuse(self, headers: Headers, now: float) -> int:
        """The first fragment was refused: drop what waits for it, and what comes; how many were waiting."""
        name = datagram_name(headers)
        self._know(name, None, now)
        return len(self._forget_waiting(name))

    def expire(self, now: float) -> int:
        """Forget datagrams that nobody completes any more; how many held fragments were dropped."""
        while self._known and next(iter(self._known.values()))[0] + KNOWN_S <= now:
            self._known.popitem(last=False)
        dropped = 0
        while self._waiting and (oldest := next(iter(self._waiting.items())))[1].since + KNOWN_S <= now:
            dropped += len(self._forget_waiting(oldest[0]))
        return dropped

    def statistics(self) -> dict[str, int]:
        """How many datagrams are known and how many fragments held."""
        return {"fragments_known": len(self._known), "fragments_held": self._held}

    def _know(self, name: Name, rewrite: Rewrite | None, now: float) -> None:
        self._known[name] = (now, rewrite)
        self._known.move_to_end(name)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    def _forget_waiting(self, name: Name) -> list[tuple[bytes, bytes]]:
        waiting = self._waiting.pop(name, None)
        if waiting is None:
            return []
        self._held -= len(waiting.fragments)
        self._held_octets -= sum(len(packet) for _, packet in waiting.fragments)
        return waiting.fragments
