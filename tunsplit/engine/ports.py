"""The ports, and echo identifiers, that NAT puts in place of the apps' own.

Theory of operation. A port passes through five places: FREE, RESERVED (the kernel has been told to keep
its hands off it, in batches, since telling costs a system call), LIVE (given to a mapping), RESTING
(given back; late packets to it must still reach nobody), and FREE again. Only RESERVED, LIVE and
RESTING ports are taken from the kernel, so that a server elsewhere in the range works. When none is
free, the port that has rested longest is given again: at 2,000 connections a second 16,384 ports last
eight seconds.

Invariant: a port is in exactly one place.
"""

from collections import deque
from collections.abc import Callable

REST_S = 60.0  # TIME_WAIT of the peers (tcp.h, TCP_TIMEWAIT_LEN)
BATCH = 64  # ports told to the kernel at once


class PortPool:
    """The ports of one protocol; `size` is how many there are.

    `randbelow(n)` gives a random int in [0, n) and has to be unpredictable (RFC 6056).
    """

    def __init__(self, first: int, last: int, randbelow: Callable[[int], int]) -> None:
        self._randbelow = randbelow
        self._free = list(range(first, last + 1))
        self.size = len(self._free)
        self._reserved: list[int] = []
        self._live: list[int] = []
        self._place: dict[int, int] = {}  # of each live port in the list: any of them is found, and taken out, at once
        self._resting: deque[tuple[float, int]] = deque()

    @property
    def must_reserve(self) -> bool:
        """Whether `reserve` has to be called before the next `draw`."""
        return not self._reserved and bool(self._free)

    def reserve(self) -> list[int]:
        """Choose the next free ports at random; the caller takes them from the kernel before the next `draw`."""
        chosen = [self._take(self._free) for _ in range(min(BATCH, len(self._free)))]
        self._reserved += chosen
        return chosen

    def draw(self) -> int | None:
        """A port for a new mapping: reserved, else the one that has rested longest; None when all are live."""
        if self._reserved:
            port = self._reserved.pop()
        elif self._resting:
            port = self._resting.popleft()[1]
        else:
            return None
        self._become_live(port)
        return port

    def give_back(self, port: int, now: float) -> None:
        """The mapping is gone: the port rests from `now` on."""
        self._leave_live(port)
        self._resting.append((now, port))

    def refuse(self, port: int) -> None:
        """The port just drawn is somebody else's: back to the free ones; the caller returns it to the kernel."""
        self._leave_live(port)
        self._free.append(port)

    def rested(self, now: float) -> list[int]:
        """The ports that are free again at `now`; the caller returns them to the kernel."""
        done = []
        while self._resting and self._resting[0][0] + REST_S <= now:
            done.append(self._resting.popleft()[1])
        self._free += done
        return done

    def taken(self) -> list[int]:
        """All ports that the kernel has to leave alone just now."""
        return [*self._reserved, *self._live, *(port for _, port in self._resting)]

    def some_live(self) -> int | None:
        """Any live port, at random; None if there is none. For TCP, whose ports serve several destinations."""
        if not self._live:
            return None
        return self._live[self._randbelow(len(self._live))]

    def statistics(self) -> dict[str, int]:
        """How many ports are where."""
        return {
            "free": len(self._free),
            "reserved": len(self._reserved),
            "live": len(self._live),
            "resting": len(self._resting),
        }

    def _become_live(self, port: int) -> None:
        self._place[port] = len(self._live)
        self._live.append(port)

    def _leave_live(self, port: int) -> None:
        at, last = self._place.pop(port), self._live.pop()
        if last != port:
            self._live[at] = last
            self._place[last] = at

    def _take(self, ports: list[int]) -> int:
        at = self._randbelow(len(ports))
        ports[at], ports[-1] = ports[-1], ports[at]
        return ports.pop()
