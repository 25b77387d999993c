"""The source of attribution that is always there: the socket that fits the packet, and who holds it.

A packet from outside a socket of this network namespace has no owner here. Every socket that could have
sent the packet counts: UDP sockets that share a port, and for echo and the other protocols the raw ones.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tunsplit.engine.attribution import Attribution, Certainty, Owner
from tunsplit.engine.direction import destination_of, source_of
from tunsplit.kernel import procnet
from tunsplit.kernel.procfs import Holder, Processes
from tunsplit.kernel.sockdiag import LISTEN, SockDiag, Socket
from tunsplit.wire.ip import ICMP, ICMPV6, TCP, UDP

MOST_EARLY = 4096  # flows whose holder is noted while they wait for the search
NO_SOCKET = Attribution("no socket", None)


class _Found(NamedTuple):
    how: str
    inodes: tuple[int, ...]
    cgroup_id: int | None = None
    cookie: bytes | None = None
    listening: bool = False
    unheld: bool = False  # one of several sockets has no holder any more, or none that can be seen


class SocketSource:
    """Asks sock_diag and /proc/net for the sockets, and /proc for their holders."""

    def __init__(self, diag: SockDiag, processes: Processes) -> None:
        self._diag = diag
        self._processes = processes
        self._early: dict[bytes, dict[int, Holder]] = {}

    def attribute(self, protocol: int, four_tuple: bytes) -> Attribution | None:
        """Answer at once if every socket's holder is known from before."""
        found = self._find(protocol, four_tuple)
        if not found.inodes:
            if four_tuple in self._early:  # gone in this very moment
                return None
            return NO_SOCKET if found.cookie is None else Attribution(found.how, None, found.cookie)
        holders = []
        for inode in found.inodes:
            holder = self._processes.recheck(inode)
            if holder is None:
                self._note(four_tuple, found.inodes)
                return None
            holders.append(holder)
        self._early.pop(four_tuple, None)
        return self._answer(found, holders, complete=True)

    def search(self, protocol: int, four_tuple: bytes) -> Iterator[Attribution | None]:
        """Look through all processes; None now and then, so that others get their turn."""
        early = self._early.pop(four_tuple, {})
        found = self._find(protocol, four_tuple)
        if not found.inodes and early:  # sent by a program that has ended since
            found = found._replace(inodes=tuple(early))
        while True:
            holders: list[Holder] = [early[inode] for inode in found.inodes if inode in early]
            held: set[int] = {inode for inode in found.inodes if inode in early}
            for inode in found.inodes:
                for holder in self._processes.find_holders(inode, found.cgroup_id):
                    if holder is None:
                        yield None
                    else:
                        holders.append(holder)
                        held.add(inode)
            # A search takes its time, in which a four-tuple can change hands.
            before, found = found, self._find(protocol, four_tuple)
            if found == before or (not found.inodes and held):
                found = before
                yield self._answer(found, holders, complete=held == set(found.inodes))
                return
            yield None

    def note_newcomer(self, protocol: int, four_tuple: bytes) -> None:
        """Note who holds the likeliest socket at this moment, if it is a newcomer: it may be gone in the next.

        Raises:
            KernelError: sock_diag cannot answer.
        """
        self._early.pop(four_tuple, None)
        if protocol == UDP and (socket := self._diag.find(protocol, four_tuple)) is not None and socket.inode:
            self._note(four_tuple, (socket.inode,))

    def _note(self, four_tuple: bytes, inodes: Iterable[int]) -> None:
        early = {inode: holder for inode in inodes if (holder := self._processes.newcomer(inode)) is not None}
        if early:
            if len(self._early) >= MOST_EARLY:
                self._early.clear()
            self._early.setdefault(four_tuple, {}).update(early)

    def cookie(self, protocol: int, four_tuple: bytes, *, all_sockets: bool = True) -> bytes | None:
        """The cookie of the socket that sends this flow now; None where there is none, or no way to tell.

        Several UDP sockets may share a port. To look for all of them costs ten times what the likeliest one does.
        """
        if protocol == UDP and all_sockets:
            sockets = self._diag.find_all(four_tuple)
            return sockets[0].cookie if len(sockets) == 1 else None
        socket = self._diag.find(protocol, four_tuple) if protocol in (TCP, UDP) else None
        return socket.cookie if socket else None

    def user(self, four_tuple: bytes) -> int | None:
        """Who has created the TCP socket that sends this flow; None: there is none."""
        socket = self._diag.find(TCP, four_tuple)
        return socket.uid if socket is not None else None

    def _find(self, protocol: int, four_tuple: bytes) -> _Found:
        source, destination = source_of(four_tuple), destination_of(four_tuple)
        version = 4 if len(source) == 4 else 6
        if protocol == TCP:
            return self._find_tcp(four_tuple)
        if protocol == UDP:
            sockets = self._diag.find_all(four_tuple)
            raw = procnet.find_raw(version, protocol, source, destination)
            return _found_sockets("udp socket", sockets, raw)
        raw = procnet.find_raw(version, protocol, source, destination)
        if protocol in (ICMP, ICMPV6):
            ping = procnet.find_ping(version, int.from_bytes(four_tuple[-4:-2], "big"), source)
            return _Found("ping socket" if ping else "raw socket", _inodes([*ping, *raw]))
        return _Found("raw socket", _inodes(raw))

    def _find_tcp(self, four_tuple: bytes) -> _Found:
        socket = self._diag.find(TCP, four_tuple)
        if socket is not None and socket.state != LISTEN and socket.inode:
            return _Found("tcp socket", (socket.inode,), socket.cgroup_id, socket.cookie)
        # Not accepted yet, or nobody's: what a listener has set going will be its holder's.
        listener = self._diag.find_listener(four_tuple)
        if listener is not None and listener.inode:
            return _Found("tcp listener", (listener.inode,), listener.cgroup_id, listener.cookie, listening=True)
        return _Found("tcp socket without a holder", (), cookie=socket.cookie if socket else None)

    def _answer(self, found: _Found, holders: Iterable[Holder], *, complete: bool) -> Attribution:
        processes = {(holder.process.pid, holder.process.start_time): holder.process for holder in holders}
        if not processes:
            return Attribution(found.how if found.inodes or found.cookie else NO_SOCKET.how, None, found.cookie)
        if not complete or found.unheld:
            certainty = Certainty.AMBIGUOUS
        elif found.listening:
            certainty = Certainty.INHERITED
        elif len(processes) > 1 or len(found.inodes) > 1:
            certainty = Certainty.SHARED
        else:
            certainty = Certainty.EXACT
        return Attribution(found.how, Owner(tuple(processes.values()), certainty), found.cookie, found.inodes)


def _found_sockets(how: str, sockets: list[Socket], raw: list[procnet.TableSocket]) -> _Found:
    inodes = tuple(dict.fromkeys((*(socket.inode for socket in sockets if socket.inode), *_inodes(raw))))
    unheld = any(not socket.inode for socket in sockets)
    only = sockets[0] if len(sockets) == 1 else None
    return _Found(how, inodes, only.cgroup_id if only else None, only.cookie if only else None, unheld=unheld)


def _inodes(rows: list[procnet.TableSocket]) -> tuple[int, ...]:
    return tuple(row.inode for row in rows if row.inode)
