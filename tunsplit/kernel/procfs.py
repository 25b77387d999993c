"""Which process holds a socket, and who it descends from.

Some facts about looking for holders (fs/proc/fd.c):

To find the holder of an inode means to read the links in /proc/PID/fd of process after process, at
2.5 µs each: 30 ms for 12,000. So first comes whoever held it, or was the last to open a flow, then its
cgroup, then the youngest processes. A socket that is shared (by fork, or sent over a unix socket)
shows under every holder; fork keeps its number, exec keeps the holder and changes the program. A holder
is asked for its program before its descriptor is looked at once more: if the socket is still there then,
the program that was read did hold it.

Guesses can be wrong for a while: a descriptor that was sent over a unix socket to somebody unrelated, or
inherited by a child of one of many threads, is not seen by `recheck`. So `scan_all` is to be run every few
seconds: one pass over everybody's descriptors, whatever the number of sockets asked for.

What a process shows can change without exec: its user (setuid), its command line (it may write there), its
cgroup (it may be moved). Holders are read anew for every flow.
"""

# ruff: noqa: PTH115 -- pathlib costs more than the system call, and this is the dear part

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from tunsplit.errors import KernelError
from tunsplit.kernel.cgroup import Cgroups
from tunsplit.kernel.descriptors import children, held, read_link, refuse_to_guess, search, tables_of_threads
from tunsplit.kernel.procpid import parse_stat, pids, read_file, read_process
from tunsplit.process import Process

PAUSE = 200  # descriptors read before the event loop gets its turn: 0.5 ms
CACHED = 4096  # entries of each cache
RECENT = 8  # owners of the last flows whose next socket is guessed at
GUESSED = 64  # descriptors of the last owner, newest first, that a recheck looks at
NEWCOMERS = 4  # the last processes that were born or became another program …
NEWCOMER_S = 2.0  # … no longer ago than this
RELATIVES = 32  # children whose descriptor a recheck compares

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recalled(NamedTuple):
    """A living process as it is known without a look at /proc, and whether any other was born of it."""

    process: Process
    has_children: bool


class Holder(NamedTuple):
    """A process, and the descriptor that it holds the socket by."""

    process: Process
    descriptor: str  # its path from /proc/PID/fd: a number; of a thread's own table with the way there before it


