"""Which sockets died: sock_diag's destroy groups (net/core/sock_diag.c, sock_diag_broadcast_destroy).

Some facts about these messages, each a test in tests/facts/:

A message is sent when the last reference to a full socket is gone: for TCP that may be long after
close(), and TIME_WAIT counts as dead. It names the socket by its cookie, which is never given twice. It
comes from a work queue, so it may arrive after the first packet of the next socket on the same port: what
hangs on that asks for the cookie by an exact request too. It names the local port that the socket had last: none of
one that was not bound by name, and has given its port back by connect() to AF_UNSPEC before.

Listening makes the kernel describe every socket that dies in our network namespace, and no other.
"""

import errno
import socket
from struct import Struct
from typing import NamedTuple

from tunsplit.kernel.netlinkevents import NetlinkEvents
from tunsplit.kernel.sockdiag import ATTRIBUTES_AT, NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, unpack_attribute

# linux/sock_diag.h SKNLGRP_INET_TCP_DESTROY and INET6_TCP, INET_UDP and INET6_UDP
GROUPS = {socket.IPPROTO_TCP: (1, 3), socket.IPPROTO_UDP: (2, 4)}
INET_DIAG_PROTOCOL = 10
BUFFER = 1 << 20  # a message of TCP takes 1 KiB of it
BATCH = 512  # messages read before others get their turn: under 2 ms

unpack_kind = Struct("=H").unpack_from
KIND_AT = 4
PORT = slice(20, 22)
COOKIE = slice(60, 68)


class Death(NamedTuple):
    """A socket that is no more."""

    protocol: int
    port: bytes  # the local one, two bytes as on the wire
    cookie: bytes


class SocketDeaths(NetlinkEvents):
    """Sockets of these protocols in the network namespace that it was made in, as they die.

    Attributes:
        overruns: how often some were lost because nobody read.
    """

    def __init__(self, *protocols: int) -> None:
        groups = [group for protocol in protocols for group in GROUPS[protocol]]
        super().__init__("sock_diag: news of dead sockets", NETLINK_SOCK_DIAG, groups, queue=BUFFER)
        self._message = bytearray(4096)
        self._deaths = self.overruns = 0

    def read(self) -> list[Death]:
        """Who died since, at most `BATCH`; what was lost is counted.

        Raises:
            KernelError: no more news will come.
        """
        deaths: list[Death] = []
        for _ in range(BATCH):
            try:
                size = self._socket.recv_into(self._message)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise self._failed(error) from error
                self.overruns += 1
                continue
            if (death := parse_death(self._message, size)) is not None:
                deaths.append(death)
        self._deaths += len(deaths)
        return deaths

    def statistics(self) -> dict[str, int]:
        """How many deaths were told, and how often some were lost because nobody read."""
        return {"deaths": self._deaths, "overruns": self.overruns}


def parse_death(message: bytes | bytearray, size: int) -> Death | None:
    """The dead socket; None when the message tells of none."""
    if size < ATTRIBUTES_AT or unpack_kind(message, KIND_AT)[0] != SOCK_DIAG_BY_FAMILY:
        return None
    at = ATTRIBUTES_AT
    while at + 5 <= size:
        length, kind = unpack_attribute(message, at)
        if kind == INET_DIAG_PROTOCOL:
            return Death(message[at + 4], bytes(message[PORT]), bytes(message[COOKIE]))
        at += max(length, 4) + 3 & ~3
    return None
