"""The policies of IPsec for what leaves, and news of their changes.

Some facts about them (net/xfrm/xfrm_user.c, xfrm_policy.c; include/uapi/linux/xfrm.h):

What leaves by IP is looked up among them by its addresses, protocol and ports: the policy of the lowest priority
number counts, of equals the older one. One without templates lets pass as it is, one that blocks drops. Packet
sockets send below that. Policies with an interface id are those of an xfrm device, which is no affair of other devices.
A kernel may have no IPsec.
"""

import errno
import socket
import struct
from ipaddress import ip_network

from tunsplit.errors import KernelError
from tunsplit.host import IpsecPolicy
from tunsplit.kernel.netlink import NetlinkSocket, Refused, attributes
from tunsplit.kernel.netlinkevents import NetlinkEvents

NETLINK_XFRM = 6
XFRM_MSG_NEWPOLICY, XFRM_MSG_GETPOLICY = 0x13, 0x15
XFRMNLGRP_POLICY = 4
XFRM_POLICY_OUT = 1
XFRM_POLICY_ALLOW = 0
XFRMA_TMPL, XFRMA_MARK, XFRMA_IF_ID = 5, 21, 31

POLICY_ID_SIZE = 64  # struct xfrm_userpolicy_id, which says nothing in a dump
POLICY_INFO_SIZE = 168  # struct xfrm_userpolicy_info
# struct xfrm_selector, as far as it is used: addresses · destination port and mask, big-endian · source port and mask ·
# family · prefixes · protocol · device; then lifetimes · priority · index · direction · action
unpack_selector = struct.Struct("=16s16s2s2s4xHBBB3xI").unpack_from
unpack_rest = struct.Struct("=I4xBB").unpack_from
REST_AT = 152
SIZES = {socket.AF_INET: 4, socket.AF_INET6: 16}

ABSENT = frozenset((errno.EPROTONOSUPPORT, errno.ECONNREFUSED))


def follow() -> "XfrmEvents | None":
    """Have changes of policies told; None where the kernel has no IPsec.

    Raises:
        KernelError: they are not told.
    """
    try:
        return XfrmEvents()
    except KernelError as error:
        if _is_absent(error):
            return None
        raise


def policies() -> tuple[IpsecPolicy, ...]:
    """Every policy for what leaves, the first that counts first; none where the kernel has no IPsec.

    Raises:
        KernelError: they cannot be known.
    """
    try:
        with NetlinkSocket(NETLINK_XFRM) as netlink:
            answers = netlink.dump("IPsec policies", XFRM_MSG_GETPOLICY, bytes(POLICY_ID_SIZE))
    except KernelError as error:
        if _is_absent(error):
            return ()
        raise
    answers.reverse()  # the newest comes first in a dump
    found = [policy for kind, body in answers if kind == XFRM_MSG_NEWPOLICY and (policy := parse_policy(body))]
    return tuple(sorted(found, key=lambda one: one.priority))


def _is_absent(error: KernelError) -> bool:
    number = error.errno if isinstance(error, Refused) else getattr(error.__cause__, "errno", None)
    return number in ABSENT


def parse_policy(body: bytes) -> IpsecPolicy | None:
    """Read struct xfrm_userpolicy_info and its attributes; None: it is not for what leaves by ordinary devices.

    Raises:
        KernelError: this is no such message.
    """
    try:
        target, source, port, mask, family, target_bits, source_bits, protocol, device = unpack_selector(body)
        priority, direction, action = unpack_rest(body, REST_AT)
        further = attributes(body, POLICY_INFO_SIZE)
    except struct.error as error:
        raise KernelError("IPsec policies: a message is cut") from error
    if direction != XFRM_POLICY_OUT or family not in SIZES or any(further.get(XFRMA_IF_ID, b"")):
        return None
    value_and_mask = further.get(XFRMA_MARK, bytes(8))
    if any(value_and_mask[:4]):  # what apps send carries no mark
        return None
    size = SIZES[family]
    return IpsecPolicy(
        ip_network((source[:size], source_bits), strict=False),
        ip_network((target[:size], target_bits), strict=False),
        protocol,
        int.from_bytes(port),
        int.from_bytes(mask),
        device,
        priority,
        demands=action != XFRM_POLICY_ALLOW or XFRMA_TMPL in further,
    )


class XfrmEvents(NetlinkEvents):
    """Tells that policies have changed."""

    def __init__(self) -> None:
        super().__init__("IPsec policies", NETLINK_XFRM, (XFRMNLGRP_POLICY,))

    def any(self) -> bool:
        """Whether anything has changed since the last call, or may have."""
        return bool(list(self._datagrams()))
