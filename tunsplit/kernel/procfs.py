"""Which process holds a socket, and who it descends from.

Some facts about looking for holders (fs/proc/fd.c):

To find the holder of an inode means to read the links in /proc/PID/fd of process after process, at
2.5 µs each: 30 ms for 12,000. So first comes whoever held it, or was the last to open a flow. All others
are found by one pass over all processes, for all sockets that are asked for, and who has not run since the
last pass still shows what he showed then (kernel/tables.py): so it takes 2 ms where 300 sleep. A socket that is shared
(by fork, or sent over a unix socket) shows under every holder; fork keeps its number, exec keeps the holder
and changes the program. A holder is asked for its program before its descriptor is looked at once more: if the
socket is still there then, the program that was read did hold it.

A socket that a process did not show when its table was last read, it has opened since. So nobody shares it by birth but
who was born to that process later: neither its ancestors nor their other descendants, who may have what it had from
them. That saves looking at all of these.

Guesses can be wrong for a while: a descriptor that was sent over a unix socket is not seen by `recheck`. So `scan_all`
is to be run every few seconds.

/proc/loadavg ends with the number that was given last to a process or thread: as long as that is the same, nobody
was born, and /proc need not be listed again.

What a process shows can change without exec: its user (setuid), its command line (it may write there), its
cgroup (it may be moved). Holders are read anew for every flow.
"""

# ruff: noqa: PTH115 -- pathlib costs more than the system call, and this is the dear part

import os
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import NamedTuple, TypeVar

from tunsplit.kernel.closing import Closing
from tunsplit.kernel.descriptors import children, closes_on_exec, read_link, search, sockets, tables_of_threads
from tunsplit.kernel.newcomers import Newcomers
from tunsplit.kernel.procpid import last_pid, pids, read_process
from tunsplit.kernel.tables import LATELY_S, Table, Tables, open_process
from tunsplit.process import Process

PAUSE = 200  # descriptors read before the event loop gets its turn: 0.5 ms
CACHED = 4096  # entries of each cache
RECENT = 32  # owners of the last flows whose next socket is guessed at
HEIRS = 64  # whose descriptor a recheck compares

Key = TypeVar("Key")
Value = TypeVar("Value")


class Holder(NamedTuple):
    """A process, and the descriptor that it holds the socket by."""

    process: Process
    descriptor: str  # its path from /proc/PID/fd: a number; of a thread's own table with the way there before it


