"""Who has sockets below IP, packet and XDP sockets, for people to know: what these send is no app's, and no flow.

Theory of operation. Whoever may open one is trusted (DESIGN.md, "Below IP"). The netdev table refuses what packet
sockets send past it without a thought of us; XDP sockets it never sees. Of those the kernel tells everybody no more
than how many there are. Nobody is judged by this: what cannot be known is counted, and costs no flow.
"""

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from tunsplit.engine.flow import App
from tunsplit.errors import KernelError
from tunsplit.kernel import procnet
from tunsplit.kernel.procfs import Processes
from tunsplit.tasks.holders import Held

T = TypeVar("T")


class LinkSocket(NamedTuple):
    """A socket below IP, or several of one process by one device; `interface` is None for one that is bound to none."""

    kind: str  # packet, xdp
    interface: str | None
    app: App | None  # None: nobody can tell


class LinkSockets:
    """Those of others, as of the last look at everybody's descriptors."""

    def __init__(self, processes: Processes, counters: Counter[str]) -> None:
        self._processes = processes
        self._counters = counters
        self._own_pid = os.getpid()
        self._asked: tuple[procnet.PacketSocket, ...] = ()
        self._listed: tuple[LinkSocket, ...] = ()

    def listed(self) -> list[LinkSocket]:
        """Every one, those of one process and device as one."""
        return [*self._listed, *[LinkSocket("xdp", None, None)] * self._try(procnet.count_xdp_sockets, 0)]

    # As an asker of tasks/holders.py

    def wanted_sockets(self) -> set[int]:
        """The packet sockets, as inodes."""
        self._asked = tuple(self._try(procnet.packet_sockets, []))
        return {one.inode for one in self._asked}

    def take_holders(self, held: Held) -> Iterator[None]:
        """Note who holds them."""
        found: dict[LinkSocket, None] = {}
        for one in self._asked:
            interface = _name_of(one.interface) if one.interface else None
            pids = {pid for pid, _ in held.get(one.inode, ())}
            if self._own_pid in pids:
                continue
            apps = [self._app_of(pid) for pid in sorted(pids)] or [None]
            found.update((LinkSocket("packet", interface, app), None) for app in apps)
            yield None
        self._listed = tuple(found)

    def holders_unknown(self) -> None:
        """Leave it: they are told as they were."""

    def _try(self, ask: Callable[[], T], otherwise: T) -> T:
        try:
            return ask()
        except KernelError:
            self._counters["link_sockets_not_seen"] += 1
            return otherwise

    def _app_of(self, pid: int) -> App | None:
        if (process := self._try(lambda: self._processes.read(pid), None)) is None:
            return None
        return App(pid, process.executable.path if process.executable else "", process.uid)


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # gone in this moment
        return f"#{index}"
