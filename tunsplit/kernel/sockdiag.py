"""Which socket a packet came from, and its end: exact sock_diag requests.

Some facts about sock_diag (net/ipv4/inet_diag.c, tcp_diag.c, udp_diag.c), each a test in tests/facts/:

An exact request is one look-up in the kernel's own hash tables, and the answer lies in our queue when
send() returns: no wait, no event loop. A dump, even of one port, walks the whole table: for TCP 100 times
as dear, for UDP ten times, and a hundred times where there are 10,000 sockets. One walk
may look for many ports (kernel/diagfilter.py).

The look-up is the one for an incoming packet. So a UDP request wants the flow turned round, remote
address first; in plain order it finds an innocent socket bound to the *remote* port, therefore that
order is never tried. So TCP falls back to the listener on the local port when no connection fits: the
state tells. And a socket bound to a device is found only if that device is named; naming one finds
unbound sockets as well.

IPv4 flows of dual-stack IPv6 sockets are found by AF_INET. A connection that nobody accepted yet, one
in TIME_WAIT and one whose process closed it have inode 0. Several UDP sockets on one port: an exact
request names one of them, `find_all` all. Sockets of other network namespaces are never found.

SOCK_DESTROY looks up as a request does, so it falls back to the listener too: only a cookie keeps it from a
stranger. But it wants UDP in plain order. A TCP socket says ECONNABORTED then, and if it was
connected the kernel's RST leaves by the way that is open; a UDP socket says ECONNABORTED once and has no peer
any more, for good if it was connected, while a wildcard one may send again.
"""

import errno
import os
import socket
import time
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple

from tunsplit.errors import KernelError
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.diagfilter import MOST_PORTS, filter_of
from tunsplit.kernel.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
INET_DIAG_SKV6ONLY = 11

# linux/tcp.h; UDP sockets are ESTABLISHED when connected, else CLOSE.
ESTABLISHED, SYN_SENT, SYN_RECV, TIME_WAIT, CLOSE, LISTEN = 1, 2, 3, 6, 7, 10
CONNECTED = frozenset((ESTABLISHED, 4, 5, 8))  # and FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT: one of its ways is still open

OPTIONS = "the kernel needs CONFIG_INET_DIAG and CONFIG_INET_UDP_DIAG"
CANNOT_DESTROY = "to end sockets the kernel needs CONFIG_INET_DIAG_DESTROY"

# Family, type, protocol of a socket that asks for a port: of the C type, at half the price of the class over it.
PROBES = {
    (version, protocol): (family, kind | socket.SOCK_CLOEXEC, protocol)
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6))
    for protocol, kind in ((socket.IPPROTO_TCP, socket.SOCK_STREAM), (socket.IPPROTO_UDP, socket.SOCK_DGRAM))
}
PlainSocket = socket.SocketType

# nlmsghdr: length · type · flags · sequence · port, then
# inet_diag_req_v2: family · protocol · extensions · states · ports · addresses · device · cookie
pack_request = Struct("=IHHIIBBBxI2s2s16s16sI8s").pack
REQUEST_SIZE = 72
ALL_STATES = 0xFFFFFFFF
NO_COOKIE = b"\xff" * 8

# nlmsghdr: length · type · sequence, then inet_diag_msg:
# family · state · local port · local address · device · cookie · uid · inode
unpack_answer = Struct("=IH2xI4xBB2x2s2x16s16xI8s12xII").unpack_from
unpack_header = Struct("=IH2xI").unpack_from
ATTRIBUTES_AT = 88
unpack_attribute = Struct("=HH").unpack_from
unpack_errno = Struct("=i").unpack_from
ERRNO_AT = 16

NO_PORT = bytes(2)
ANY = bytes(16)
MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, an IPv4 address as a dual-stack socket has it (RFC 4291 §2.5.5.2)


class Socket(NamedTuple):
    """A socket as the kernel describes it. `uid` is that of its creation: no proof of who uses it now."""

    inode: int  # 0: no process holds it, or none yet
    uid: int
    cookie: bytes  # 8 bytes, never given twice while the system runs
    state: int
    interface: int  # index of the device that it is bound to, or 0


