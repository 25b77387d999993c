"""Network namespaces by name, where `ip netns` keeps them.

Some facts about network namespaces
- A socket belongs to the namespace in which it was made, for ever, whichever namespace its user is in:
  so a server or an observer can live in our process and its socket elsewhere (net/socket.c, sock_net).
- A namespace is entered by thread (setns(2)). A thread that has entered one must end there: in a pool, the
  next job would find itself in the wrong network.
- /proc/sys/net shows the namespace of the thread that opens the file (net/sysctl_net.c).
- `nsenter --net` changes nothing else and becomes the program; `ip netns exec` also gives it a private
  mount namespace in which /sys/fs/cgroup is empty.
- A deleted namespace lives on until its last process and socket are gone.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import trio

from tunsplit.errors import KernelError
from tunsplit.lab import programs

T = TypeVar("T")

DIRECTORY = Path("/run/netns")
CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
DEATH_S = 5  # a process that does not die of SIGKILL in that time hangs in the kernel

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """One network namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = DIRECTORY / name

    def __repr__(self) -> str:
        return f"Namespace({self.name!r})"

    def call_sync(self, function: Callable[[], T]) -> T:
        """Call a function in the namespace, in a thread of its own, and wait for it."""
        with ThreadPoolExecutor(1, thread_name_prefix=self.name) as thread:
            return thread.submit(self._enter_and_call, function).result()

    async def call(self, function: Callable[[], T]) -> T:
        """The same for a function that takes its time: other tasks go on meanwhile."""
        return await trio.to_thread.run_sync(self.call_sync, function)

    def _enter_and_call(self, function: Callable[[], T]) -> T:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(descriptor, CLONE_NEWNET):
                errno = ctypes.get_errno()
                raise KernelError(f"setns({self.path}): {os.strerror(errno)}")
        finally:
            os.close(descriptor)
        return function()

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A non-blocking socket of the namespace."""
        made = self.call_sync(lambda: socket.socket(family, kind, protocol))
        made.setblocking(False)
        return made

    def ip(self, script: str) -> None:
        """Run the lines of a script, as `ip -batch` takes them: without the word ip.

        Raises:
            KernelError: one failed; those before it are done.
        """
        programs.execute(["ip", "-n", self.name, "-batch", "-"], text=script)

    def nft(self, ruleset: str) -> None:
        """Apply an nftables ruleset, as one."""
        programs.execute(self.command(["nft", "-f", "-"]), text=ruleset)

    def sysctl(self, settings: Mapping[str, int | str]) -> None:
        """Write settings, named by their path under /proc/sys."""

        def write() -> None:
            for name, value in settings.items():
                Path("/proc/sys", name).write_text(f"{value}\n")

        self.call_sync(write)

    def command(self, argv: Sequence[str], *, path: str | None = None) -> list[str]:
        """The same command, but in the namespace; the process that results is the program itself.

        Args:
            argv: the command.
            path: where its program is looked for, instead of the environment's PATH.
        """
        program = programs.require(argv[0], path)
        return [programs.require("nsenter"), f"--net={self.path}", "--", program, *argv[1:]]

    async def run(self, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program in the namespace to its end; options as for `programs.run`."""
        return await programs.run(self.command([os.fspath(word) for word in argv]), **options)

    def start(
        self, argv: Sequence[str | os.PathLike[str]], **options: Any
    ) -> contextlib.AbstractAsyncContextManager[programs.Program]:
        """Run a program in the namespace beside the block, and end it with the block."""
        return programs.start(self.command([os.fspath(word) for word in argv]), **options)


def create(names: Iterable[str]) -> None:
    """Make namespaces, empty but for a loopback device that is down."""
    programs.execute(["ip", "-batch", "-"], text="".join(f"netns add {name}\n" for name in names))


def delete(names: Iterable[str]) -> None:
    """End every process in these namespaces and remove them; those that do not exist are left out.

    Raises:
        KernelError: a process does not die.
    """
    existing = [name for name in names if (DIRECTORY / name).exists()]
    for name in existing:
        while living := _kill_all(DIRECTORY / name):
            _wait_dead(living, name)
    if existing:
        programs.execute(["ip", "-batch", "-"], text="".join(f"netns delete {name}\n" for name in existing))


def list_pids(namespace: Path) -> list[int]:
    """The processes whose main thread is in this namespace, our own never."""
    wanted = namespace.stat()
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _is_in(entry, wanted)
    ]


def _is_in(process: Path, wanted: os.stat_result) -> bool:
    try:
        found = (process / "ns/net").stat()
    except OSError:  # it has ended meanwhile
        return False
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


def _kill_all(namespace: Path) -> list[int]:
    """Send SIGKILL to all in a namespace; give their pidfds."""
    descriptors = []
    for pid in list_pids(namespace):
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            # The pid may have been reused between the list and the pidfd; from here on it cannot be.
            if _is_in(Path("/proc", str(pid)), namespace.stat()):
                descriptors.append(descriptor)
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            else:
                os.close(descriptor)
    return descriptors


def _wait_dead(descriptors: list[int], name: str) -> None:
    try:
        for descriptor in descriptors:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(DEATH_S * 1000):
                raise KernelError(f"a process in the namespace {name} does not die of SIGKILL")
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
