"""Which socket a packet came from: exact sock_diag requests.

Some facts about sock_diag (net/ipv4/inet_diag.c, tcp_diag.c, udp_diag.c), each a test in tests/facts/:

An exact request is one look-up in the kernel's own hash tables, and the answer lies in our queue when
send() returns: no wait, no event loop. A dump, even of one port, walks the whole table: for TCP 100 times
as dear, for UDP ten times.

The look-up is the one for an incoming packet. So a UDP request wants the flow turned round, remote
address first; in plain order it finds an innocent socket bound to the *remote* port, therefore that
order is never tried. So TCP falls back to the listener on the local port when no connection fits: the
state tells. And a socket bound to a device is found only if that device is named; naming one finds
unbound sockets as well.

IPv4 flows of dual-stack IPv6 sockets are found by AF_INET. A connection that nobody accepted yet, one
in TIME_WAIT and one whose process closed it have inode 0. Several UDP sockets on one port: an exact
request names one of them, `find_all` all. Sockets of other network namespaces are never found.
"""

import errno
import os
import socket
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from tunsplit.errors import KernelError
from tunsplit.kernel.netlink import ATTRIBUTE, ERROR, HEADER, NLM_F_REQUEST, NLMSG_ERROR, NetlinkSocket

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
INET_DIAG_CGROUP_ID = 21  # since Linux 5.7: the inode of the cgroup's directory in cgroup v2

# linux/tcp.h; UDP sockets are ESTABLISHED when connected, else CLOSE.
ESTABLISHED, SYN_SENT, SYN_RECV, TIME_WAIT, CLOSE, LISTEN = 1, 2, 3, 6, 7, 10

IP_FREEBIND, IPV6_FREEBIND = 15, 78

# nlmsghdr: length · type · flags · sequence · port, and
# inet_diag_req_v2: family · protocol · extensions · states · ports · addresses · device · cookie
pack_request = Struct("=IHHIIBBBxI2s2s16s16sI8s").pack
REQUEST_SIZE = 72
ALL_STATES = 0xFFFFFFFF
NO_COOKIE = b"\xff" * 8

# inet_diag_msg: state · ports · addresses · device · cookie · uid · inode
unpack_answer = Struct("=xBxx2s2s16s16sI8s12xII").unpack_from
ATTRIBUTES_AT = 72
unpack_u64 = Struct("=Q").unpack_from

NO_PORT = bytes(2)
MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, an IPv4 address as a dual-stack socket has it (RFC 4291 §2.5.5.2)


class Socket(NamedTuple):
    """A socket as the kernel describes it. `uid` is that of its creation: no proof of who uses it now."""

    inode: int  # 0: no process holds it, or none yet
    uid: int
    cookie: bytes  # 8 bytes, never given twice while the system runs
    state: int
    cgroup_id: int | None  # None: the kernel does not say
    interface: int  # index of the device that it is bound to, or 0


