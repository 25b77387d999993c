"""The source of attribution that is always there: the socket that fits the packet, and who holds it.

A packet from outside a socket of this network namespace has no owner here. Every socket that could have
sent the packet counts: UDP sockets that share a port, and for echo and the other protocols the raw ones.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from tunsplit.engine.attribution import Attribution, Certainty, Key, Owner
from tunsplit.engine.direction import destination_of, source_of
from tunsplit.engine.flow import Flow
from tunsplit.errors import KernelError
from tunsplit.kernel import procnet
from tunsplit.kernel.procfs import Holder, Processes
from tunsplit.kernel.sockdiag import CONNECTED, LISTEN, SockDiag, Socket
from tunsplit.tasks.pace import Pace
from tunsplit.wire.ip import ICMP, ICMPV6, TCP, UDP

MOST_EARLY = 4096  # flows whose holder is noted while they wait for the search
DEAR_S = 0.0005  # what a walk over all UDP sockets takes when one is to serve many flows
FEW = 2  # sockets of a search whose holder is looked for among newborns: 1 ms each …
OWED_S = 0.02  # … as long as packets have not waited longer for such looks than a quarter of this
PAUSE = 8  # sockets that are rechecked before others get their turn: 1 ms
SERVICE_MANAGER = 1  # pid
EXACT = Certainty.EXACT
NO_SOCKET = Attribution("no socket", None)


class _Found(NamedTuple):
    how: str
    inodes: tuple[int, ...]
    cookie: bytes | None = None
    listening: bool = False
    unheld: bool = False  # one of several sockets has no holder any more, or none that can be seen


class _Early(NamedTuple):
    holders: dict[int, Holder]  # by inode
    cookie: bytes | None


NOT_NOTED = _Early({}, None)


class SocketSource:
    """Asks sock_diag and /proc/net for the sockets, and /proc for their holders."""

    def __init__(self, diag: SockDiag, processes: Processes) -> None:
        self._diag = diag
        self._processes = processes
        self._early: dict[bytes, _Early] = {}
        self._pace = Pace(time.perf_counter, OWED_S)
        self._rest_until = float("-inf")
        self._last_owner: Owner | None = None  # of many flows in a row, mostly: they share it

    def attribute(self, protocol: int, four_tuple: bytes) -> Attribution | None:
        """Answer at once if every socket's holder is known from before, or newborn, and others do not wait too long."""
        self._early.pop(four_tuple, None)
        likeliest: dict[int, Holder] = {}
        if protocol == UDP:
            likeliest = self._note_likeliest(four_tuple)
            if self._diag.walk_s > DEAR_S:
                return None
        found = self._find(protocol, four_tuple)
        if not found.inodes:
            if four_tuple in self._early:  # gone in this very moment
                return None
            return NO_SOCKET if found.cookie is None else Attribution(found.how, None, found.cookie)
        holders = []
        for inode in found.inodes:
            holder = likeliest.get(inode) or self._processes.recheck(inode)
            if holder is None:
                self._note(four_tuple, found.inodes, found.cookie)
                holder = self._newborn(inode)
            if holder is None:
                return None
            holders.append(holder)
        self._early.pop(four_tuple, None)
        return self._answer(found, holders, complete=True)

    def search(self, flows: Sequence[Key]) -> Iterator[tuple[Key, Attribution] | None]:
        """Look through all processes, once for all of these flows; None now and then, so that others get their turn."""
        early = {key: self._early.pop(key[1], NOT_NOTED) for key in flows}
        wanted = {key: _with(found, early[key]) for key, found in self._find_many(flows).items()}
        while wanted:
            waited = False
            # In their order: the next socket of a process has the next descriptor, mostly.
            inodes = dict.fromkeys(inode for found in wanted.values() for inode in found.inodes)
            holders: dict[int, list[Holder]] = {}
            for number, inode in enumerate(inodes):
                holder = self._processes.recheck(inode)
                if holder is None and number < FEW:
                    holder = self._newborn(inode)
                if holder is not None:
                    holders[inode] = [holder]
                if not (number + 1) % PAUSE:
                    waited = True
                    yield None
            left = inodes.keys() - holders.keys()
            for found_holders in self._processes.find_holders(left) if left else ():
                waited = True
                holders.update(found_holders or {})
                yield None
            # A search takes its time, in which a four-tuple can change hands.
            now = self._find_many(tuple(wanted)) if waited else wanted
            for key, found in list(wanted.items()):
                noted = early[key].holders
                held = [[*filter(None, [noted.get(inode)]), *holders.get(inode, [])] for inode in found.inodes]
                if _with(now[key], early[key]) == found or (not now[key].inodes and any(held)):
                    del wanted[key]
                    yield key, self._answer(found, chain.from_iterable(held), complete=all(held))
                else:
                    wanted[key] = _with(now[key], early[key])
                    yield None

    def _newborn(self, inode: int) -> Holder | None:
        """The holder of a new socket, if it can be told at once, see `Processes.newborn`, and not too often."""
        began = time.perf_counter()
        if began < self._rest_until:
            return None
        holder = self._processes.newborn(inode)
        ended = time.perf_counter()
        self._rest_until = ended + self._pace.looked(ended - began)
        return holder

    def _note_likeliest(self, four_tuple: bytes) -> dict[int, Holder]:
        """Note who holds the likeliest UDP socket at this moment: it may be gone in the next.

        Its only holder, by the socket's inode, if that can be told at once.
        """
        socket = self._diag.find(UDP, four_tuple)
        if socket is None or not socket.inode:
            return {}
        if (holder := self._processes.recheck(socket.inode)) is None:
            self._note(four_tuple, (socket.inode,), socket.cookie, socket.uid)
            return {}
        only = {socket.inode: holder}
        self._keep(four_tuple, _Early(only, socket.cookie))
        return only

    def _note(self, four_tuple: bytes, inodes: Iterable[int], cookie: bytes | None, user: int | None = None) -> None:
        """Note those of the newcomers who hold these sockets."""
        before = self._early.get(four_tuple, NOT_NOTED).holders
        left = [inode for inode in inodes if inode not in before]
        early = {inode: holder for inode in left if (holder := self._processes.newcomer(inode, user)) is not None}
        if early:
            self._keep(four_tuple, _Early(before | early, cookie))

    def _keep(self, four_tuple: bytes, early: _Early) -> None:
        if len(self._early) >= MOST_EARLY:
            self._early.clear()
        self._early[four_tuple] = early

    def cookie(self, protocol: int, four_tuple: bytes, *, all_sockets: bool = True) -> bytes | None:
        """The cookie of the socket that sends this flow now; None where there is none, or no way to tell.

        Several UDP sockets may share a port. To look for all of them costs ten times what the likeliest one does.
        """
        if protocol == UDP and all_sockets:
            sockets = self._diag.find_all(four_tuple)
            return sockets[0].cookie if len(sockets) == 1 else None
        socket = self._diag.find(protocol, four_tuple) if protocol in (TCP, UDP) else None
        return socket.cookie if socket else None

    def end(self, protocol: int, four_tuple: bytes, cookie: bytes | None) -> bool:
        """End the socket that sends this flow, if it can be, see `SockDiag.destroy`."""
        return protocol in (TCP, UDP) and self._diag.destroy(protocol, four_tuple, cookie)

    def is_accepted(self, four_tuple: bytes) -> bool:
        """Whether a process has the TCP connection of this flow; not so before, and after it has closed it."""
        socket = self._diag.find(TCP, four_tuple)
        return socket is not None and socket.state != LISTEN and bool(socket.inode)

    def goes_on(self, flow: Flow) -> bool:
        """Whether a flow that seems to be over has a socket that takes it to be connected, and somebody holds that."""
        if flow.protocol != TCP or flow.cookie is None:
            return False
        try:
            socket = self._diag.find(TCP, flow.key)
        except KernelError:
            return False  # then it ends, as it seems
        return socket is not None and socket.cookie == flow.cookie and socket.state in CONNECTED and bool(socket.inode)

    def user(self, protocol: int, four_tuple: bytes) -> int | None:
        """Who has created the socket that sends this flow, TCP or UDP; None: there is none, or no way to tell."""
        socket = self._diag.find(protocol, four_tuple) if protocol in (TCP, UDP) else None
        return socket.uid if socket is not None else None

    def _find(self, protocol: int, four_tuple: bytes) -> _Found:
        if protocol == TCP:
            return self._find_tcp(four_tuple)
        return self._find_many([(protocol, four_tuple)])[protocol, four_tuple]

    def _find_many(self, flows: Sequence[Key]) -> dict[Key, _Found]:
        tables = _Tables()
        datagrams = self._diag.find_all_of([four_tuple for protocol, four_tuple in flows if protocol == UDP])
        answer = {}
        for protocol, four_tuple in flows:
            if protocol == TCP:
                answer[protocol, four_tuple] = self._find_tcp(four_tuple)
                continue
            raw = tables.find_raw(protocol, four_tuple)
            if protocol == UDP:
                found = _found_sockets("udp socket", datagrams[four_tuple], raw)
            elif protocol in (ICMP, ICMPV6):
                ping = tables.find_ping(four_tuple)
                found = _Found("ping socket" if ping else "raw socket", _inodes([*ping, *raw]))
            else:
                found = _Found("raw socket", _inodes(raw))
            answer[protocol, four_tuple] = found
        return answer

    def _find_tcp(self, four_tuple: bytes) -> _Found:
        socket = self._diag.find(TCP, four_tuple)
        if socket is not None and socket.state != LISTEN and socket.inode:
            return _Found("tcp socket", (socket.inode,), socket.cookie)
        # Not accepted yet, or nobody's: what a listener has set going will be its holder's.
        listener = self._diag.find_listener(four_tuple)
        if listener is not None and listener.inode:
            return _Found("tcp listener", (listener.inode,), listener.cookie, listening=True)
        return _Found("tcp socket without a holder", (), cookie=socket.cookie if socket else None)

    def _answer(self, found: _Found, holders: Iterable[Holder], *, complete: bool) -> Attribution:
        processes = {(holder.process.pid, holder.process.start_time): holder.process for holder in holders}
        if found.listening and len(processes) > 1:
            # It keeps its services' listeners (systemd.socket(5)), and leaves it to them to accept.
            processes = {key: process for key, process in processes.items() if process.pid != SERVICE_MANAGER}
        if not processes:
            return Attribution(found.how if found.inodes or found.cookie else NO_SOCKET.how, None, found.cookie)
        if not complete or found.unheld:
            certainty = Certainty.AMBIGUOUS
        elif found.listening:
            certainty = Certainty.INHERITED
        elif len(processes) > 1 or len(found.inodes) > 1:
            certainty = Certainty.SHARED
        else:
            certainty = EXACT
        owner = Owner(tuple(processes.values()), certainty)
        if owner != self._last_owner:
            self._last_owner = owner
        return Attribution(found.how, self._last_owner, found.cookie, found.inodes)


