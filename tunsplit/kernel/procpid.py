"""What a process is: the files below /proc/PID.

Some facts about them (fs/proc/base.c, fs/d_path.c, kernel/cgroup/cgroup.c):

A descriptor on the directory /proc/PID stays with that process: after its death everything below it
fails with ESRCH, also when the pid has been given to somebody else. So what is read through one
descriptor is about one process. The directory's owner is the process's effective user, live, also for
a process that may not be dumped.

The arguments lie in the process's own memory, where it may write what it likes; a process without a
program shows none. A cgroup's path is told as seen from the reader's cgroup namespace, and holds no line end.
"""

# ruff: noqa: PTH116, PTH208 -- pathlib costs more than the system call, and every first packet waits for these

import os
import stat
import time
from pathlib import Path
from typing import NamedTuple

from tunsplit.errors import KernelError
from tunsplit.process import Executable, FileIdentity, Process

CMDLINE = 4096  # bytes of a command line that are read

DELETED = " (deleted)"  # fs/d_path.c path_with_deleted
PF_KTHREAD = 0x00200000  # linux/sched.h
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


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


def why_no_program(path: str) -> str | None:
    """Return what keeps a path from being a program's, in words that follow the path; None: nothing."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    return f"is a directory (for all that is in it: {path.rstrip('/')}/**)" if stat.S_ISDIR(mode) else "is no file"


def is_script(path: str) -> bool:
    """Whether an interpreter runs when this file is started (execve(2)); False also for what cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False


def resolve(path: str) -> str:
    """The path with its symlinks followed, as far as it exists; one that is being replaced at this moment as it is."""
    try:
        return os.path.realpath(path)
    except OSError:  # a symlink was there, and is none any more
        return path


def tick_ago(seconds: float) -> int:
    """The clock tick since boot, as start times are told in (proc_pid_stat(5)), of so long ago."""
    return int((time.clock_gettime(time.CLOCK_BOOTTIME) - seconds) * TICKS_PER_S)


def last_pid() -> int:
    """The number that was given last to a process or thread.

    Raises:
        KernelError: /proc is not what it should be.
    """
    try:
        return int(read_file("/proc/loadavg").split()[-1])
    except OSError as error:
        raise KernelError(f"/proc/loadavg: {error.strerror}") from error


def pids() -> list[int]:
    """The processes that there are now, in no order.

    Raises:
        KernelError: /proc cannot be read.
    """
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError as error:
        raise KernelError(f"/proc: {error.strerror}") from error


def parse_stat(text: bytes) -> Stat:
    """Read /proc/PID/stat (proc_pid_stat(5)). The name may hold anything, so the last parenthesis ends it.

    Raises:
        ValueError: this is no such line.
    """
    fields = text[text.rindex(b")") + 1 :].split(None, 20)
    if len(fields) < 20:
        raise ValueError(text)
    return Stat(int(fields[1]), bool(int(fields[6]) & PF_KTHREAD), int(fields[19]))


def parse_cmdline(text: bytes) -> str:
    """Read /proc/PID/cmdline: the arguments, joined by spaces.

    They end with a zero byte each; a process that writes there may leave more of them at the end, or none.
    """
    return os.fsdecode(text.rstrip(b"\0").replace(b"\0", b" "))


def parse_cgroup(text: bytes) -> str | None:
    """Read /proc/PID/cgroup (cgroups(7)): the path in cgroup v2; None when the process is in no hierarchy that counts.

    Hosts that run systemd on v1 controllers sort processes in its own hierarchy, and may leave v2 empty.
    """
    unified = systemd = None
    for line in text.split(b"\n"):
        _, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        if line.startswith(b"0::"):
            unified = path
        elif controllers == b"name=systemd":
            systemd = path
    path_bytes = systemd if systemd is not None and unified in (None, b"/") else unified
    return None if path_bytes is None else os.fsdecode(path_bytes)


def read_process(pid: int, keys: frozenset[str], user_namespace: str) -> Process | None:
    """What this pid is now; None when there is no such process.

    Args:
        pid: its number.
        keys: what rules judge by; `cmdline` and `cgroup` are read only if they are among them.
        user_namespace: our own, as /proc/self/ns/user shows it.

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
        stat = parse_stat(read_file("stat", directory))
        executable = None if stat.is_kernel else _executable(directory)
        return Process(
            pid,
            stat.start_time,
            stat.parent,
            os.fstat(directory).st_uid,
            executable,
            stat.is_kernel,
            _user_namespace(directory) == user_namespace,
            _cmdline(directory) if executable is not None and "cmdline" in keys else None,
            _cgroup(directory) if "cgroup" in keys else None,
        )
    except (FileNotFoundError, ProcessLookupError):
        return None
    except (OSError, ValueError) as error:
        raise KernelError(f"/proc/{pid}/stat: {error}") from error
    finally:
        os.close(directory)


def read_file(path: str, directory: int | None = None, most: int = 65536) -> bytes:
    """The beginning of a file of /proc, which is all of it for those that we read whole.

    Raises:
        OSError: ProcessLookupError if the process is gone.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(file, most)
    finally:
        os.close(file)


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


def _user_namespace(directory: int) -> str | None:
    try:
        return os.readlink("ns/user", dir_fd=directory)
    except OSError:
        return None


def _cmdline(directory: int) -> str:
    return parse_cmdline(read_file("cmdline", directory, CMDLINE))


def _cgroup(directory: int) -> str | None:
    try:
        return parse_cgroup(read_file("cgroup", directory))
    except FileNotFoundError:  # a kernel without cgroups; of a process that is gone the error is another
        return None
