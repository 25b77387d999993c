"""What is known of a process: plain values that kernel/ reads and engine/ judges."""

from typing import NamedTuple


class FileIdentity(NamedTuple):
    """A file, whatever it is called. The owner guards against an inode number given again to another user's file."""

    device: int
    inode: int
    owner: int  # uid


class Executable(NamedTuple):
    """The program of a process, by name and as the file that it is."""

    path: str  # without the kernel's " (deleted)"
    deleted: bool
    identity: FileIdentity  # what really runs
    path_identity: FileIdentity | None  # what lies at `path` in our own mount namespace


class Process(NamedTuple):
    """A process as it was when looked at; the same one for as long as pid and start time are the same."""

    pid: int
    start_time: int  # clock ticks since boot
    parent: int  # pid; 0: none that we can see
    uid: int  # effective
    executable: Executable | None  # None: a kernel thread, a zombie, or not ours to know
    is_kernel: bool = False
    is_own_user_namespace: bool = True  # elsewhere the program's path can be forged
    # Read only if some rule asks; both may change without an exec, the first at the process's own wish.
    cmdline: str | None = None  # arguments joined by spaces, their first 4 KiB; None: not asked for, or no program
    cgroup: str | None = None  # path as seen from our own cgroup namespace; None: not asked for, or no cgroups
