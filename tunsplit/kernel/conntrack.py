"""What the kernel's connection tracking knows of a flow: exact requests to ctnetlink.

Some facts about ctnetlink (net/netfilter/nf_conntrack_netlink.c, ctnetlink_get_conntrack):

A get by tuple is one hash look-up. An entry hangs in the table by both of its tuples, so it is found by
the reply's as well as by the original's, and its answer tells which is which. Nothing is tracked in a
network namespace until a rule of its own asks for it (`ct …`), and nothing is found there.

Where the table is full, the first packet of a flow is dropped without a word (nf_conntrack_core.c, init_conntrack).
"""

import errno
import socket
from typing import NamedTuple

from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel import sysctl
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket, Refused, attribute, attributes, nested

IPCTNL_MSG_CT_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK
NFGENMSG_SIZE = 4

# linux/netfilter/nfnetlink_conntrack.h
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY = 1, 2
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST = 1, 2, 3, 4
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3

# What the kernel answers where connection tracking is not built in, or its module is absent.
ABSENT = frozenset((errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT))
MOST, OPEN = "net/netfilter/nf_conntrack_max", "net/netfilter/nf_conntrack_count"
FEW = 16_384  # connections; a browser and a file sharer come to a few thousand
NEARLY = 0.9  # of all

# In the place of what each request has of its own.
_SOURCE, _DESTINATION, _PROTOCOL, _SPORT, _DPORT = b"\xf1" * 4, b"\xf2" * 4, b"\xf3", b"\xf4" * 2, b"\xf5" * 2


class Tuple(NamedTuple):
    """One direction of a tracked flow: packed addresses, ports as numbers."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int


class Entry(NamedTuple):
    """A tracked flow; `original` is the direction of its first packet, `reply` its mirror unless NAT is at work."""

    original: Tuple
    reply: Tuple


class Conntrack(Closing):
    """Exact look-ups in the network namespace that it was made in.

    Raises:
        PermissionMissing: this process may not ask there.
        KernelError: ctnetlink cannot answer.
    """

    def __init__(self) -> None:
        self._socket: NetlinkSocket | None = None
        try:
            self._socket = NetlinkSocket(NETLINK_NETFILTER)
            self.find(socket.IPPROTO_UDP, bytes(4), bytes(4), 0, 0)
        except Refused as error:
            self.close()
            if error.errno == errno.EPERM:
                raise PermissionMissing(
                    f"{error}: CAP_NET_ADMIN counts in the user namespace that owns this network namespace; start "
                    "tunsplit outside of its user namespace, or make the network namespace inside it"
                ) from error
            if error.errno not in ABSENT:
                raise
        except KernelError:  # no netfilter in this kernel
            self.close()

    @property
    def available(self) -> bool:
        """Whether this kernel tracks connections."""
        return self._socket is not None

    def close(self) -> None:
        """Give the netlink socket back."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def has_entry(self, protocol: int, source: bytes, destination: bytes, sport: int, dport: int) -> bool:
        """Whether a packet of these would belong to a flow that the kernel knows, in either direction."""
        return self._look_up(protocol, source, destination, sport, dport) is not None

    def find(self, protocol: int, source: bytes, destination: bytes, sport: int, dport: int) -> Entry | None:
        """The tracked TCP or UDP flow that such a packet belongs to.

        Args:
            protocol: TCP or UDP.
            source: packed, 4 or 16 bytes.
            destination: packed, 4 or 16 bytes.
            sport: its port.
            dport: its port.

        Raises:
            KernelError: ctnetlink cannot answer.
        """
        answer = self._look_up(protocol, source, destination, sport, dport)
        if answer is None:
            return None
        src, dst, _ = _LAYOUTS[len(source)]
        found = attributes(answer, NFGENMSG_SIZE)
        return Entry(_parse_tuple(found[CTA_TUPLE_ORIG], src, dst), _parse_tuple(found[CTA_TUPLE_REPLY], src, dst))

    def _look_up(self, protocol: int, source: bytes, destination: bytes, sport: int, dport: int) -> bytes | None:
        if self._socket is None:
            return None
        _, _, (first, second, third, fourth, fifth, last) = _LAYOUTS[len(source)]
        body = b"".join((
            first, source, second, destination, third, bytes((protocol,)),
            fourth, sport.to_bytes(2), fifth, dport.to_bytes(2), last,
        ))  # fmt: skip
        return self._socket.look_up("conntrack", IPCTNL_MSG_CT_GET, body)


def shortage() -> str | None:
    """What is to be known of the room for tracked connections, in a sentence; None: there is enough, or no tracking."""
    try:
        most, count = sysctl.read(MOST), sysctl.read(OPEN)
    except KernelError as error:
        return f"whether connection tracking has room cannot be known: {error}"
    if most is None or count is None or (int(most) >= FEW and int(count) < NEARLY * int(most)):
        return None
    return (
        f"connection tracking has room for {int(most):,} connections, and {int(count):,} are open: with more, whatever "
        "opens is dropped; set net.netfilter.nf_conntrack_max higher"
    )


def _parse_tuple(data: bytes, src: int, dst: int) -> Tuple:
    parts = attributes(data)
    addresses, ports = attributes(parts[CTA_TUPLE_IP]), attributes(parts[CTA_TUPLE_PROTO])
    return Tuple(
        addresses[src],
        addresses[dst],
        int.from_bytes(ports[CTA_PROTO_SRC_PORT]),
        int.from_bytes(ports[CTA_PROTO_DST_PORT]),
    )


def _layout(family: int, size: int, src: int, dst: int) -> tuple[int, int, list[bytes]]:
    """A request for addresses of this size, cut at what each has of its own; and the attributes of the addresses."""
    source, destination = _SOURCE * (size // 4), _DESTINATION * (size // 4)
    request = bytes((family, 0, 0, 0)) + nested(  # struct nfgenmsg: version and resource id are 0
        CTA_TUPLE_ORIG,
        nested(CTA_TUPLE_IP, attribute(src, source), attribute(dst, destination)),
        nested(
            CTA_TUPLE_PROTO,
            attribute(CTA_PROTO_NUM, _PROTOCOL),
            attribute(CTA_PROTO_SRC_PORT, _SPORT),
            attribute(CTA_PROTO_DST_PORT, _DPORT),
        ),
    )
    pieces = []
    for own in (source, destination, _PROTOCOL, _SPORT, _DPORT):
        piece, _, request = request.partition(own)
        pieces.append(piece)
    return src, dst, [*pieces, request]


_LAYOUTS = {
    4: _layout(socket.AF_INET, 4, CTA_IP_V4_SRC, CTA_IP_V4_DST),
    16: _layout(socket.AF_INET6, 16, CTA_IP_V6_SRC, CTA_IP_V6_DST),
}
