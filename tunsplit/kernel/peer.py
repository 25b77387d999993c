"""Who is at the other end of a unix stream socket, and that he still is who he was.

Some facts about unix sockets and pids:

- SO_PEERCRED and SO_PEERGROUPS tell who called connect(2), as he was then (net/unix/af_unix.c, copy_peercred): not who
  writes now. The descriptor may have been passed on or inherited, the caller may have exec'ed another program, have
  died, and his pid may be a stranger's by now.
- SO_PEERPIDFD (Linux 6.5) gives a pidfd of exactly the process that connected, whose number is never given again
  while the socket lives. /proc/self/fdinfo tells its pid: -1 once it is dead and waited for, 0 outside our pid
  namespace (fs/pidfs.c, pidfd_show_fdinfo). Asked for a process that has been waited for, older kernels fail with
  ESRCH or EINVAL (net/core/sock.c), newer ones give such a pidfd.
- A descriptor of the directory /proc/PID belongs to one process: once that is gone, reads below it fail with ESRCH or
  ENOENT, also when the pid has been given again (fs/proc/base.c, get_proc_task). So what is read through one
  descriptor is of one process.
- A pid is one process's from birth to death. Who has had it since before connect(2) is he who connected.

Without SO_PEERPIDFD the last fact is what proof there is: his start time is read when the connection is accepted, and
again when it matters. A process that took the pid over between connect(2) and accept(2) would pass, so he must also
have the ids that connected: whoever wins that race names a process of his own, which he may do anyway.
"""

import errno
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple, Protocol

from tunsplit.errors import PermissionMissing
from tunsplit.kernel.procpid import parse_stat

# asm-generic/socket.h
SO_PEERGROUPS = 59
SO_PEERPIDFD = 77
MAX_GROUPS_SIZE = 1024  # bytes: the most that Python asks for, 256 groups

UNPROVED = "the daemon cannot prove which process asks: {}"


class Connection(Protocol):
    """An accepted unix socket, of Python or of a library around it."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """Return an option of the socket (getsockopt(2))."""
        ...


class Peer(NamedTuple):
    """Who connected, as the kernel noted it at connect(2); `start_time` in clock ticks since boot."""

    pid: int  # 0: outside our pid namespace
    uid: int
    gid: int
    groups: frozenset[int]
    start_time: int | None  # of the pid's process at accept(2); None: it was gone already


class Subject(NamedTuple):
    """A living process: which one, and on whose behalf it acts."""

    pid: int
    start_time: int
    leader: int  # pid of the thread group's leader: another one's is a thread's
    uids: frozenset[int]  # real, effective, saved and of files


def peer_of(connection: Connection) -> Peer:
    """Return who connected. To be asked as soon as the connection is accepted."""
    pid, uid, gid = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        groups = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MAX_GROUPS_SIZE)
    except OSError:  # ERANGE: in more than 256 groups; then none of them counts here
        groups = b""
    there = look(pid)
    return Peer(pid, uid, gid, frozenset(struct.unpack(f"={len(groups) // 4}I", groups)), there and there.start_time)


def prove(connection: Connection, peer: Peer) -> Subject:
    """Return the process that called connect(2) on the other end, proved to be alive and no other.

    Raises:
        PermissionMissing: it cannot be proved.
    """
    try:
        pidfd = struct.unpack("=i", connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4))[0]
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # ENOPROTOOPT: before Linux 6.5
            raise PermissionMissing(UNPROVED.format("the one that connected has ended")) from None
        return prove_by_start_time(peer)
    try:
        if _pid_of(pidfd) != peer.pid:
            raise PermissionMissing(UNPROVED.format("the one that connected has ended, or is in another pid namespace"))
        subject = look(peer.pid)
        # Alive after we looked, so it was he whom we looked at.
        if subject is None or _pid_of(pidfd) != peer.pid:
            raise PermissionMissing(UNPROVED.format("the one that connected has ended"))
        return subject
    finally:
        os.close(pidfd)


def prove_by_start_time(peer: Peer) -> Subject:
    """The same where the kernel has no SO_PEERPIDFD."""
    subject = look(peer.pid)
    if subject is None or subject.start_time != peer.start_time:
        raise PermissionMissing(UNPROVED.format("the one that connected has ended"))
    if peer.uid not in subject.uids:
        raise PermissionMissing(UNPROVED.format("it has become another user since it connected"))
    return subject


def look(pid: int) -> Subject | None:
    """Return what a pid's process is now; None if there is none, or it is a zombie."""
    try:
        directory = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # ENOENT: no such process. Whatever else it may be, nothing is proved then.
        return None
    try:
        start_time = parse_stat(_read("stat", directory)).start_time
        # The name, on the first line, cannot hold a line break: the kernel escapes it (fs/proc/array.c).
        fields = dict(line.split(b":", 1) for line in _read("status", directory).splitlines() if b":" in line)
    except OSError:
        return None
    finally:
        os.close(directory)
    if fields[b"State"].split()[0] in (b"Z", b"X"):
        return None
    return Subject(pid, start_time, int(fields[b"Tgid"]), frozenset(map(int, fields[b"Uid"].split())))


def _pid_of(pidfd: int) -> int:
    text = Path(f"/proc/self/fdinfo/{pidfd}").read_bytes()
    fields = dict(line.split(b":", 1) for line in text.splitlines() if b":" in line)
    return int(fields[b"Pid"])


def _read(name: str, directory: int) -> bytes:
    file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(file, 65536)
    finally:
        os.close(file)
