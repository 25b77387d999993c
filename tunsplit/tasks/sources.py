"""The source of attribution that every host has: the kernel's socket tables, then /proc.

Both calls are synchronous; `search` gives way by yielding. A flow is looked up once more when its search
ends: a four-tuple may have changed hands while we looked for its holder.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tunsplit.engine.attribution import Attribution, Certainty, Lineage, Owner
from tunsplit.kernel.procfs import Holder, Processes
from tunsplit.kernel.procnet import find_ping, find_raw
from tunsplit.kernel.sockdiag import LISTEN, SockDiag
from tunsplit.wire.ip import ICMP, ICMPV6, TCP, UDP

RAW = 255  # IPPROTO_RAW: writes headers of any protocol


@dataclass(frozen=True, slots=True)
class Sockets:
    """Every socket that may have sent a flow: (inode, cgroup id) of each."""

    how: str
    inodes: tuple[tuple[int, int | None], ...]
    cookie: bytes | None = None
    accepted: bool = True  # False: these are listeners, the connection is not yet anybody's


class SocketSource:
    """Attributes by who holds the socket now. Implements engine.attribution.Source."""

    def __init__(self, sockets: SockDiag, processes: Processes) -> None:
        self._sockets = sockets
        self._processes = processes

    def attribute(self, protocol: int, four_tuple: bytes) -> Attribution | None:
        """Answer from what is known of the last flows' owners; None when it takes a search.

        Raises:
            KernelError: an organ of judgement fails; judge nothing by it.
        """
        sockets = self._find(protocol, four_tuple)
        if sockets is None:
            return None
        holders = []
        for inode, _ in sockets.inodes:
            holder = self._processes.recheck(inode)
            if holder is None:
                return None
            holders.append(holder)
        return self._attribution(sockets, holders, unheld=0)

    def search(self, protocol: int, four_tuple: bytes) -> Iterator[Attribution | None]:
        """Look through all processes, every holder counts; no answer when there is no socket.

        Raises:
            KernelError: an organ of judgement fails; judge nothing by it.
        """
        sockets = self._find(protocol, four_tuple)
        while sockets is not None:
            holders: list[Holder] = []
            unheld = 0
            for inode, cgroup_id in sockets.inodes:
                before = len(holders)
                for holder in self._processes.find_holders(inode, cgroup_id):
                    if holder is None:
                        yield None
                    else:
                        holders.append(holder)
                unheld += len(holders) == before
            now = self._find(protocol, four_tuple)
            if now == sockets:
                yield self._attribution(sockets, holders, unheld)
                return
            sockets = now
            yield None

    def _find(self, protocol: int, four_tuple: bytes) -> Sockets | None:
        if protocol == TCP:
            return self._find_tcp(four_tuple)
        if protocol == UDP:
            found = self._sockets.find_all(four_tuple)
            if not found:
                return None
            cookie = found[0].cookie if len(found) == 1 else None
            return Sockets("socket", tuple([(one.inode, one.cgroup_id) for one in found]), cookie)
        return _find_others(protocol, four_tuple)

    def _find_tcp(self, four_tuple: bytes) -> Sockets | None:
        found = self._sockets.find(TCP, four_tuple)
        if found is None:
            return None
        if found.inode:
            inodes = ((found.inode, found.cgroup_id),)
            accepted = found.state != LISTEN
            return Sockets("socket" if accepted else "listener", inodes, found.cookie, accepted)
        listener = self._sockets.find_listener(four_tuple)
        if listener is None:
            return Sockets("socket", (), found.cookie)
        return Sockets("listener", ((listener.inode, listener.cgroup_id),), found.cookie, accepted=False)

    def _attribution(self, sockets: Sockets, holders: list[Holder], unheld: int) -> Attribution:
        if not holders:
            return Attribution(sockets.how, None, sockets.cookie)
        lineages = tuple([Lineage(process, self._processes.ancestors(process)) for process, _ in holders])
        if unheld:
            certainty = Certainty.AMBIGUOUS
        elif len(lineages) > 1:
            certainty = Certainty.SHARED
        elif not sockets.accepted:
            certainty = Certainty.INHERITED
        else:
            certainty = Certainty.EXACT
        return Attribution(sockets.how, Owner(lineages, certainty), sockets.cookie)


def _find_others(protocol: int, four_tuple: bytes) -> Sockets | None:
    size = (len(four_tuple) - 4) // 2
    version = 4 if size == 4 else 6
    source, destination = four_tuple[:size], four_tuple[size : 2 * size]
    if protocol in (ICMP, ICMPV6) and (found := find_ping(version, int.from_bytes(four_tuple[-4:-2]), source)):
        return Sockets("ping socket", tuple([(row.inode, None) for row in found]))
    raw = find_raw(version, protocol, source, destination) or find_raw(version, RAW, source, destination)
    return Sockets("raw socket", tuple([(row.inode, None) for row in raw])) if raw else None
