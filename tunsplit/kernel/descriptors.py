"""Tables of descriptors: /proc/PID/fd, and those that threads have for themselves.

Some facts about them (fs/proc/fd.c, kernel/kcmp.c, kernel/fork.c):

/proc/PID/fd shows the table of the thread group's leader. A thread that called unshare(CLONE_FILES), or was made
without CLONE_FILES, has one of its own, which shows under /proc/PID/task/TID/fd only; when the leader has
ended, all do. kcmp() tells in 1 µs whether two threads share a table; the link count of /proc/PID/task how many
threads there are, and most processes have one.

The children of a process hang on the thread that forked them: /proc/PID/task/TID/children.

A table is listed upwards, from wherever a seek leads to: position 2 is descriptor 0. To list many costs as much as to
read where they lead, and a table may have a million, so it is listed piece by piece; but no piece is smaller than a
thousand. The size of the directory is the number of descriptors (since Linux 6.2; 0 before).

A descriptor on its way through a unix socket is in nobody's table until it is received.

What holds a tun device shows the device's name in /proc/PID/fdinfo (drivers/net/tun.c, tun_chr_show_fdinfo).
"""

# ruff: noqa: PTH116, PTH208 -- pathlib costs more than the system call, and this is the dear part

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterator
from itertools import islice

from tunsplit.errors import KernelError

CHUNK = 100  # descriptors read before the caller may give way
GUESSED = 64  # descriptors that `search` looks at
DENSE = 4 * GUESSED  # in a table of more descriptors their numbers are guessed, not listed
DOTS = 2  # "." and "..": the first entries of a directory, and links to it beside those from its subdirectories
THREADS = 8  # whose children are asked for; a program with more is left to the next full pass

KCMP_FILES = 2  # linux/kcmp.h
# Of 64-bit programs; elsewhere each thread's table is read.
SYS_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "ppc64le": 354, "s390x": 343}
NUMBER = SYS_KCMP.get(platform.machine()) if sys.maxsize > 2**32 else None

libc = ctypes.CDLL(None, use_errno=True)


def read_link(path: str, directory: int | None = None) -> str | None:
    """Where a link of /proc leads; None when it is gone, or not ours to see."""
    try:
        return os.readlink(path, dir_fd=directory)
    except OSError:
        return None


def refuse_to_guess(error: OSError) -> None:
    """Let an error pass that says that a process is gone, or not ours to see: then it holds nothing for us.

    Raises:
        KernelError: there is no room to look with, so nobody knows what it holds.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise KernelError(f"holders of sockets cannot be seen: {error.strerror}") from error


def search(path: str, link: str, near: int = 0) -> str | None:
    """The descriptor in this table that shows `link`; only `GUESSED` are looked at, those that follow `near` first."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        refuse_to_guess(error)
        return None
    try:
        if os.fstat(directory).st_size > DENSE:
            below = max(0, near - GUESSED // 4)
            names = map(str, (*range(near, below + GUESSED), *range(below, near)))
            return next((name for name in names if read_link(name, directory) == link), None)
        os.lseek(directory, max(0, near - GUESSED // 4) + DOTS, os.SEEK_SET)
        with os.scandir(directory) as entries:
            return next((one.name for one in islice(entries, GUESSED) if read_link(one.name, directory) == link), None)
    except OSError as error:  # gone while we looked
        refuse_to_guess(error)
        return None
    finally:
        os.close(directory)


def sockets(process: int, table: str) -> Iterator[tuple[list[tuple[int, str]], int]]:
    """The sockets that a table shows, piece by piece: inodes with descriptors, and how many of these were read.

    Args:
        process: a descriptor on /proc/PID.
        table: the table's path in there.

    Raises:
        KernelError: there is no room to look with.
    """
    try:
        directory = os.open(table, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)
    except OSError as error:
        refuse_to_guess(error)
        return
    try:
        with os.scandir(directory) as entries:
            while names := [one.name for one in islice(entries, CHUNK)]:
                shown = [(link, name) for name in names if (link := read_link(name, directory)) is not None]
                yield [(int(link[8:-1]), name) for link, name in shown if link.startswith("socket:[")], len(names)
    except OSError as error:  # gone while we looked
        refuse_to_guess(error)
        return
    finally:
        os.close(directory)


def holds_tun(pid: int, device: str) -> bool:
    """Whether a process reads and writes the packets of this tun device; False also where that is not ours to see.

    Raises:
        KernelError: there is no room to look with.
    """
    shown = f"iff:\t{device}\n".encode()
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            link = read_link(f"/proc/{pid}/fd/{name}")
            if link is not None and link.endswith("/tun") and shown in _read(f"/proc/{pid}/fdinfo/{name}"):
                return True
    except OSError as error:
        refuse_to_guess(error)
    return False


def closes_on_exec(process: int, path: str) -> bool:
    """Whether a descriptor goes when another program is run; False also where that cannot be seen.

    Args:
        process: a descriptor on /proc/PID.
        path: the descriptor's file in fdinfo, from there.
    """
    try:
        shown = _read(path, process)
        return bool(int(shown.partition(b"flags:")[2].split(None, 1)[0], 8) & os.O_CLOEXEC)
    except (OSError, IndexError, ValueError):
        return False


def threads(process: int, pid: int) -> list[int]:
    """The threads of a process, itself among them.

    Args:
        process: a descriptor on /proc/PID.
        pid: its number.

    Raises:
        OSError: it is gone, or there is no room to look with.
    """
    if os.stat("task", dir_fd=process).st_nlink <= DOTS + 1:
        return [pid]
    task = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)
    try:
        return [int(name) for name in os.listdir(task)]
    finally:
        os.close(task)


def tables_of_threads(process: int, pid: int) -> list[str]:
    """Paths, from /proc/PID, of the tables that threads of this process have for themselves.

    Args:
        process: a descriptor on /proc/PID.
        pid: its number.
    """
    try:
        return [f"task/{one}/fd" for one in threads(process, pid) if one != pid and share_table(pid, one) is not True]
    except OSError as error:
        refuse_to_guess(error)
        return []


def children(pid: int) -> list[int] | None:
    """Children of a process, of its first `THREADS` threads; None when there is no telling.

    That is when the process is gone, or the kernel lacks CONFIG_PROC_CHILDREN.
    """
    task = f"/proc/{pid}/task"
    try:
        some = [str(pid)] if os.stat(task).st_nlink <= DOTS + 1 else os.listdir(task)[:THREADS]
        return [int(child) for thread in some for child in _read(f"{task}/{thread}/children").split()]
    except OSError:
        return None


def share_table(one: int, other: int) -> bool | None:
    """Whether two threads, of one process or not, have one table; None where there is no telling.

    One that is not ours to see is as if it were none.
    """
    found = NUMBER and libc.syscall(NUMBER, one, other, KCMP_FILES, 0, 0)
    if found is None or found < 0:
        return False if found is not None and ctypes.get_errno() == errno.EPERM else None
    return not found


def _read(path: str, directory: int | None = None) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(file, 65536)
    finally:
        os.close(file)
