"""The processes of a cgroup, by the number that sock_diag gives: a hint where to look first for a socket's holder.

Some facts about cgroup v2 (kernel/cgroup/cgroup.c, fs/kernfs/mount.c):

A cgroup's id is the inode of its directory, and that id is a file handle: open_by_handle_at() opens the
directory, with no walk over the tree. It needs CAP_DAC_READ_SEARCH and any descriptor on the cgroup2
mount. On hybrid hosts cgroup2 lies at /sys/fs/cgroup/unified; under `ip netns exec` /sys is a fresh
mount without cgroups, so there we make a mount that hangs in no directory (fsmount; CAP_SYS_ADMIN)
and goes with its descriptor.
"""

import contextlib
import ctypes
import os
from pathlib import Path
from struct import Struct

# linux/exportfs.h: handle length · type FILEID_KERNFS · id
pack_handle = Struct("=IiQ").pack
FILEID_KERNFS = 0xFE
KERNFS_ID_SIZE = 8

# The same numbers on all architectures that Debian and Ubuntu build for.
SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_CMD_CREATE = 6

MOST_BYTES = 65536  # of a cgroup.procs: enough for 9,000 pids, and those beyond are found otherwise

libc = ctypes.CDLL(None, use_errno=True)


class Cgroups:
    """Members of cgroups. Without cgroup v2, or without the right to it, no cgroup has any."""

    def __init__(self) -> None:
        self._mount: int | None = None
        self._root = 0
        with contextlib.suppress(OSError):  # a hint only: without it the search takes longer
            self._mount = _open_mounted() or _mount_detached()
            self._root = os.fstat(self._mount).st_ino

    def close(self) -> None:
        """Give the mount's descriptor back."""
        if self._mount is not None:
            os.close(self._mount)
            self._mount = None

    def members(self, cgroup_id: int | None) -> list[int]:
        """The pids in this cgroup; none for the root, which holds everybody that nobody sorted."""
        if cgroup_id is None or self._mount is None or cgroup_id == self._root:
            return []
        handle = pack_handle(KERNFS_ID_SIZE, FILEID_KERNFS, cgroup_id)
        directory = libc.open_by_handle_at(self._mount, handle, os.O_RDONLY | os.O_CLOEXEC)
        if directory < 0:  # ESTALE: the cgroup is gone; EPERM: not ours to open
            return []
        try:
            procs = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
            try:
                text = os.read(procs, MOST_BYTES)
            finally:
                os.close(procs)
        except OSError:  # ENODEV: removed meanwhile; EOPNOTSUPP: a threaded cgroup lists no processes
            return []
        finally:
            os.close(directory)
        # 0: a process of a pid namespace beside ours. The last pid may be cut where the buffer ended.
        whole = text[: text.rfind(b"\n") + 1]
        return [int(pid) for pid in whole.split() if pid != b"0"]


def _open_mounted() -> int | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if filesystem.startswith("cgroup2 "):
            # A blank in a path is written \040, so the fifth word is the whole mount point.
            point = mount.split()[4].encode().decode("unicode_escape")
            return os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return None


def _mount_detached() -> int:
    context = _call(SYS_FSOPEN, b"cgroup2", FSOPEN_CLOEXEC)
    try:
        _call(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _call(SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        # What fsmount() gives names a place only (O_PATH), and open_by_handle_at() wants an open directory.
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)


def _call(number: int, *arguments: object) -> int:
    result: int = libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