class Processes:
    """Holders of sockets, with what is known of them from before.

    `keys` are the keys of `[[app]]` entries that rules judge by: what none of them needs is not read.

    Invariant: what a cache holds is a guess, confirmed by /proc before it is told to anybody.
    """

    def __init__(self, keys: frozenset[str] = frozenset()) -> None:
        self.keys = keys
        # Says what a process is as of this moment; None: it is to be read.
        self.recall: Callable[[int], Recalled | None] = lambda _: None
        self._cgroups = Cgroups()
        self._user_namespace = os.readlink("/proc/self/ns/user")
        self._owners: dict[int, tuple[int, str]] = {}  # inode → pid, descriptor
        self._recent: dict[int, str] = {}  # pid → descriptor of the last flows' owners, the newest last
        # pid and start time → whether it is known to hold its sockets alone
        self._alone: dict[tuple[int, int], bool] = {}
        self._newcomers: OrderedDict[int, float] = OrderedDict()  # when each came, by the monotonic clock
        self._rechecked = self._scanned = self._descriptors = 0

    def close(self) -> None:
        """Give the descriptors back."""
        self._cgroups.close()

    def recheck(self, inode: int) -> Holder | None:
        """The holder of this socket, if it is who owned it before or who opened one of the last flows.

        Only for processes that a full search has found to be the only holder of a socket, and whose parent
        and children do not hold this one; else None, and the answer is in `find_holders`.
        """
        link = f"socket:[{inode}]"
        if known := self._owners.get(inode):
            pid, descriptor = known
            if read_link(f"/proc/{pid}/fd/{descriptor}") == link:
                return self._confirm_alone(pid, descriptor, link)
        for pid, descriptor in reversed(self._recent.items()):
            if read_link(f"/proc/{pid}/fd/{descriptor}") == link:
                return self._confirm_alone(pid, descriptor, link)
        if self._recent:
            pid = next(reversed(self._recent))
            found, _ = search(f"/proc/{pid}/fd", link, GUESSED)
            if found is not None:
                return self._confirm_alone(pid, found, link)
        return None

    def expect(self, pid: int) -> None:
        """A process was born, or runs another program: it may send its first packet and be gone in a moment."""
        self._newcomers[pid] = time.monotonic()
        self._newcomers.move_to_end(pid)
        if len(self._newcomers) > NEWCOMERS:
            self._newcomers.popitem(last=False)

    def newcomer(self, inode: int) -> Holder | None:
        """One of the last newcomers, if it holds this socket now; others may as well, which a search has to find."""
        link = f"socket:[{inode}]"
        since = time.monotonic() - NEWCOMER_S
        for pid, came in reversed(self._newcomers.items()):
            if came < since:
                break
            found, _ = search(f"/proc/{pid}/fd", link, GUESSED)
            if found is not None and (holder := self._confirm(pid, found, link)) is not None:
                return holder
        return None

    def find_holders(self, inode: int, cgroup_id: int | None = None) -> Iterator[Holder | None]:
        """All processes that hold this socket; None now and then, so that the caller can give way.

        Who is content with one may stop at the first. A process born meanwhile is looked at too. Tables that threads
        have for themselves are looked at if nobody else holds it; `scan_all` always does.
        """
        link = f"socket:[{inode}]"
        found: list[Holder] = []
        seen: set[int] = set()
        budget = PAUSE
        for pid in self._candidates(inode, cgroup_id):
            if pid in seen:
                continue
            seen.add(pid)
            descriptor, count = search(f"/proc/{pid}/fd", link)
            self._descriptors += count
            budget -= count + 1
            if descriptor is not None and (holder := self._confirm(pid, descriptor, link)) is not None:
                found.append(holder)
                yield holder
            if budget <= 0:
                budget = PAUSE
                yield None
        if not found:
            for one in self._search_threads(link):
                found += [one] if one is not None else []
                yield one
        self._scanned += 1
        self._remember(inode, found)

    def scan_all(self, inodes: set[int]) -> Iterator[tuple[int, frozenset[tuple[int, int]]] | None]:
        """Who holds each of these sockets, as (pid, start time), found in one pass; None now and then, to give way.

        The sockets come last, each once. Nobody may hold one that is on its way through a unix socket: it is
        held again when it was received. A descriptor that moves during the pass can be missed by it, not by the next.
        """
        holders: dict[int, set[tuple[int, int]]] = {}
        budget = PAUSE
        for pid in self._everybody():
            for found, count in self._held(pid, inodes):
                self._descriptors += count
                budget -= count + 1
                for inode, start_time in found:
                    holders.setdefault(inode, set()).add((pid, start_time))
                if budget <= 0:
                    budget = PAUSE
                    yield None
        self._scanned += 1
        for inode in inodes:
            keys = frozenset(holders.get(inode, ()))
            self._correct(inode, keys)
            yield inode, keys

    def held_of(self, pid: int, inodes: set[int]) -> set[int]:
        """Which of these sockets a process holds.

        Raises:
            KernelError: that cannot be seen: there is no descriptor left to look with.
        """
        return {inode for found, _ in self._held(pid, inodes) for inode, _ in found}

    def known(self, pid: int) -> Process | None:
        """What this pid is, as far as that is known without a look at /proc, else as `read` says.

        Raises:
            KernelError: /proc is not what it should be.
        """
        recalled = self.recall(pid)
        return self.read(pid) if recalled is None else recalled.process

    def read(self, pid: int) -> Process | None:
        """What this pid is now; None when there is no such process.

        Raises:
            KernelError: /proc is not what it should be.
        """
        return read_process(pid, self.keys, self._user_namespace)

    def statistics(self) -> dict[str, int]:
        """Answers from the caches, full searches, descriptors read by these, and the size of the caches."""
        return {
            "rechecked": self._rechecked,
            "scanned": self._scanned,
            "descriptors": self._descriptors,
            "owners": len(self._owners),
        }

    def _candidates(self, inode: int, cgroup_id: int | None) -> Iterator[int]:
        if known := self._owners.get(inode):
            yield known[0]
        if self._recent:
            yield next(reversed(self._recent))
        yield from self._cgroups.members(cgroup_id)
        yield from self._everybody()

    def _everybody(self) -> Iterator[int]:
        before: set[int] = set()
        # Each round looks at who was born during the last; a fork bomb must not keep us for ever.
        for _ in range(3):
            if not (born := set(pids()) - before):
                return
            yield from _newest_first(born)
            before |= born

    def _search_threads(self, link: str) -> Iterator[Holder | None]:
        budget = PAUSE
        for pid in self._everybody():
            budget -= 1
            for table in self._tables_of_threads(pid):
                descriptor, count = search(f"/proc/{pid}/{table}", link)
                self._descriptors += count
                budget -= count
                holder = self._confirm(pid, f"../{table}/{descriptor}", link) if descriptor is not None else None
                if holder is not None:
                    yield holder
                    break
            if budget <= 0:
                budget = PAUSE
                yield None

    def _tables_of_threads(self, pid: int) -> list[str]:
        if (directory := _open(pid)) is None:
            return []
        try:
            return tables_of_threads(directory, pid)
        finally:
            os.close(directory)

    def _held(self, pid: int, inodes: set[int]) -> Iterator[tuple[list[tuple[int, int]], int]]:
        """Sockets that a process holds, each with the start time of the process, and how many descriptors were read."""
        if (directory := _open(pid)) is None:
            return
        try:
            for table in ("fd", *tables_of_threads(directory, pid)):
                for found, count in held(directory, table, inodes):
                    start_time = parse_stat(read_file("stat", directory)).start_time if found else 0
                    yield [(inode, start_time) for inode in found], count
        except OSError:  # it died, and holds nothing any more
            return
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

    def _confirm_alone(self, pid: int, descriptor: str, link: str) -> Holder | None:
        """The holder whose descriptor has just shown `link`, if none of its relatives shows it too."""
        recalled = self.recall(pid)
        # What it is as of before the descriptor was read need not be asked again.
        holder = self._confirm(pid, descriptor, link) if recalled is None else Holder(recalled.process, descriptor)
        if holder is None:
            return None
        if not self._alone.get((pid, holder.process.start_time)):
            return None
        relatives = children(pid) if recalled is None or recalled.has_children else []
        if relatives is None or len(relatives) > RELATIVES:
            return None
        for relative in (holder.process.parent, *relatives):
            if relative and read_link(f"/proc/{relative}/fd/{descriptor}") == link:
                return None
        self._rechecked += 1
        self._remember(int(link[8:-1]), [holder])
        return holder

    def _remember(self, inode: int, found: list[Holder]) -> None:
        alone = len(found) == 1
        for process, descriptor in found:
            # Once seen sharing, always searched for.
            key = (process.pid, process.start_time)
            _store(self._alone, key, alone and self._alone.get(key, True), CACHED)
            if alone:
                _store(self._owners, inode, (process.pid, descriptor), CACHED)
                _store(self._recent, process.pid, descriptor, RECENT)


def _open(pid: int) -> int | None:
    try:
        return os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        refuse_to_guess(error)
        return None


def _newest_first(some: set[int]) -> list[int]:
    """By age, as far as pids tell it: they are given upwards, and then again from below."""
    try:
        last = int(read_file("/proc/loadavg").split()[-1])
    except OSError as error:
        raise KernelError(f"/proc/loadavg: {error.strerror}") from error
    return sorted(some, key=lambda pid: (pid <= last, pid), reverse=True)


def _store(cache: dict[Key, Value], key: Key, value: Value, most: int) -> None:
    cache.pop(key, None)
    if len(cache) >= most:
        del cache[next(iter(cache))]
    cache[key] = value
