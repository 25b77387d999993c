"""Who holds a socket, among those who have come of late: who were born, or became another program.

Theory of operation. Of programs that start, send and are gone again, somebody has to know who they were: the last few
are looked at at once, for any socket.

A socket that nobody showed during the last pass over all processes was opened since, and most programs that start and
send were born since, too. Then whoever has it by birth is one of those, or of those whom they were born of: to look at
these tells as much as another pass, and takes 1 ms where that takes 10 or 100. Births are numbered as they are heard
of. A pass covers all who were born before it began: those who were born later, or were not heard of by then, are looked
at, but for those that have ended: they hold nothing any more.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from tunsplit.kernel.descriptors import search
from tunsplit.kernel.procpid import tick_ago
from tunsplit.kernel.tables import Tables
from tunsplit.process import Process

LATEST = 4  # who have come last …
LATE_S = 2.0  # … no longer ago than this
MOST_BORN = 64  # since the last pass, and alive; of more, nobody is looked at
MOST_READ = 400  # descriptors, for one socket: 2 ms


class Covered(NamedTuple):
    """Who is covered by a pass: who had been heard of when it began, and at which clock tick that was."""

    births: int
    at: int


class Newcomers:
    """Those who have come.

    Attributes:
        line: says who may have what a process was born with, if nobody had it before this clock tick; None where there
            is no telling.
    """

    def __init__(self, tables: Tables) -> None:
        self.line: Callable[[int, int], Collection[int] | None] = lambda _, __: None
        self._tables = tables
        self._own = os.getpid()
        self._latest: OrderedDict[int, float] = OrderedDict()  # when each came, by the monotonic clock
        self._births = 0  # that were heard of
        self._born: dict[int, int] = {}  # who lives and is not covered, oldest first → the number of its birth
        self._lost = 0  # the number of the last birth of somebody who may live and is not among these
        self._covered = Covered(-1, 0)

    def note(self, pid: int) -> None:
        """A process was born, or runs another program: it may send its first packet and be gone in a moment."""
        self._latest[pid] = time.monotonic()
        self._latest.move_to_end(pid)
        if len(self._latest) > LATEST:
            self._latest.popitem(last=False)

    def note_birth(self, pid: int) -> None:
        """A process was born; each is to be told, but for those that `lose_births` stands for."""
        self._births += 1
        self._born[pid] = self._births
        if len(self._born) > MOST_BORN:
            self._lost = self._born.pop(next(iter(self._born)))
        self.note(pid)

    def lose_births(self) -> None:
        """Nobody knows who was born meanwhile."""
        self._births += 1
        self._lost = self._births

    def ended(self, pid: int) -> None:
        """A process has ended, with all of its threads."""
        self._born.pop(pid, None)
        self._latest.pop(pid, None)

    def begin_pass(self) -> Covered:
        """A pass over all begins: what to give to `cover` when it has ended."""
        return Covered(self._births, tick_ago(0))

    def cover(self, covered: Covered) -> None:
        """A pass over all has ended."""
        if covered > self._covered:
            self._covered = covered
            self._born = {pid: birth for pid, birth in self._born.items() if birth > covered.births}

    def givers_to(self, holders: Iterable[Process], within_s: float, pids: list[int]) -> list[int]:
        """Which of these processes may have given what it has opened of late to a holder that was born since then."""
        since, found = tick_ago(within_s), set[int]()
        for pid in {one.pid for one in holders if one.start_time >= since}:
            if (givers := self.line(pid, since)) is None:
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
        if self._covered.births < self._lost or not self._born or not self._tables.is_new(inode):
            return None
        look = _Look(self._tables, inode)
        born = list(reversed(self._born))  # the newest is the likeliest, and may be gone in a moment
        holders = [pid for pid in born if look.shows(pid)]
        if len(holders) != 1 or (line := self.line(holders[0], self._covered.at)) is None:
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
