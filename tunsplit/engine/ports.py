"""The ports, and echo identifiers, that NAT puts in place of the apps' own.

Theory of operation. A port passes through six places: FREE, RESERVED (the kernel has been told to keep
its hands off it, in batches, since telling costs a system call), LIVE (given to a mapping), RESTING
(given back; late packets to it must still reach nobody), and FREE again; or FOREIGN (somebody else was found to
have it) for as long as a port rests. Only RESERVED, LIVE and RESTING ports are taken from the kernel, so that a
server elsewhere in the range works; what is RESERVED and not needed soon is given back. When none is
free, the port that has rested longest is given again: at 2,000 connections a second 16,384 ports last
eight seconds.

A server that has closed a TCP connection remembers it for a minute, so the port is looked for among some that have
rested longest, see `timewait`.

Invariant: a port is in exactly one place.
"""

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from tunsplit.engine.timewait import Connection

REST_S = 60.0  # TIME_WAIT of the peers (tcp.h, TCP_TIMEWAIT_LEN)
UNUSED_S = 10.0  # for which a port may stay reserved: a server that starts to listen there is cut off
BATCH = 64  # ports told to the kernel at once
LOOKED_AT = 16  # of those that have rested longest: one of two can be used again towards the same server


class _Resting(NamedTuple):
    since: float
    port: int
    last: Connection | None


class PortPool:
    """The ports of one protocol; `size` is how many there are.

    `randbelow(n)` gives a random int in [0, n) and has to be unpredictable (RFC 6056).
    """

    def __init__(self, first: int, last: int, randbelow: Callable[[int], int]) -> None:
        self._randbelow = randbelow
        self._free = list(range(first, last + 1))
        self.size = len(self._free)
        self._reserved: list[int] = []
        self._reserved_at = 0.0
        self._live: list[int] = []
        self._place: dict[int, int] = {}  # of each live port in the list: any of them is found, and taken out, at once
        self._resting: deque[_Resting] = deque()
        self._foreign: deque[tuple[float, int]] = deque()

    @property
    def must_reserve(self) -> bool:
        """Whether `reserve` has to be called before the next `draw`."""
        return not self._reserved and bool(self._free)

    def reserve(self, now: float) -> list[int]:
        """Choose the next free ports at random; the caller takes them from the kernel before the next `draw`."""
        self._reserved = [self._take(self._free) for _ in range(min(BATCH, len(self._free)))]
        self._reserved_at = now
        return list(self._reserved)

    def give_up(self) -> list[int]:
        """The ports that are reserved are free again; the caller returns them to the kernel, unless it has none."""
        unused, self._reserved = self._reserved, []
        self._free += unused
        return unused

    def draw(self, connection: Connection | None = None) -> int | None:
        """A port for a new mapping: reserved, else of those that have rested longest; None when all are taken."""
        if self._reserved:
            port = self._reserved.pop()
        elif self._resting:
            port = self._take_rested(connection)
        else:
            return None
        self._become_live(port)
        return port

    def give_back(self, port: int, now: float, last: Connection | None = None) -> None:
        """The mapping is gone: the port rests from `now` on, and its server may remember the `last` connection."""
        self._leave_live(port)
        self._resting.append(_Resting(now, port, last))

    def put_back(self, port: int) -> None:
        """The port just drawn is free again, unused; the caller returns it to the kernel."""
        self._leave_live(port)
        self._free.append(port)

    def refuse(self, port: int, now: float) -> None:
        """The port just drawn is somebody else's: it is left alone; the caller returns it to the kernel."""
        self._leave_live(port)
        self._foreign.append((now, port))

    def rested(self, now: float) -> list[int]:
        """The ports that are free again at `now`; the caller returns them to the kernel."""
        while self._foreign and self._foreign[0][0] + REST_S <= now:
            self._free.append(self._foreign.popleft()[1])
        done = []
        while self._resting and self._resting[0].since + REST_S <= now:
            done.append(self._resting.popleft().port)
        self._free += done
        return done + self.give_up() if self._reserved_at + UNUSED_S <= now else done

    def taken(self) -> list[int]:
        """All ports that the kernel has to leave alone just now."""
        return [*self._reserved, *self._live, *(resting.port for resting in self._resting)]

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
            "foreign": len(self._foreign),
        }

    def _take_rested(self, connection: Connection | None) -> int:
        def fits(last: Connection | None) -> bool:
            return connection is None or last is None or connection.may_follow(last)

        oldest = islice(self._resting, LOOKED_AT)
        at = next((at for at, resting in enumerate(oldest) if fits(resting.last)), 0)
        port = self._resting[at].port
        del self._resting[at]
        return port

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