class Bound(NamedTuple):
    """A socket that takes what comes to a local port: TCP's listen, UDP's are not connected."""

    protocol: int
    address: bytes  # packed, all zero: every address; that of an IPv4 one of a dual-stack socket is an IPv4 address
    socket: Socket


class SockDiag(Closing):
    """Exact look-ups in the network namespace that it was made in. For one thread.

    `interface` is the index of the device that the flows in question come in by: sockets bound to it
    are found too, sockets bound to another are not.
    """

    def __init__(self, interface: int = 0) -> None:
        self.interface = interface
        self.walk_s = 0.0  # how long the last search for all senders has taken
        self._sequence = 0
        self._found = self._missed = self._failed = self._stale = self._destroyed = 0
        self._answer = bytearray(16384)  # a datagram of a dump is as large as the buffer, at most
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
            self._socket.setblocking(False)
        except OSError as error:
            raise KernelError(f"sock_diag: {error.strerror} ({OPTIONS})") from error
        try:
            self._prove()
        except KernelError:
            self.close()
            raise

    def close(self) -> None:
        """Give the netlink socket back."""
        self._socket.close()

    def find(self, protocol: int, four_tuple: bytes) -> Socket | None:
        """The socket that sends this flow; for TCP without a connection the listener on the source port.

        Args:
            protocol: TCP or UDP.
            four_tuple: as the sender writes it, 12 or 36 bytes.

        Raises:
            KernelError: sock_diag cannot answer; whose flow it is must then count as unknown.
        """
        size = 4 if len(four_tuple) == 12 else 16
        family = socket.AF_INET if size == 4 else socket.AF_INET6
        source, destination = four_tuple[:size], four_tuple[size : 2 * size]
        source_port, destination_port = four_tuple[-4:-2], four_tuple[-2:]
        if protocol == socket.IPPROTO_UDP:
            return self._find(family, protocol, destination_port, source_port, destination, source)
        return self._find(family, protocol, source_port, destination_port, source, destination)

    def find_listener(self, four_tuple: bytes) -> Socket | None:
        """The TCP listener that a connection not yet accepted belongs to: its flow as the listener's host sends it."""
        size = 4 if len(four_tuple) == 12 else 16
        family = socket.AF_INET if size == 4 else socket.AF_INET6
        found = self._find(family, socket.IPPROTO_TCP, four_tuple[-4:-2], NO_PORT, four_tuple[:size], b"")
        return found if found is not None and found.state == LISTEN else None

    def find_all(self, four_tuple: bytes) -> list[Socket]:
        """Every UDP socket that could have sent this flow, whichever of them it was.

        These are all on the source port: bound with SO_REUSEPORT or SO_REUSEADDR beside each other, to different
        addresses (IP_PKTINFO overrides them), to a multicast group, or connected elsewhere (sendto() overrides that).
        Walks the kernel's table.

        Raises:
            KernelError: sock_diag cannot answer.
        """
        return self.find_all_of([four_tuple])[four_tuple]

    def find_all_of(self, four_tuples: Sequence[bytes]) -> dict[bytes, list[Socket]]:
        """The same of many flows, in one walk for `MOST_PORTS` of them.

        Raises:
            KernelError: sock_diag cannot answer.
        """
        answer: dict[bytes, list[Socket]] = {}
        began = time.perf_counter()
        for first in range(0, len(four_tuples), MOST_PORTS):
            some = four_tuples[first : first + MOST_PORTS]
            v4 = self._senders(socket.AF_INET, [one for one in some if len(one) == 12])
            v6 = self._senders(socket.AF_INET6, some)
            for one in some:
                port = one[-4:-2]
                if len(one) != 12:
                    answer[one] = [sender for local, _, sender in v6.get(port, ()) if local[:12] != MAPPED]
                    continue
                answer[one] = [sender for _, _, sender in v4.get(port, ())] + [
                    sender
                    for local, is_v6_only, sender in v6.get(port, ())
                    if not is_v6_only and (local == ANY or local[:12] == MAPPED)
                ]
        if four_tuples:
            self.walk_s = time.perf_counter() - began
        return answer

    def find_bound(self, port: int) -> list[Bound]:
        """Every socket that takes what comes to this local port, on whichever address and device.

        Walks the kernel's tables of UDP sockets and of listeners.

        Raises:
            KernelError: sock_diag cannot answer.
        """
        return [
            Bound(protocol, _unmapped(local[:size]), one)
            for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16))
            for protocol, state in ((socket.IPPROTO_UDP, CLOSE), (socket.IPPROTO_TCP, LISTEN))
            for _, local, _, one in self._dump(family, protocol, [port.to_bytes(2, "big")], 1 << state)
        ]

    def destroy(self, protocol: int, four_tuple: bytes, cookie: bytes | None = None) -> bool:
        """End the socket that sends this flow, but none other; a listener never. Whether there was one.

        Of several UDP sockets on one port only the one that `find` names can be ended.

        Args:
            protocol: TCP or UDP.
            four_tuple: as the sender writes it, 12 or 36 bytes.
            cookie: the socket's, as it was found; None: whichever sends the flow now.

        Raises:
            KernelError: the kernel cannot, or may not for us, or sock_diag fails.
        """
        found = self.find(protocol, four_tuple)
        if found is None or found.state == LISTEN or cookie not in (None, found.cookie):
            return False
        size = 4 if len(four_tuple) == 12 else 16
        family = socket.AF_INET if size == 4 else socket.AF_INET6
        source, destination = four_tuple[:size], four_tuple[size : 2 * size]
        ports = four_tuple[-4:-2], four_tuple[-2:]
        flags = NLM_F_REQUEST | NLM_F_ACK
        self._ask(flags, family, protocol, *ports, source, destination, SOCK_DESTROY, found.cookie)
        self._receive()
        code = -unpack_errno(self._answer, ERRNO_AT)[0]
        if code == errno.EOPNOTSUPP:
            raise self._failure(code, CANNOT_DESTROY)
        if code not in (0, errno.ENOENT):  # none, or its cookie is another
            raise self._failure(code)
        self._destroyed += not code
        return not code

    def is_bound(self, protocol: int, version: int, port: int) -> bool:
        """Whether any TCP or UDP socket has this local port, on any address of this IP version.

        Asked by binding a socket for a moment. Exact requests are blind to sockets that are bound but do not
        listen, to those connected to some peer, and to those bound to a device; bind() sees what the
        kernel's own choice of ports sees, dual-stack sockets included, and costs the same.
        """
        try:
            probe = PlainSocket(*PROBES[version, protocol])
        except OSError as error:
            raise KernelError(f"a socket to ask for port {port}: {error.strerror}") from error
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise KernelError(f"bind to port {port}: {error.strerror}") from error
        finally:
            probe.close()
        return False

    def statistics(self) -> dict[str, int]:
        """How many requests found a socket, found none, ended one, failed; how many late answers were thrown away."""
        return {
            "found": self._found,
            "missed": self._missed,
            "destroyed": self._destroyed,
            "failed": self._failed,
            "stale": self._stale,
        }

    def _prove(self) -> None:
        """Find sockets of our own: a kernel that lacks a protocol's half of sock_diag finds none, and says no more."""
        for kind, protocol in ((socket.SOCK_DGRAM, socket.IPPROTO_UDP), (socket.SOCK_STREAM, socket.IPPROTO_TCP)):
            with socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC) as own:
                own.bind(("", 0))
                if protocol == socket.IPPROTO_TCP:
                    own.listen()
                found = self.find(protocol, bytes(8) + own.getsockname()[1].to_bytes(2) + NO_PORT)
                if found is None or found.inode != os.fstat(own.fileno()).st_ino:
                    raise KernelError(f"sock_diag does not find a socket of our own ({OPTIONS})")

    def _find(
        self, family: int, protocol: int, sport: bytes, dport: bytes, source: bytes, destination: bytes
    ) -> Socket | None:
        self._ask(NLM_F_REQUEST, family, protocol, sport, dport, source, destination)
        self._receive()
        _, kind, _, _, state, _, _, interface, cookie, uid, inode = unpack_answer(self._answer)
        if kind == NLMSG_ERROR:
            code = -unpack_errno(self._answer, ERRNO_AT)[0]
            if code == errno.ENOENT:
                self._missed += 1
                return None
            raise self._failure(code)
        self._found += 1
        return Socket(inode, uid, cookie, state, interface)

    def _senders(self, family: int, four_tuples: Sequence[bytes]) -> dict[bytes, list[tuple[bytes, bool, Socket]]]:
        """The UDP sockets on the source port of each, but for those bound to another device; by port."""
        senders: dict[bytes, list[tuple[bytes, bool, Socket]]] = {}
        ports = list({one[-4:-2] for one in four_tuples})
        for port, local, is_v6_only, one in self._dump(family, socket.IPPROTO_UDP, ports, ALL_STATES) if ports else ():
            if one.interface in (0, self.interface):
                senders.setdefault(port, []).append((local, is_v6_only, one))
        return senders

    def _dump(
        self, family: int, protocol: int, ports: Sequence[bytes], states: int
    ) -> Iterator[tuple[bytes, bytes, bool, Socket]]:
        """Local port and address, whether it is for IPv6 alone, and the socket itself, of each on these ports."""
        only, some = (ports[0], b"") if len(ports) == 1 else (NO_PORT, filter_of(ports))
        flags = NLM_F_REQUEST | NLM_F_DUMP
        self._ask(flags, family, protocol, only, NO_PORT, b"", b"", states=states, attributes=some)
        answer = self._answer
        while True:
            size, at = self._receive(), 0
            while at < size:
                length, kind, _ = unpack_header(answer, at)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    raise self._failure(-unpack_errno(answer, at + ERRNO_AT)[0])
                _, _, _, _, state, port, local, interface, cookie, uid, inode = unpack_answer(answer, at)
                is_v6_only = self._attribute(INET_DIAG_SKV6ONLY, at, length)
                one = Socket(inode, uid, cookie, state, interface)
                yield port, local, bool(is_v6_only and answer[is_v6_only]), one
                at += length + 3 & ~3

    def _ask(
        self,
        flags: int,
        family: int,
        protocol: int,
        sport: bytes,
        dport: bytes,
        source: bytes,
        destination: bytes,
        kind: int = SOCK_DIAG_BY_FAMILY,
        cookie: bytes = NO_COOKIE,
        states: int = ALL_STATES,
        attributes: bytes = b"",
    ) -> None:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        request = pack_request(
            REQUEST_SIZE + len(attributes), kind, flags, self._sequence, 0,
            family, protocol, 0, states, sport, dport, source, destination, self.interface, cookie,
        )  # fmt: skip
        try:
            self._socket.send(request + attributes)
        except OSError as error:
            raise self._failure(error.errno) from error

    def _receive(self) -> int:
        """Size of the answer to the request just sent, in `_answer`. It lies there already."""
        while True:
            try:
                size = self._socket.recv_into(self._answer)
            except OSError as error:
                raise self._failure(error.errno) from error
            if unpack_header(self._answer)[2] == self._sequence:
                return size
            self._stale += 1  # of a dump that was given up midway

    def _attribute(self, wanted: int, at: int, length: int) -> int | None:
        """Where the value of an attribute lies, in the answer at `at`."""
        place, end = at + ATTRIBUTES_AT, at + length
        while place < end:
            size, kind = unpack_attribute(self._answer, place)
            if kind == wanted:
                return place + 4
            place += max(size, 4) + 3 & ~3
        return None

    def _failure(self, code: int | None, remedy: str = "") -> KernelError:
        self._failed += 1
        return KernelError(f"sock_diag: {os.strerror(code or 0)}" + (f" ({remedy})" if remedy else ""))


def _unmapped(address: bytes) -> bytes:
    return address[12:] if len(address) == 16 and address[:12] == MAPPED else address
