"""Which sockets died: sock_diag's destroy groups (net/core/sock_diag.c, sock_diag_broadcast_destroy).

Some facts about these messages, each a test in tests/facts/:

A message is sent when the last reference to a full socket is gone: for TCP that may be long after
close(), and TIME_WAIT counts as dead. It names the socket by its cookie, which is never given twice. It
comes from a work queue, so it may arrive after the first packet of the next socket on the same port: what
hangs on that asks for the cookie by an exact request, and a message only frees what is held for the dead.

Listening makes the kernel describe every socket that dies in our network namespace, and no other.
"""

import errno
import socket
from struct import Struct

from tunsplit.errors import KernelError
from tunsplit.kernel.sockdiag import ATTRIBUTES_AT, NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, unpack_attribute

SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
# linux/sock_diag.h SKNLGRP_INET_TCP_DESTROY and INET6_TCP, INET_UDP and INET6_UDP
GROUPS = {socket.IPPROTO_TCP: (1, 3), socket.IPPROTO_UDP: (2, 4)}
INET_DIAG_PROTOCOL = 10
SO_RCVBUFFORCE = 33
BUFFER = 1 << 20  # a message of TCP takes 1 KiB of it
BATCH = 512  # messages read before others get their turn: under 2 ms

unpack_kind = Struct("=H").unpack_from
KIND_AT = 4
COOKIE = slice(60, 68)


class SocketDeaths:
    """Sockets of these protocols in the network namespace that it was made in, as they die."""

    def __init__(self, *protocols: int) -> None:
        self._message = bytearray(4096)
        self._deaths = self._overruns = 0
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_SOCK_DIAG
            )
        except OSError as error:
            raise KernelError(f"sock_diag: {error.strerror}") from error
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
            # Unbound, our port number would be 0, the kernel's own, and no group sends to its sender.
            self._socket.bind((0, 0))
            for group in (group for protocol in protocols for group in GROUPS[protocol]):
                self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except OSError as error:
            self.close()
            raise KernelError(f"sock_diag: news of dead sockets: {error.strerror}") from error

    def fileno(self) -> int:
        """What becomes readable when a socket has died."""
        return self._socket.fileno()

    def close(self) -> None:
        """Give the netlink socket back."""
        self._socket.close()

    def read(self) -> list[tuple[int, bytes]]:
        """Protocol and cookie of who died since, at most `BATCH`; what was lost is counted.

        Raises:
            KernelError: no more news will come.
        """
        deaths: list[tuple[int, bytes]] = []
        for _ in range(BATCH):
            try:
                size = self._socket.recv_into(self._message)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(f"sock_diag: news of dead sockets: {error.strerror}") from error
                self._overruns += 1
                continue
            if (death := parse_death(self._message, size)) is not None:
                deaths.append(death)
        self._deaths += len(deaths)
        return deaths

    def statistics(self) -> dict[str, int]:
        """How many deaths were told, and how often some were lost because nobody read."""
        return {"deaths": self._deaths, "overruns": self._overruns}


def parse_death(message: bytes | bytearray, size: int) -> tuple[int, bytes] | None:
    """Protocol and cookie of a dead socket; None when the message tells of none."""
    if size < ATTRIBUTES_AT or unpack_kind(message, KIND_AT)[0] != SOCK_DIAG_BY_FAMILY:
        return None
    at = ATTRIBUTES_AT
    while at + 5 <= size:
        length, kind = unpack_attribute(message, at)
        if kind == INET_DIAG_PROTOCOL:
            return message[at + 4], bytes(message[COOKIE])
        at += max(length, 4) + 3 & ~3
    return None
