"""Tables of descriptors: /proc/PID/fd, and those that threads have for themselves.

Some facts about them (fs/proc/fd.c, kernel/kcmp.c, kernel/fork.c):

/proc/PID/fd shows the table of the thread group's leader. A thread that called unshare(CLONE_FILES), or was made
without CLONE_FILES, has one of its own, which shows under /proc/PID/task/TID/fd only; when the leader has
ended, all do. kcmp() tells in 1 µs whether two threads share a table; the link count of /proc/PID/task how many
threads there are, and most processes have one.

The children of a process hang on the thread that forked them: /proc/PID/task/TID/children.

A descriptor on its way through a unix socket is in nobody's table until it is received.
"""

# ruff: noqa: PTH116, PTH208 -- pathlib costs more than the system call, and this is the dear part

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Container, Iterator

from tunsplit.errors import KernelError

CHUNK = 100  # descriptors read before the caller may give way
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


def search(path: str, link: str, most: int | None = None) -> tuple[str | None, int]:
    """The descriptor in this table that shows `link`, and how many were read; only the `most` highest."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        refuse_to_guess(error)
        return None, 0
    count = 0
    try:
        for name in reversed(os.listdir(directory)):
            if count == most:
                break
            count += 1
            if read_link(name, directory) == link:
                return name, count
    except OSError:  # gone while we looked
        return None, count
    finally:
        os.close(directory)
    return None, count


def held(process: int, table: str, inodes: Container[int]) -> Iterator[tuple[list[int], int]]:
    """Which of these sockets a table shows: some of them, and how many descriptors were read for that, and so on.

    Args:
        process: a descriptor on /proc/PID.
        table: the table's path in there.
        inodes: of the sockets.
    """
    try:
        directory = os.open(table, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)
    except OSError as error:
        refuse_to_guess(error)
        return
    try:
        names = os.listdir(directory)
        for first in range(0, len(names), CHUNK):
            chunk = names[first : first + CHUNK]
            shown = [link for name in chunk if (link := read_link(name, directory)) is not None]
            sockets = [int(link[8:-1]) for link in shown if link.startswith("socket:[")]
            yield [inode for inode in sockets if inode in inodes], len(chunk)
    except OSError:  # gone while we looked
        return
    finally:
        os.close(directory)


def tables_of_threads(process: int, pid: int) -> list[str]:
    """Paths, from /proc/PID, of the tables that threads of this process have for themselves.

    Args:
        process: a descriptor on /proc/PID.
        pid: its number.
    """
    try:
        if os.stat("task", dir_fd=process).st_nlink <= 3:  # ".", "..", and one thread
            return []
        task = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)
        try:
            threads = [int(name) for name in os.listdir(task)]
        finally:
            os.close(task)
    except OSError as error:
        refuse_to_guess(error)
        return []
    return [f"task/{thread}/fd" for thread in threads if thread != pid and not _share_table(pid, thread)]


def children(pid: int) -> list[int] | None:
    """Children of a process, of its first `THREADS` threads; None when there is no telling.

    That is when the process is gone, or the kernel lacks CONFIG_PROC_CHILDREN.
    """
    task = f"/proc/{pid}/task"
    try:
        threads = [str(pid)] if os.stat(task).st_nlink <= 3 else os.listdir(task)[:THREADS]
        return [int(child) for thread in threads for child in _read(f"{task}/{thread}/children").split()]
    except OSError:
        return None


def _share_table(one: int, other: int) -> bool:
    """Whether two threads have one table; False where there is no telling."""
    return NUMBER is not None and libc.syscall(NUMBER, one, other, KCMP_FILES, 0, 0) == 0


def _read(path: str) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 65536)
    finally:
        os.close(file)
