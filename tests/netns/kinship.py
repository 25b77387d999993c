"""Births that no library offers: with a pid of one's choice, or as a sibling of who asked for it.

Some facts about clone3 (kernel/fork.c, kernel/pid.c)
- `set_tid` names the new process's pid, and it must be free: so a pid is given again without any wait for the counter
  to come round, and nothing of the host is changed. Who may do so has CAP_CHECKPOINT_RESTORE.
- With CLONE_PARENT the new process is a child of its parent's parent, whom event and /proc name; it may choose no
  signal for its end then.
"""

from pathlib import Path
from typing import Any

from tests.netns.family import RELAY, Child, agent
from tests.netns.stage import App

CLONE_PARENT = 0x8000  # linux/sched.h

# In the app. PyDLL keeps the interpreter's lock, so that in the child somebody holds it.
CODE = """
import ctypes, signal
SYS_CLONE3 = 435

def clone(*, flags=0, pid=0):
    wanted = (ctypes.c_int * 1)(pid)
    named = ctypes.addressof(wanted) if pid else 0
    arguments = (ctypes.c_uint64 * 11)(flags, 0, 0, 0, 0 if flags else signal.SIGCHLD, 0, 0, 0, named, bool(pid), 0)
    libc = ctypes.PyDLL(None, use_errno=True)
    made = libc.syscall(SYS_CLONE3, ctypes.byref(arguments), ctypes.sizeof(arguments))
    if made < 0:
        raise OSError(ctypes.get_errno(), 'clone3')
    return made

class Cloned:
    '''A child that becomes a program, or goes on as this one; told through a socket as others by their stdin.'''
    def __init__(self, words, options):
        ours, theirs = socket.socketpair()
        self.pid = clone(**options)
        if not self.pid:
            become(words, theirs)
        theirs.close()
        ours.settimeout(None)
        self.stdin, self.stdout = ours.makefile('w'), ours.makefile('r')

def become(words, theirs):
    for number in (0, 1):
        os.dup2(theirs.fileno(), number)
    os.set_blocking(0, True)
    if words:
        os.execv(words[0], words)
    sys.stdin, sys.stdout = open(0), open(1, 'w')
    run()
    os._exit(0)
"""


async def clone(parent: App | Child, program: Path | None = None, **options: int) -> Child:
    """A child of an app, or a sibling: of another program, or of the app's own.

    Args:
        parent: who makes it.
        program: what it becomes at once.
        options: `flags`; `pid`, which must be free.
    """
    if not await parent("'children' in globals()"):
        await parent(RELAY)
    await parent(CODE)
    words: Any = agent(program) if program else None
    await parent("cloned = Cloned(words, options); children[cloned.pid] = cloned", words=words, options=options)
    pid = await parent("cloned.pid")
    return Child(parent, pid, pid)
