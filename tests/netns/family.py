"""Descendants of an app that do what they are told as well: the app passes it on."""

import ast
import contextlib
import itertools
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.netns.stage import AGENT, NAMES, App, until

# In the app. What a child is asked goes down its stdin, and its answer comes up its stdout (tunsplit/lab/agent.py).
RELAY = """
import json
children = {}

def bear(name, words, **options):
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    children[name] = child
    return child.pid

def tell(name, told):
    print(told, file=children[name].stdin, flush=True)

def hear(name):
    answer = children[name].stdout.readline()
    children[name].stdout.readline()
    return answer
"""
# Forked twice, the leader of a session in between: nobody's child when it becomes the program that is named.
DAEMON = """
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.execv(words[0], words)
"""


def agent(program: Path) -> list[str]:
    """The command by which a program becomes an app."""
    return [str(program), "-I", "-S", "-u", str(AGENT)]


class Child:
    """A descendant of an app; `born` gives one."""

    def __init__(self, parent: "App | Child", name: str, pid: int) -> None:
        self._parent = parent
        self._name = name
        self.pid = pid

    async def __call__(self, code: str, **names: Any) -> Any:
        """As an `App`."""
        await self.tell(code, **names)
        answer = json.loads(await self._parent("hear(name)", name=self._name))
        if "error" in answer:
            raise OSError(*answer["error"])
        assert "failure" not in answer, answer["failure"]
        return ast.literal_eval(answer["value"])

    async def tell(self, code: str, **names: Any) -> None:
        """The same, but do not wait for what comes of it."""
        told = json.dumps({"code": code, "names": {**NAMES, **names}, "number": 0})
        await self._parent("tell(name, told)", name=self._name, told=told)

    async def become(self, program: Path) -> None:
        """Run another program in the same process."""
        await self.tell("os.execv(words[0], words)", words=agent(program))
        # What is told any earlier, the old program reads.
        await until(partial(self._is, program), f"the child is {program}")

    async def _is(self, program: Path) -> bool:
        return Path(f"/proc/{self.pid}/exe").readlink() == program  # noqa: ASYNC240  never waits

    async def end(self) -> None:
        """End it, and wait for that."""
        await self._parent("children[name].communicate()", name=self._name)


_names = itertools.count()


async def bear(parent: "App | Child", words: list[str], descriptors: Sequence[int] = ()) -> Child:
    """Start a child of an app; its command is to end in an agent's, see `agent`. It inherits these descriptors."""
    name = f"child {next(_names)}"
    if not await parent("'children' in globals()"):
        await parent(RELAY)
    pid = await parent("bear(name, words, pass_fds=descriptors)", name=name, words=words, descriptors=[*descriptors])
    return Child(parent, name, pid)


async def bear_daemon(
    parent: "App | Child",
    between: Path,
    program: Path,
    descriptors: Sequence[int] = (),
    *,
    wait_known: Callable[[int], Awaitable[Any]] | None = None,
) -> Child:
    """Start a daemon: a process of `between` forks twice and exits; what is left becomes `program`.

    `descriptors`: what it inherits of the parent.
    `wait_known`: waits until somebody has looked at a process; who is gone before that is of no known program.
    """
    child = await bear(parent, agent(between), descriptors)
    assert child.pid == await child("os.getpid()")
    if wait_known is not None:
        await wait_known(child.pid)
    await child.tell(DAEMON, words=agent(program))
    await parent("children[name].wait()", name=child._name)  # noqa: SLF001 - of the same module
    # What is told before it is that program, the old one reads.
    (child.pid,) = await until(partial(_running, program), f"there is a {program}")
    assert child.pid == await child("os.getpid()")
    return child


async def _running(program: Path) -> list[int]:
    """Who runs a program, as far as we may know."""
    found = []
    for entry in Path("/proc").iterdir():  # noqa: ASYNC240  never waits
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and (entry / "exe").readlink() == program:
                found.append(int(entry.name))
    return found
