"""Which process holds a socket, and what that process is: /proc/PID.

Some facts about /proc (fs/proc/base.c, fs/proc/fd.c):

A descriptor on the directory /proc/PID stays with that process: after its death everything below it
fails with ESRCH, also when the pid has been given to somebody else. So what is read through one
descriptor is about one process. The directory's owner is the process's effective user, live, also for
a process that may not be dumped.

To find the holder of an inode means to read the links in /proc/PID/fd of process after process, at
2.5 µs each: 30 ms for 12,000. So first comes whoever held it, or was the last to open a flow, then its
cgroup, then the youngest processes. A socket that is shared (by fork, or sent over a unix socket)
shows under every holder; fork keeps its number, exec keeps the holder and changes the program. A holder
is asked for its program before its descriptor is looked at once more: if the socket is still there then,
the program that was read did hold it.
"""

# ruff: noqa: PTH115, PTH116, PTH208 -- pathlib costs more than the system call, and this is the dear part

import os
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from tunsplit.errors import KernelError
from tunsplit.kernel.cgroup import Cgroups
from tunsplit.process import Executable, FileIdentity, Process

PAUSE = 200  # descriptors read before the event loop gets its turn: 0.5 ms
CACHED = 4096  # entries of each cache
RECENT = 8  # owners of the last flows whose next socket is guessed at
GUESSED = 64  # descriptors of the last owner, newest first, that a recheck looks at
RELATIVES = 32  # children whose descriptor a recheck compares
GENERATIONS = 256  # ancestors followed: no session is that deep

DELETED = " (deleted)"  # fs/d_path.c path_with_deleted
PF_KTHREAD = 0x00200000  # linux/sched.h

# Stands for an ancestor that died before it could be read: what it was, nobody will know.
UNKNOWN = Process(0, 0, 0, 0, None)

Key = TypeVar("Key")
Value = TypeVar("Value")


class Holder(NamedTuple):
    """A process, and the descriptor that it holds the socket by."""

    process: Process
    descriptor: str


class Stat(NamedTuple):
    """What is used of /proc/PID/stat."""

    parent: int
    is_kernel: bool
    start_time: int