class _Tables:
    """Tables of /proc/net, each read once at most."""

    def __init__(self) -> None:
        self._ping: dict[int, list[procnet.TableSocket]] = {}
        self._raw: dict[int, list[procnet.TableSocket]] = {}

    def find_ping(self, four_tuple: bytes) -> list[procnet.TableSocket]:
        source = source_of(four_tuple)
        version = 4 if len(source) == 4 else 6
        if version not in self._ping:
            self._ping[version] = procnet.ping_sockets(version)
        return procnet.find_ping(self._ping[version], int.from_bytes(four_tuple[-4:-2], "big"), source)

    def find_raw(self, protocol: int, four_tuple: bytes) -> list[procnet.TableSocket]:
        source = source_of(four_tuple)
        version = 4 if len(source) == 4 else 6
        if version not in self._raw:
            self._raw[version] = procnet.raw_sockets(version)
        return procnet.find_raw(self._raw[version], protocol, source, destination_of(four_tuple))


def _with(found: _Found, early: _Early) -> _Found:
    """What was found; the socket that was noted if it is gone: it was sent by a program that has ended since."""
    if found.inodes or not early.holders:
        return found
    return found._replace(inodes=tuple(early.holders), cookie=early.cookie)


def _found_sockets(how: str, sockets: list[Socket], raw: list[procnet.TableSocket]) -> _Found:
    inodes = tuple(dict.fromkeys((*(socket.inode for socket in sockets if socket.inode), *_inodes(raw))))
    unheld = any(not socket.inode for socket in sockets)
    only = sockets[0] if len(sockets) == 1 else None
    return _Found(how, inodes, only.cookie if only else None, unheld=unheld)


def _inodes(rows: list[procnet.TableSocket]) -> tuple[int, ...]:
    return tuple(row.inode for row in rows if row.inode)
