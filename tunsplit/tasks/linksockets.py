"""Who has sockets below IP, packet and XDP sockets, for people to know: what these send is no app's, and no flow.

Theory of operation. Whoever may open one is trusted (DESIGN.md, "Below IP"). The netdev table refuses what packet
sockets send past it without a thought of us; XDP sockets it never sees. Of those the kernel tells everybody no more
than how many there are.
"""

import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

from tunsplit.engine.flow import App
from tunsplit.kernel import procnet
from tunsplit.kernel.procfs import Processes
from tunsplit.tasks.holders import Held


class LinkSocket(NamedTuple):
    """A socket below IP, or several of one process by one device; `interface` is None for one that is bound to none."""

    kind: str  # packet, xdp
    interface: str | None
    app: App | None  # None: nobody can tell


class LinkSockets:
    """Those of others, as of the last look at everybody's descriptors."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._own_pid = os.getpid()
        self._asked: tuple[procnet.PacketSocket, ...] = ()
        self._listed: tuple[LinkSocket, ...] = ()

    def listed(self) -> list[LinkSocket]:
        """Every one, those of one process and device as one.

        Raises:
            KernelError: that cannot be known.
        """
        return [*self._listed, *[LinkSocket("xdp", None, None)] * procnet.count_xdp_sockets()]

    # As an asker of tasks/holders.py

    def wanted_sockets(self) -> set[int]:
        """The packet sockets, as inodes.

        Raises:
            KernelError: these cannot be known.
        """
        self._asked = tuple(procnet.packet_sockets())
        return {one.inode for one in self._asked}

    def take_holders(self, held: Held) -> Iterator[None]:
        """Note who holds them.

        Raises:
            KernelError: a process cannot be read.
        """
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

    def _app_of(self, pid: int) -> App | None:
        if (process := self._processes.read(pid)) is None:
            return None
        return App(pid, process.executable.path if process.executable else "", process.uid)


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # gone in this moment
        return f"#{index}"