def identify(path: str) -> FileIdentity | None:
    """The file at this path, symlinks followed, in our own mount namespace; None when there is none to be seen."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte in the path
        return None
    return FileIdentity(status.st_dev, status.st_ino, status.st_uid)


def resolve(path: str) -> str:
    """The path with its symlinks followed, as far as it exists."""
    return os.path.realpath(path)


def parse_stat(text: bytes) -> Stat:
    """Read /proc/PID/stat (proc_pid_stat(5)). The name may hold anything, so the last parenthesis ends it.

    Raises:
        ValueError: this is no such line.
    """
    fields = text[text.rindex(b")") + 1 :].split(None, 20)
    if len(fields) < 20:
        raise ValueError(text)
    return Stat(int(fields[1]), bool(int(fields[6]) & PF_KTHREAD), int(fields[19]))


class Processes:
    """Holders of sockets and ancestors of processes, with what is known of them from before.

    Invariant: what a cache holds is a guess, confirmed by /proc before it is told to anybody.
    """

    def __init__(self) -> None:
        self._cgroups = Cgroups()
        self._user_namespace = os.readlink("/proc/self/ns/user")
        self._owners: dict[int, tuple[int, str]] = {}  # inode → pid, descriptor
        self._recent: dict[int, str] = {}  # pid → descriptor of the last flows' owners, the newest last
        # pid and start time → whether it is known to hold its sockets alone
        self._alone: dict[tuple[int, int], bool] = {}
        self._ancestors: dict[tuple[int, int], tuple[Process, ...]] = {}
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
            if _link(f"/proc/{pid}/fd/{descriptor}") == link:
                return self._confirm_alone(pid, descriptor, link)
        for pid, descriptor in reversed(self._recent.items()):
            if _link(f"/proc/{pid}/fd/{descriptor}") == link:
                return self._confirm_alone(pid, descriptor, link)
        if self._recent:
            pid = next(reversed(self._recent))
            found, _ = _search(pid, link, GUESSED)
            if found is not None:
                return self._confirm_alone(pid, found, link)
        return None

    def find_holders(self, inode: int, cgroup_id: int | None = None) -> Iterator[Holder | None]:
        """All processes that hold this socket; None now and then, so that the caller can give way.

        Who is content with one may stop at the first. A process born meanwhile is looked at too.
        """
        link = f"socket:[{inode}]"
        found: list[Holder] = []
        seen: set[int] = set()
        budget = PAUSE
        for pid in self._candidates(inode, cgroup_id):
            if pid in seen:
                continue
            seen.add(pid)
            descriptor, count = _search(pid, link)
            self._descriptors += count
            budget -= count + 1
            if descriptor is not None and (holder := self._confirm(pid, descriptor, link)) is not None:
                found.append(holder)
                yield holder
            if budget <= 0:
                budget = PAUSE
                yield None
        self._scanned += 1
        self._remember(inode, found)

    def ancestors(self, process: Process) -> tuple[Process, ...]:
        """Parent first, as they were when this process was first asked for; programs as they are now.

        A dead ancestor stays in the line: its orphans are still its children.
        """
        key = (process.pid, process.start_time)
        known = self._ancestors.get(key)
        line = self._walk(process) if known is None else tuple([self._refresh(ancestor) for ancestor in known])
        _store(self._ancestors, key, line, CACHED)
        return line

    def read(self, pid: int) -> Process | None:
        """What this pid is now; None when there is no such process.

        Raises:
            KernelError: /proc is not what it should be.
        """
        try:
            directory = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise KernelError(f"/proc/{pid}: {error.strerror}") from error
        try:
            stat = parse_stat(_read("stat", directory))
            uid = os.fstat(directory).st_uid
            return Process(
                pid,
                stat.start_time,
                stat.parent,
                uid,
                None if stat.is_kernel else _executable(directory),
                stat.is_kernel,
                self._shares_user_namespace(directory),
            )
        except (FileNotFoundError, ProcessLookupError):
            return None
        except (OSError, ValueError) as error:
            raise KernelError(f"/proc/{pid}/stat: {error}") from error
        finally:
            os.close(directory)

    def statistics(self) -> dict[str, int]:
        """Answers from the caches, full searches, descriptors read by these, and the size of the caches."""
        return {
            "rechecked": self._rechecked,
            "scanned": self._scanned,
            "descriptors": self._descriptors,
            "owners": len(self._owners),
            "ancestors": len(self._ancestors),
        }

    def _candidates(self, inode: int, cgroup_id: int | None) -> Iterator[int]:
        if known := self._owners.get(inode):
            yield known[0]
        if self._recent:
            yield next(reversed(self._recent))
        yield from self._cgroups.members(cgroup_id)
        before: set[int] = set()
        # Each round looks at who was born during the last; a fork bomb must not keep us for ever.
        for _ in range(3):
            pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
            if not (born := pids - before):
                return
            yield from _newest_first(born)
            before |= pids

    def _confirm(self, pid: int, descriptor: str, link: str) -> Holder | None:
        process = self.read(pid)
        if process is None or _link(f"/proc/{pid}/fd/{descriptor}") != link:
            return None
        return Holder(process, descriptor)

    def _confirm_alone(self, pid: int, descriptor: str, link: str) -> Holder | None:
        holder = self._confirm(pid, descriptor, link)
        if holder is None:
            return None
        if not self._alone.get((pid, holder.process.start_time)):
            return None
        relatives = _children(pid)
        if len(relatives) > RELATIVES:
            return None
        for relative in (holder.process.parent, *relatives):
            if _link(f"/proc/{relative}/fd/{descriptor}") == link:
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

    def _walk(self, process: Process) -> tuple[Process, ...]:
        line: list[Process] = []
        child: Process | None = process
        while child is not None and child.parent and len(line) < GENERATIONS:
            ancestor = self.read(child.parent)
            if ancestor is not None and ancestor.start_time <= child.start_time:
                line.append(ancestor)
                child = ancestor
                continue
            # The parent died meanwhile (a younger process has its pid), and the child has another one now.
            child = self._again(child)
            if child is None:
                line.append(UNKNOWN)
        return tuple(line)

    def _again(self, process: Process) -> Process | None:
        now = self.read(process.pid)
        return now if now is not None and now.start_time == process.start_time else None

    def _refresh(self, ancestor: Process) -> Process:
        if ancestor.executable is None:
            return ancestor
        shown = ancestor.executable.path + (DELETED if ancestor.executable.deleted else "")
        if _link(f"/proc/{ancestor.pid}/exe") in (shown, None):
            return ancestor
        return self._again(ancestor) or ancestor

    def _shares_user_namespace(self, directory: int) -> bool:
        try:
            return os.readlink("ns/user", dir_fd=directory) == self._user_namespace
        except OSError:
            return False


def _executable(directory: int) -> Executable | None:
    try:
        while True:
            path = os.readlink("exe", dir_fd=directory)
            status = os.stat("exe", dir_fd=directory)
            identity = FileIdentity(status.st_dev, status.st_ino, status.st_uid)
            path_identity = identify(path)
            if identity == path_identity:  # also of a file that is really called "… (deleted)"
                return Executable(path, deleted=False, identity=identity, path_identity=path_identity)
            if os.readlink("exe", dir_fd=directory) == path:  # else exec came between
                break
    except OSError:  # ENOENT: a zombie; EACCES: not ours to know. Neither matches a rule.
        return None
    if not path.endswith(DELETED):
        return Executable(path, deleted=False, identity=identity, path_identity=path_identity)
    path = path.removesuffix(DELETED)
    return Executable(path, deleted=True, identity=identity, path_identity=identify(path))


def _search(pid: int, link: str, most: int | None = None) -> tuple[str | None, int]:
    """The descriptor of this process that shows `link`, and how many were read; only the `most` highest."""
    try:
        directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # gone, or not ours to see: then nobody finds it there
        return None, 0
    count = 0
    try:
        for name in reversed(os.listdir(directory)):
            if count == most:
                break
            count += 1
            if _link(name, directory) == link:
                return name, count
    except OSError:  # gone while we looked
        return None, count
    finally:
        os.close(directory)
    return None, count


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]
    except OSError:  # gone; or no CONFIG_PROC_CHILDREN, and anybody may be a parent: too many to look at
        return [0] * (RELATIVES + 1)


def _newest_first(pids: set[int]) -> list[int]:
    """By age, as far as pids tell it: they are given upwards, and then again from below."""
    last = int(_read("/proc/loadavg").split()[-1])
    return sorted(pids, key=lambda pid: (pid <= last, pid), reverse=True)


def _link(path: str, directory: int | None = None) -> str | None:
    try:
        return os.readlink(path, dir_fd=directory)
    except OSError:
        return None


def _read(path: str, directory: int | None = None) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(file, 65536)
    finally:
        os.close(file)


def _store(cache: dict[Key, Value], key: Key, value: Value, most: int) -> None:
    cache.pop(key, None)
    if len(cache) >= most:
        del cache[next(iter(cache))]
    cache[key] = value
