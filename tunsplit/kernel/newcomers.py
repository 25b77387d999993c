"""Who holds a socket, among those who have come of late: who were born, or became another program.

Theory of operation. Of programs that start, send and are gone again, somebody has to know who they were: the last few
are looked at at once, for any socket.

A socket that nobody showed during the last pass over all processes was opened since, and most programs that start and
send were born since, too. Then whoever has it by birth is one of those, or of those whom they were born of: to look at
these tells as much as another pass, and takes 1 ms where that takes 10 or 100. Births are numbered as they are heard
of. A pass covers all who were born before it began: those who were born later, or were not heard of by then, are looked
at.
"""

import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator

from tunsplit.kernel.descriptors import search
from tunsplit.kernel.procpid import tick_ago
from tunsplit.kernel.tables import Tables
from tunsplit.process import Process

LATEST = 4  # who have come last …
LATE_S = 2.0  # … no longer ago than this
MOST_BORN = 64  # since the last pass; of more, nobody is looked at
MOST_READ = 400  # descriptors, for one socket: 2 ms

Line = Callable[[int, Collection[int]], Collection[int] | None]


class Newcomers:
    """Those who have come.

    Attributes:
        line: says who may have what a process was born with, if nobody had it before these processes were born; None
            where there is no telling.
        givers: likewise, if nobody had it before this clock tick.
        births: how many were heard of.
    """

    def __init__(self, tables: Tables) -> None:
        self.line: Line = lambda _, __: None
        self.givers: Callable[[int, int], Collection[int] | None] = lambda _, __: None
        self.births = 0
        self._tables = tables
        self._own = os.getpid()
        self._latest: OrderedDict[int, float] = OrderedDict()  # when each came, by the monotonic clock
        self._born: deque[int] = deque(maxlen=MOST_BORN)
        self._covered = -1 - MOST_BORN

    def note(self, pid: int) -> None:
        """A process was born, or runs another program: it may send its first packet and be gone in a moment."""
        self._latest[pid] = time.monotonic()
        self._latest.move_to_end(pid)
        if len(self._latest) > LATEST:
            self._latest.popitem(last=False)

    def note_birth(self, pid: int) -> None:
        """A process was born; each is to be told, but for those that `lose_births` stands for."""
        self.births += 1
        self._born.append(pid)
        self.note(pid)

    def lose_births(self) -> None:
        """Nobody knows who was born meanwhile."""
        self.births += MOST_BORN + 1

    def cover(self, births: int) -> None:
        """A pass over all has ended, at whose beginning there had been so many `births`."""
        self._covered = max(self._covered, births)

    def givers_to(self, holders: Iterable[Process], within_s: float, pids: list[int]) -> list[int]:
        """Which of these processes may have given what it has opened of late to a holder that was born since then."""
        since, found = tick_ago(within_s), set[int]()
        for pid in {one.pid for one in holders if one.start_time >= since}:
            if (givers := self.givers(pid, since)) is None:
                return pids
            found.update(givers)
        return [pid for pid in pids if pid in found]

    def find(self, link: str, user: int | None) -> Iterator[tuple[int, str]]:
        """Who of the latest shows this link, newest first, with the descriptor: a guess.

        With a `user`, who has created the socket and is not root, only those that are his are looked at.
        """
        since = time.monotonic() - LATE_S
        for pid, came in reversed(self._latest.items()):
            if came < since:
                return
            if (not user or _user(pid) == user) and (found := search(f"/proc/{pid}/fd", link)) is not None:
                yield pid, found

    def find_alone(self, inode: int) -> tuple[int, str] | None:
        """Who alone has a socket by birth, and was born since the last pass, with the descriptor.

        None also where it would take long to find that out.

        Raises:
            KernelError: there is no room to look with.
        """
        fresh = self.births - self._covered
        if not 0 < fresh <= len(self._born) or not self._tables.is_new(inode):
            return None
        born = list(self._born)[-fresh:]
        look = _Look(self._tables, inode)
        holders = [pid for pid in dict.fromkeys(born) if look.shows(pid)]
        if len(holders) != 1 or (line := self.line(holders[0], born)) is None:
            return None
        # What we start ourselves has nothing of ours, and we have much to look through.
        if any(look.shows(pid) for pid in {*line}.difference(born, (self._own,))) or not look.is_whole:
            return None
        return holders[0], look.descriptor


class _Look:
    """One look for a socket: `is_whole` as long as nobody was left out; `descriptor` is where it was seen last."""

    def __init__(self, tables: Tables, inode: int) -> None:
        self._tables = tables
        self._inode = inode
        self._left = MOST_READ
        self.is_whole = True
        self.descriptor = ""

    def shows(self, pid: int) -> bool:
        """Whether a process shows the socket now, as far as there is time to read."""
        table = self._tables.unchanged(pid) if self.is_whole else None
        if table is None and self.is_whole:
            for count, table in self._tables.read(pid, {self._inode}):  # noqa: B007 -- the last one is wanted
                self._left -= count
                if self._left < 0:
                    self.is_whole = False
                    return False
        if table is None or self._inode not in table.sockets:
            return False
        self.is_whole = self.is_whole and table.shared_with is None
        self.descriptor = table.sockets[self._inode]
        return True


def _user(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116 -- pathlib costs more than the system call
    except OSError:  # it has ended
        return None
