"""Ends sockets by their local address (SOCK_DESTROY, net/ipv4/inet_diag.c).

Some facts about sockets that outlive their address:

- An IPv6 socket goes on sending with an address that the host no longer has; an IPv4 one gets EINVAL.
- What SOCK_DESTROY does to a socket, kernel/sockdiag.py says. A dump gives each with its cookie: no stranger is hit.
- The kernel may lack it (CONFIG_INET_DIAG_DESTROY): EOPNOTSUPP.
"""

import errno
import socket
import struct
from collections.abc import Iterable

from tunsplit.host import IPAddress
from tunsplit.kernel.netlink import NetlinkSocket, Refused
from tunsplit.kernel.sockdiag import ALL_STATES, MAPPED, NETLINK_SOCK_DIAG, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY

REQUEST = struct.Struct("=BBBxI48s")  # family · protocol · extensions · states · socket's identity
# inet_diag_msg: family, state, timer, retransmissions; then the identity: ports, source, destination, device, cookie
IDENTITY = slice(4, 52)
SOURCE = slice(8, 24)
FAMILIES = (socket.AF_INET, socket.AF_INET6)
PROTOCOLS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)

GONE = (errno.ENOENT, errno.EOPNOTSUPP)


def end_sockets(addresses: Iterable[IPAddress]) -> int:
    """End the TCP and UDP sockets of the calling thread's network namespace that use these local addresses.

    Returns:
        How many were ended. On a kernel that cannot, none.

    Raises:
        KernelError: the kernel refused for another reason.
    """
    four = [address.packed for address in addresses if address.version == 4]
    six = [address.packed for address in addresses if address.version == 6]
    sources = {
        socket.AF_INET: {packed + bytes(12) for packed in four},
        socket.AF_INET6: {*six, *(MAPPED + packed for packed in four)},
    }
    ended = 0
    with NetlinkSocket(NETLINK_SOCK_DIAG) as netlink:
        for family in FAMILIES:
            for protocol in PROTOCOLS:
                question = REQUEST.pack(family, protocol, 0, ALL_STATES, bytes(48))
                for _, found in netlink.dump("list of sockets", SOCK_DIAG_BY_FAMILY, question):
                    if found[SOURCE] in sources[family]:
                        ended += _end(netlink, REQUEST.pack(family, protocol, 0, ALL_STATES, found[IDENTITY]))
    return ended


def _end(netlink: NetlinkSocket, request: bytes) -> bool:
    try:
        netlink.request("end of a socket", SOCK_DESTROY, 0, request)
    except Refused as refused:
        if refused.errno in GONE:
            return False
        raise
    return True
