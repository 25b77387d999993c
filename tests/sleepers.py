"""Programs that sleep, and when they do."""

import os
import socket
import sys
from pathlib import Path

# Takes one descriptor after the other from this unix socket, says so, and keeps them.
RECEIVER = """
import os, socket, threading
own, kept = socket.socket(fileno={fileno}), []
def receive():
    while True:
        kept.extend(socket.recv_fds(own, 1, 1)[1])
        own.send(b"!")
{start}
"""
IN_ITS_FIRST_THREAD = "os.write(1, b'\\n'); receive()"
IN_ANOTHER_THREAD = "threading.Thread(target=receive).start(); os.write(1, b'\\n')"
# Shares its table with its parent, which waits (clone(2), CLONE_FILES and SIGCHLD).
IN_A_CHILD = f"""
import ctypes, signal
if ctypes.CDLL(None).syscall({{"x86_64": 56}}.get(os.uname().machine, 220), 0x400 | signal.SIGCHLD, 0, 0, 0, 0):
    signal.pause()
{IN_ITS_FIRST_THREAD}
"""


def unix_pair():
    """Two ends that wait for as long as it takes, whatever other tests have set as the default."""
    ends = socket.socketpair()
    for one in ends:
        one.setblocking(True)
    return ends


def receiver(apps, own, start=IN_ITS_FIRST_THREAD):
    """The pid of a program that takes descriptors from this unix socket."""
    return apps.launch([sys.executable, "-c", RECEIVER.format(fileno=own.fileno(), start=start)], own)


def threads(pid):
    return sorted(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())


def wchan(pid, thread=None):
    return Path(f"/proc/{pid}/task/{thread or pid}/wchan").read_text()


def runs(pid, thread=None):
    """How often it has got onto a processor."""
    return int(Path(f"/proc/{pid}/task/{thread or pid}/schedstat").read_text().split()[2])


def wait_asleep(pid):
    """Return when no thread of it is on a processor, or about to be."""
    while any(wchan(pid, thread) == "0" for thread in threads(pid)):
        assert ") Z " not in Path(f"/proc/{pid}/stat").read_text(), "it has ended"
        os.sched_yield()