class Processes(Closing):
    """Holders of sockets, with what is known of them from before.

    `keys` are the keys of `[[app]]` entries that rules judge by: what none of them needs is not read.

    Invariant: what a cache holds is a guess, confirmed by /proc before it is told to anybody.
    """

    def __init__(self, keys: frozenset[str] = frozenset()) -> None:
        self.keys = keys
        # Says what a process is as of this moment; None: it is to be read.
        self.recall: Callable[[int], Process | None] = lambda _: None
        # Who may have descriptors of a process by birth; None: nobody can tell.
        self.heirs: Callable[[int], Collection[int] | None] = children
        self._tables = Tables()
        self.newcomers = Newcomers(self._tables)
        self._user_namespace = os.readlink("/proc/self/ns/user")
        self._owners: dict[int, tuple[int, int, str]] = {}  # inode → pid, start time, descriptor
        self._recent: dict[int, str] = {}  # pid → descriptor of the last flows' owners, the newest last
        self._newest_first = True  # whether the next flow is the newest's, sooner than the oldest's
        # pid and start time → whether it is known to hold its sockets alone
        self._alone: dict[tuple[int, int], bool] = {}
        self._rechecked = self._scanned = self._descriptors = 0

    def close(self) -> None:
        """Give the descriptors back."""
        self._tables.close()

    def recheck(self, inode: int) -> Holder | None:
        """The holder of this socket, if it is who owned it before or who opened one of the last flows.

        Only for processes that a full search has found to be the only holder of a socket, which was this one or is
        older than this one, and if none of their heirs holds it; else None, and the answer is in `find_holders`.
        """
        link = f"socket:[{inode}]"
        if known := self._owners.get(inode):
            pid, _, descriptor = known
            if read_link(f"/proc/{pid}/fd/{descriptor}") == link:
                return self._confirm_alone(pid, descriptor, inode)
        recent = list(self._recent.items())
        # One opens a flow after the other; of several who do, mostly whoever has not for the longest time.
        for tried, (pid, descriptor) in enumerate(reversed(recent) if self._newest_first else recent):
            if read_link(f"/proc/{pid}/fd/{descriptor}") == link:
                if 2 * tried >= len(recent):
                    self._newest_first = not self._newest_first
                return self._confirm_alone(pid, descriptor, inode)
            if not tried and self._newest_first and (holder := self._recheck_all_of(pid, descriptor, inode)):
                return holder
        return None if self._newest_first or not recent else self._recheck_all_of(*recent[-1], inode)

    def _recheck_all_of(self, pid: int, last: str, inode: int) -> Holder | None:
        """The same for one process, by whichever descriptor, those first that follow its last one."""
        found = search(f"/proc/{pid}/fd", f"socket:[{inode}]", int(last) if last.isdecimal() else 0)
        return None if found is None else self._confirm_alone(pid, found, inode)

    def ended(self, pid: int) -> None:
        """A process has ended, and opens no flow any more."""
        self._recent.pop(pid, None)

    def newborn(self, inode: int) -> Holder | None:
        """The holder of this socket, if it was born since the last pass over all processes, and nobody else holds it.

        None also where it would take long to find that out; then the answer is in `find_holders`.

        Raises:
            KernelError: as `find_holders`.
        """
        if (found := self.newcomers.find_alone(inode)) is None:
            return None
        if (holder := self._confirm(*found, f"socket:[{inode}]")) is not None:
            self._rechecked += 1
            self._remember(inode, [holder])
        return holder

    def newcomer(self, inode: int, user: int | None = None) -> Holder | None:
        """One of the latest newcomers, if it holds this socket now; others may as well, which a search has to find.

        With a `user`, who has created the socket and is not root, only those that are his are looked at.
        """
        link = f"socket:[{inode}]"
        holders = (self._confirm(*found, link) for found in self.newcomers.find(link, user))
        return next(filter(None, holders), None)

    def find_holders(self, inodes: set[int]) -> Iterator[dict[int, list[Holder]] | None]:
        """All processes that hold these sockets, found in one pass; None before that now and then, to give way.

        A process that is born meanwhile is looked at too, and tables that threads have for themselves. A large table
        that was read in the last seconds is read again only if a socket is found nowhere else, or with somebody whom
        its process may have given it since.

        Raises:
            KernelError: that cannot be seen.
        """
        found: dict[int, dict[int, Holder]] = {}
        put_off: list[int] = []
        covered = self.newcomers.begin_pass()
        for pids_then, rest in ((self._everybody(), put_off), (put_off, None)) if inodes else ():
            if found.keys() == inodes and put_off:
                held_by = [one.process for of in found.values() for one in of.values()]
                put_off[:] = self.newcomers.givers_to(held_by, LATELY_S, put_off)
            for one in self._pass(inodes, pids_then, rest):
                if one is None:
                    yield None
                else:
                    for inode, holder in self._shown(*one, inodes):
                        found.setdefault(inode, {})[holder.process.pid] = holder
            # Also without those who are put off: what one of them has opened since, who is born later has from him.
            self.newcomers.cover(covered)
        self._scanned += 1
        holders = {inode: list(of.values()) for inode, of in found.items()}
        for inode in inodes:
            self._remember(inode, holders.get(inode, []))
        yield holders

    def scan_all(self, inodes: set[int]) -> Iterator[tuple[int, frozenset[tuple[int, int]]] | None]:
        """Who holds which of these sockets, as (pid, start time), found in one pass; None now and then, to give way.

        The sockets come last, each once, if anybody holds it: nobody may while it is on its way through a unix socket,
        until it was received. A descriptor that moves during the pass can be missed by it, not by the next.

        Raises:
            KernelError: that cannot be seen.
        """
        holders: dict[int, set[tuple[int, int]]] = {}
        covered = self.newcomers.begin_pass()
        for one in self._pass(inodes, self._everybody(), None):
            if one is None:
                yield None
                continue
            pid, table = one
            for inode in table.sockets.keys() & inodes:
                holders.setdefault(inode, set()).add((pid, table.start_time))
        self.newcomers.cover(covered)
        self._scanned += 1
        for inode in inodes - holders.keys():  # most of them, where many connections have just been closed
            self._owners.pop(inode, None)
        for inode, found_keys in holders.items():
            keys = frozenset(found_keys)
            self._correct(inode, keys)
            yield inode, keys

    def held_of(self, pid: int, inodes: set[int]) -> set[int]:
        """Which of these sockets a process holds.

        Raises:
            KernelError: that cannot be seen: there is no descriptor left to look with.
        """
        return set(self._held(pid, inodes))

    def keeps(self, pid: int, inodes: set[int]) -> bool:
        """Whether a process may hold one of these sockets from before an exec.

        It does not if each of its descriptors for them closes on exec, as most do. Who ends shows none any more.

        Raises:
            KernelError: as `held_of`.
        """
        if (directory := open_process(pid)) is None:
            return True
        closes = False
        try:
            for table in ("fd", *tables_of_threads(directory, pid)):
                for shown, _ in sockets(directory, table):
                    for inode, number in shown:
                        if inode in inodes:
                            if not closes_on_exec(directory, f"{table}info/{number}"):
                                return True
                            closes = True
        finally:
            os.close(directory)
        return not closes

    def sockets_of(self, pid: int) -> set[int]:
        """Every socket that a process holds, of whatever kind.

        Raises:
            KernelError: as `held_of`.
        """
        return set(self._held(pid, None))

    def known(self, pid: int) -> Process | None:
        """What this pid is, as far as that is known without a look at /proc, else as `read` says.

        Raises:
            KernelError: /proc is not what it should be.
        """
        recalled = self.recall(pid)
        return self.read(pid) if recalled is None else recalled

    def read(self, pid: int) -> Process | None:
        """What this pid is now; None when there is no such process.

        Raises:
            KernelError: /proc is not what it should be.
        """
        return read_process(pid, self.keys, self._user_namespace)

    def statistics(self) -> dict[str, int]:
        """Answers from the caches, passes over all processes, descriptors read by these, and the size of the caches."""
        return {
            "rechecked": self._rechecked,
            "scanned": self._scanned,
            "descriptors": self._descriptors,
            "owners": len(self._owners),
            **self._tables.statistics(),
        }

    def _pass(
        self, inodes: set[int], pids: Iterable[int], put_off: list[int] | None
    ) -> Iterator[tuple[int, Table] | None]:
        """Every process that shows any of these sockets; some may come twice. None now and then, to give way.

        Args:
            inodes: of the sockets.
            pids: who is looked at.
            put_off: takes those with large tables who are told as they were a moment ago; None: let there be none.
        """
        tables, budget = self._tables, PAUSE
        again: list[int] = []  # who has a table that somebody else may have changed
        for pid in chain(pids, again):
            budget -= 1
            table = tables.unchanged(pid)
            if table is None and put_off is not None and (table := tables.lately(pid)) is not None:
                put_off.append(pid)
            if table is None:
                for count, table in tables.read(pid, inodes):  # noqa: B007 -- the last one is wanted
                    self._descriptors += count
                    budget -= count
                    if budget <= 0:
                        budget = PAUSE
                        yield None
            elif budget <= 0:
                budget = PAUSE
                yield None
            if table is None:
                continue
            if table.shared_with is not None and table.shared_with not in again:
                again.append(table.shared_with)
            if not table.sockets.keys().isdisjoint(inodes):
                yield pid, table

    def _shown(self, pid: int, table: Table, inodes: set[int]) -> Iterator[tuple[int, Holder]]:
        """Which of these sockets a process still holds, with what it is."""
        if (process := self.read(pid)) is None:
            return
        for inode in table.sockets.keys() & inodes:
            descriptor = table.sockets[inode]
            if read_link(f"/proc/{pid}/fd/{descriptor}") == f"socket:[{inode}]":
                yield inode, Holder(process, descriptor)

    def _everybody(self) -> Iterator[int]:
        before: set[int] = set()
        # Each round looks at who was born during the last; a fork bomb must not keep us for ever.
        for _ in range(3):
            last = last_pid()
            there = set(pids())
            self._tables.retain(there)
            yield from _newest_first(there - before, last)
            before |= there
            if last_pid() == last:
                return

    def _held(self, pid: int, inodes: set[int] | None) -> Iterator[int]:
        """Sockets that a process holds, of these or of all."""
        if (directory := open_process(pid)) is None:
            return
        try:
            for table in ("fd", *tables_of_threads(directory, pid)):
                for shown, _ in sockets(directory, table):
                    yield from (inode for inode, _ in shown if inodes is None or inode in inodes)
        finally:
            os.close(directory)

    def _correct(self, inode: int, keys: frozenset[tuple[int, int]]) -> None:
        """Let no guess outlive what a pass has found."""
        if len(keys) > 1:
            for key in keys:
                _store(self._alone, key, False, CACHED)
        if (known := self._owners.get(inode)) and known[0] not in {pid for pid, _ in keys}:
            del self._owners[inode]

    def _confirm(self, pid: int, descriptor: str, link: str) -> Holder | None:
        process = self.read(pid)
        if process is None or read_link(f"/proc/{pid}/fd/{descriptor}") != link:
            return None
        return Holder(process, descriptor)

    def _confirm_alone(self, pid: int, descriptor: str, inode: int) -> Holder | None:
        """The holder whose descriptor has just shown this socket, if nobody else can have it by birth."""
        link = f"socket:[{inode}]"
        recalled = self.recall(pid)
        # What it is as of before the descriptor was read need not be asked again.
        holder = self._confirm(pid, descriptor, link) if recalled is None else Holder(recalled, descriptor)
        if holder is None or not self._is_its_own(pid, holder.process.start_time, inode):
            return None
        heirs = self.heirs(pid)
        if heirs is None or len(heirs) > HEIRS:
            return None
        for heir in heirs:
            if read_link(f"/proc/{heir}/fd/{descriptor}") == link:
                return None
        self._rechecked += 1
        self._remember(inode, [holder])
        return holder

    def _is_its_own(self, pid: int, start_time: int, inode: int) -> bool:
        """Whether a process has a socket from nobody by birth: it was found alone with it, or has opened it since."""
        if not self._alone.get((pid, start_time)):
            return False
        if (known := self._owners.get(inode)) is not None and known[:2] == (pid, start_time):
            return True
        table = self._tables.last(pid)
        return table is not None and table.start_time == start_time and inode not in table.sockets

    def _remember(self, inode: int, found: list[Holder]) -> None:
        alone = len(found) == 1
        for process, descriptor in found:
            # Once seen sharing, always searched for.
            key = (process.pid, process.start_time)
            _store(self._alone, key, alone and self._alone.get(key, True), CACHED)
            if alone:
                _store(self._owners, inode, (*key, descriptor), CACHED)
                _store(self._recent, process.pid, descriptor, RECENT)


def _newest_first(some: set[int], last: int) -> list[int]:
    """By age, as far as pids tell it: they are given upwards to the last, and then again from below."""
    upwards = sorted(some)
    wrapped = bisect(upwards, last)
    return upwards[:wrapped][::-1] + upwards[wrapped:][::-1]


def _store(cache: dict[Key, Value], key: Key, value: Value, most: int) -> None:
    cache.pop(key, None)
    if len(cache) >= most:
        del cache[next(iter(cache))]
    cache[key] = value
