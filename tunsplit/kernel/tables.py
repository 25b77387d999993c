"""Which sockets each process shows, remembered for as long as it has not run since.

Some facts about that (kernel/sched/stats.h sched_info_arrive, fs/proc/base.c proc_pid_schedstat, kernel/sched/core.c
get_wchan and try_to_wake_up), tested in tests/facts/:

A table of descriptors is changed by threads that have it, and by nobody else: who is sent a descriptor puts it there
himself when he receives it, and so does who is given one by a supervisor (seccomp_unotify(2)), or by a tracer.

The third number of /proc/PID/task/TID/schedstat counts how often a thread has got onto a processor. While it is the
same, the thread has been on it, or off it, all the time. That it is off, the state in /proc/PID/stat does not tell: a
thread calls itself sleeping before it makes sure that it has to sleep, and may not. But wchan names a function only
while the thread is in no run queue, and from there it must be counted before it does anything. So: first the count,
then wchan, then the table. An equal count later means that this is still the table.

A new thread comes from one that runs. Threads are listed once more after all have been seen off, so that none that
was made meanwhile is missed.

A process that shares its table with its parent (clone(2), CLONE_FILES without CLONE_THREAD) changes it for both. It is
never remembered, and whoever reads it reads its parent again. Threads of the kernel have a common table, and no sockets
in it.

Some processes have thousands of descriptors and never rest. While their tables were read lately they are known well
enough to look elsewhere first.

What nobody showed when all were read last, somebody has got since. That can be told as long as everybody's table is
remembered: who lives, and whose is not, is in `_blind`.

A descriptor on schedstat reads in 1 µs, and not at all (ESRCH) when the thread has ended, whoever has its number then.
Each keeps a page in the kernel.
"""

import os
import resource
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tunsplit.kernel import descriptors
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.procpid import Stat, parse_stat, read_file

MOST_FILES = 4096  # kept open
MOST_THREADS = 256  # of a process that is remembered
MOST_SOCKETS = 65536  # remembered, of all processes
MOST_SOCKETS_OF_ONE = 16384
LARGE = 256  # descriptors: 0.7 ms to read
LATELY_S = 5.0

SCHEDSTAT = "schedstat"
LONGEST = 64  # octets of a line of schedstat: three numbers of 20 digits at most
NEVER_RUN = b" 0\n"  # how it ends where the kernel does not count: who sleeps has run


class Table(NamedTuple):
    """What a process shows."""

    start_time: int
    sockets: dict[int, str]  # inode → a descriptor's path from /proc/PID/fd
    shared_with: int | None = None  # its parent, which now shows the same, and may not have when it was read


@dataclass(slots=True)
class _Remembered:
    files: dict[int, int] = field(default_factory=dict)  # of each thread, open on schedstat
    runs: dict[int, bytes] | None = None  # what it said of each thread before the table was read; None: not all slept
    table: Table | None = None
    descriptors: int = 0  # in the table
    read_at: float = 0.0