class SockDiag:
    """Exact look-ups in the network namespace that it was made in. For one thread.

    `interface` is the index of the device that the flows in question come in by: sockets bound to it
    are found too, sockets bound to another are not.
    """

    def __init__(self, interface: int = 0) -> None:
        self.interface = interface
        self._sequence = 0
        self._found = self._missed = self._failed = self._stale = 0
        self._answer = bytearray(8192)  # an answer is 200 bytes
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
            self._socket.setblocking(False)
        except OSError as error:
            raise KernelError(f"sock_diag: {error.strerror} (CONFIG_INET_DIAG, CONFIG_INET_UDP_DIAG)") from error
        self._dumps = NetlinkSocket(NETLINK_SOCK_DIAG)

    def close(self) -> None:
        """Give the netlink sockets back."""
        self._socket.close()
        self._dumps.close()

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
        """Every UDP socket that could have sent this flow. Walks the kernel's table: not for every packet.

        Several can: with SO_REUSEPORT or SO_REUSEADDR, or one bound to the address beside one bound to all.
        """
        size = 4 if len(four_tuple) == 12 else 16
        source, destination = four_tuple[:size], four_tuple[size : 2 * size]
        source_port, destination_port = four_tuple[-4:-2], four_tuple[-2:]
        found = []
        for family in (socket.AF_INET, socket.AF_INET6) if size == 4 else (socket.AF_INET6,):
            prefix = MAPPED if size == 4 and family == socket.AF_INET6 else b""
            locals_ = (bytes(16), (prefix + source).ljust(16, b"\0"))
            remotes = ((NO_PORT, bytes(16)), (destination_port, (prefix + destination).ljust(16, b"\0")))
            for local, remote_port, remote, sender in self._dump_udp(family, source_port):
                if local in locals_ and (remote_port, remote) in remotes and sender.interface in (0, self.interface):
                    found.append(sender)
        return found

    def is_bound(self, protocol: int, address: bytes, port: int) -> bool:
        """Whether any TCP or UDP socket has this local port, on this address or on all of them.

        Asked by binding a socket for a moment. Exact requests are blind to sockets that are bound but do not
        listen, to those connected to some peer, and to those bound to a device; bind() sees what the
        kernel's own choice of ports sees, dual-stack sockets included, and costs the same.
        """
        version4 = len(address) == 4
        family = socket.AF_INET if version4 else socket.AF_INET6
        kind = socket.SOCK_STREAM if protocol == socket.IPPROTO_TCP else socket.SOCK_DGRAM
        try:
            with socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol) as probe:
                # The side's address may have left the host a moment ago.
                if version4:
                    probe.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
                else:
                    probe.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
                probe.bind((socket.inet_ntop(family, address), port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise KernelError(f"bind to port {port}: {error.strerror}") from error
        return False

    def statistics(self) -> dict[str, int]:
        """How many requests found a socket, found none, failed; how many late answers were thrown away."""
        return {"found": self._found, "missed": self._missed, "failed": self._failed, "stale": self._stale}

    def _find(
        self, family: int, protocol: int, sport: bytes, dport: bytes, source: bytes, destination: bytes
    ) -> Socket | None:
        try:
            self._socket.send(self._request(family, protocol, sport, dport, source, destination))
            length, kind = self._receive()
        except OSError as error:
            raise self._failure(error.errno) from error
        if kind == NLMSG_ERROR:
            code = -ERROR.unpack_from(self._answer, HEADER.size)[0]
            if code == errno.ENOENT:
                self._missed += 1
                return None
            raise self._failure(code)
        self._found += 1
        return _parse(self._answer, HEADER.size, length)[3]

    def _dump_udp(self, family: int, port: bytes) -> Iterator[tuple[bytes, bytes, bytes, Socket]]:
        """Local address, remote port and address, and the socket itself, of each on this local port."""
        request = self._request(family, socket.IPPROTO_UDP, port, NO_PORT, b"", b"")[HEADER.size :]
        for _, body in self._dumps.dump("sock_diag", SOCK_DIAG_BY_FAMILY, request):
            yield _parse(body, 0, len(body))

    def _request(
        self, family: int, protocol: int, sport: bytes, dport: bytes, source: bytes, destination: bytes
    ) -> bytes:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        return pack_request(
            REQUEST_SIZE, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, self._sequence, 0,
            family, protocol, 0, ALL_STATES, sport, dport, source, destination, self.interface, NO_COOKIE,
        )  # fmt: skip

    def _receive(self) -> tuple[int, int]:
        """Length and type of the answer to the request just sent, in `_answer`. It lies there already."""
        while True:
            self._socket.recv_into(self._answer)
            length, kind, _, sequence, _ = HEADER.unpack_from(self._answer)
            if sequence == self._sequence:
                return length, kind
            self._stale += 1

    def _failure(self, code: int | None) -> KernelError:
        self._failed += 1
        return KernelError(f"sock_diag: {os.strerror(code or 0)}")


def _parse(answer: bytes | bytearray, at: int, end: int) -> tuple[bytes, bytes, bytes, Socket]:
    """Local address, remote port and address, and the socket, of the inet_diag_msg at `at`."""
    state, _, remote_port, local, remote, interface, cookie, uid, inode = unpack_answer(answer, at)
    cgroup_id = None
    attribute = at + ATTRIBUTES_AT
    while attribute < end:
        size, kind = ATTRIBUTE.unpack_from(answer, attribute)
        if kind == INET_DIAG_CGROUP_ID:
            (cgroup_id,) = unpack_u64(answer, attribute + ATTRIBUTE.size)
            break
        attribute += max(size, ATTRIBUTE.size) + 3 & ~3
    return local, remote_port, remote, Socket(inode, uid, cookie, state, cgroup_id, interface)