class Tables(Closing):
    """The tables of all processes, as they were read last."""

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_files = min(MOST_FILES, soft // 4)
        self._known: dict[int, _Remembered] = {}
        self._blind: set[int] = set()
        self._files = self._sockets = 0

    def close(self) -> None:
        """Forget everything, and give the descriptors back."""
        self.retain(())

    def retain(self, pids: Container[int]) -> None:
        """Forget whoever is not among these."""
        for pid in [pid for pid in self._known if pid not in pids]:
            self._forget(pid)
        self._blind = {pid for pid in self._blind if pid in pids}

    def unchanged(self, pid: int) -> Table | None:
        """What a process showed when it was read, if it must still be that; None: read it."""
        known = self._known.get(pid)
        if known is None or known.runs is None:
            return None
        try:
            for thread, file in known.files.items():
                if os.pread(file, LONGEST, 0) != known.runs[thread]:
                    return None
        except OSError:  # it has ended, or that thread has
            self._forget(pid)
            return None
        return known.table

    def last(self, pid: int) -> Table | None:
        """What a process showed when it was last read, whatever it has done since; None: that is not remembered."""
        known = self._known.get(pid)
        return None if known is None else known.table

    def is_new(self, inode: int) -> bool:
        """Whether nobody showed this socket when he was last read; False also if somebody is not remembered."""
        if self._blind:
            return False
        return not any(known.table is not None and inode in known.table.sockets for known in self._known.values())

    def lately(self, pid: int) -> Table | None:
        """What a process with a large table showed in the last `LATELY_S`, which may have changed; None: read it."""
        known = self._known.get(pid)
        if known is None or known.descriptors < LARGE or known.read_at + LATELY_S < time.monotonic():
            return None
        try:
            os.pread(known.files[pid], LONGEST, 0)
        except (OSError, KeyError):  # it has ended, and somebody else may have its number
            self._forget(pid)
            return None
        return known.table

    def read(self, pid: int, inodes: Container[int]) -> Iterator[tuple[int, Table | None]]:
        """Read what a process shows: how many descriptors were read, again and again, and with the last the table.

        Of more than `MOST_SOCKETS_OF_ONE` sockets only those in `inodes` are told. Nothing of a process that is gone.

        Raises:
            KernelError: there is no room to look with.
        """
        if (directory := open_process(pid)) is None:
            self._blind.discard(pid)
            return
        try:
            stat = parse_stat(read_file("stat", directory))
            shared_with = self._shared_with(pid, stat)
            runs = self._asleep(pid, directory) if shared_with is None else None
            sockets: dict[int, str] = {}
            complete, total = True, 0
            for path in ("fd", *descriptors.tables_of_threads(directory, pid)):
                prefix = "" if path == "fd" else f"../{path}/"
                for shown, count in descriptors.sockets(directory, path):
                    for inode, name in shown:
                        if len(sockets) < MOST_SOCKETS_OF_ONE or inode in inodes:
                            sockets[inode] = prefix + name
                    complete = complete and len(sockets) < MOST_SOCKETS_OF_ONE
                    total += count
                    yield count, None
            table = Table(stat.start_time, sockets, shared_with)
            if complete and shared_with is None:
                self._keep(pid, runs, table, total)
            else:
                self._set(pid, None)
            yield 0, table
        except OSError as error:  # it has ended, and holds nothing any more
            descriptors.refuse_to_guess(error)
            self._blind.discard(pid)
        finally:
            os.close(directory)

    def statistics(self) -> dict[str, int]:
        """How many processes are remembered, with how many sockets, and the descriptors that it takes."""
        tables = sum(known.table is not None for known in self._known.values())
        return {"tables": tables, "table_sockets": self._sockets, "table_files": self._files}

    def _shared_with(self, pid: int, stat: Stat) -> int | None:
        """The parent, if both have one table or nobody can tell."""
        if stat.is_kernel or not stat.parent or descriptors.share_table(pid, stat.parent) is False:
            return None
        self._forget(pid)
        self._set(stat.parent, None)
        return stat.parent

    def _asleep(self, pid: int, directory: int) -> dict[int, bytes] | None:
        """What schedstat says of each thread, if all are off now: what is read next is good until it says otherwise."""
        try:
            threads = descriptors.threads(directory, pid)
            known = self._watch(pid, directory, threads)
            if known is None:
                return None
            runs = {thread: os.pread(file, LONGEST, 0) for thread, file in known.files.items()}
            asleep = (
                not any(run.endswith(NEVER_RUN) for run in runs.values())
                and all(_is_off(directory, thread) for thread in threads)
                and descriptors.threads(directory, pid) == threads
            )
        except OSError:  # a thread has ended, or the kernel has no such file
            self._forget(pid)
            return None
        return runs if asleep else None

    def _watch(self, pid: int, directory: int, threads: list[int]) -> _Remembered | None:
        """What is known of a process, its schedstat open for each of these threads; None: there is no room."""
        known = self._known.setdefault(pid, _Remembered())
        for thread in known.files.keys() - threads:
            os.close(known.files.pop(thread))
            self._files -= 1
        new = [thread for thread in threads if thread not in known.files]
        if len(threads) > MOST_THREADS or self._files + len(new) > self._most_files:
            self._forget(pid)
            return None
        for thread in new:
            path = f"task/{thread}/{SCHEDSTAT}"
            known.files[thread] = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
            self._files += 1
        return known

    def _keep(self, pid: int, runs: dict[int, bytes] | None, table: Table, total: int) -> None:
        self._set(pid, table)
        known = self._known.get(pid)
        # Others may have read the process meanwhile, and have found other threads.
        if known is not None and known.table is not None:
            known.runs = runs if runs is not None and runs.keys() == known.files.keys() else None
            known.descriptors, known.read_at = total, time.monotonic()

    def _set(self, pid: int, table: Table | None) -> None:
        known = self._known.get(pid)
        self._blind.add(pid)
        if known is None:
            return
        self._sockets -= len(known.table.sockets) if known.table is not None else 0
        room = table is not None and self._sockets + len(table.sockets) <= MOST_SOCKETS
        known.table = table if room else None
        known.runs, known.descriptors = None, 0
        if known.table is not None:
            self._blind.discard(pid)
            self._sockets += len(known.table.sockets)

    def _forget(self, pid: int) -> None:
        self._set(pid, None)
        if (known := self._known.pop(pid, None)) is not None:
            for file in known.files.values():
                os.close(file)
            self._files -= len(known.files)


def open_process(pid: int) -> int | None:
    """A descriptor on /proc/PID; None when there is no such process, or it is not ours to see.

    Raises:
        KernelError: there is no descriptor left.
    """
    try:
        return os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        descriptors.refuse_to_guess(error)
        return None


def _is_off(directory: int, thread: int) -> bool:
    return read_file(f"task/{thread}/wchan", directory, LONGEST) not in (b"", b"0")
