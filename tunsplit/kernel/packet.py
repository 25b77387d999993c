"""Packet sockets: how packets leave and enter on a side, below the kernel's own IP stack.

Some facts about AF_PACKET:
- PACKET_VNET_HDR puts a virtio_net_hdr in front of each frame, both ways; only on SOCK_RAW. Super-packets
  and unfinished checksums then pass as they are. On a device without link layer (a tunnel) the frame
  begins with the IP header.
- Bound to ETH_P_ALL it is served before netfilter's ingress and prerouting, so what we drop there for
  the kernel's sake still reaches us. Bound to ETH_P_IP it would come after netdev ingress.
- PACKET_IGNORE_OUTGOING spares us our own frames.
- The filter runs before the frame is queued: all traffic that cannot be ours costs no Python. It sees
  frames tagged for a VLAN as plain IP, frames for other hosts, and IP in broadcast frames: it has to
  look at the packet type and the tag itself (net/packet/af_packet.c, SKF_AD_* in linux/filter.h).
- There is no backpressure to the flow that we carry: EAGAIN and ENOBUFS are a dropped packet.
"""

import io
import socket
import struct
from dataclasses import dataclass

from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel.closing import Closing
from tunsplit.names import FRAME_PRIORITY
from tunsplit.wire.ip import DESTINATION_OPTIONS, FRAGMENT_HEADER, HOP_BY_HOP, ICMP, ICMPV6, ROUTING, TCP, UDP

# include/uapi/linux/if_packet.h, asm-generic/socket.h
SOL_PACKET = 263
PACKET_STATISTICS, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 6, 15, 23
SO_ATTACH_FILTER, SO_LOCK_FILTER, SO_SNDBUFFORCE, SO_RCVBUFFORCE = 26, 44, 32, 33
ETH_P_ALL = 0x0003

QUEUE = 16 << 20  # bytes either way: 250 super-packets; more would only be delay

# Classic BPF (linux/bpf_common.h, linux/filter.h).
_LD_W, _LD_H, _LD_B, _LDX_MSH, _JEQ, _JGE, _JSET, _RET = 0x20, 0x28, 0x30, 0xB1, 0x15, 0x35, 0x45, 0x06
_LD_IND_H, _LD_IND_B = 0x48, 0x50
_AD = 0xFFFFF000  # SKF_AD_OFF
_AD_PROTOCOL, _AD_PKTTYPE, _AD_VLAN_TAG_PRESENT = _AD, _AD + 4, _AD + 48
_PACKET_HOST = 0
_ETH_P_IP, _ETH_P_IPV6 = 0x0800, 0x86DD

Step = tuple[int, int, str, str]  # code, operand, label if true, label if false


def inbound_filter(first_port: int, protocols: frozenset[int], *, ethernet: bool) -> bytes:
    """The program that passes only what may be ours, as an array of `struct sock_filter`.

    Ours may be: addressed to this host and untagged; TCP and UDP to `first_port` and above; echo replies
    with such an identifier; ICMP errors; later fragments; IPv6 with extension headers; and `protocols`.
    """
    base = 14 if ethernet else 0
    # Jumps go forward by 255 at most: what is listed comes last, where only a few steps jump over it.
    steps: list[Step | str] = [
        (_LD_B, _AD_PKTTYPE, "", ""),
        (_JEQ, _PACKET_HOST, "", "drop"),
        (_LD_B, _AD_VLAN_TAG_PRESENT, "", ""),
        (_JEQ, 0, "", "drop"),
        (_LD_H, _AD_PROTOCOL, "", ""),
        (_JEQ, _ETH_P_IPV6, "v6", ""),
        (_JEQ, _ETH_P_IP, "", "drop"),
        # IPv4
        (_LD_H, base + 6, "", ""),
        (_JSET, 0x1FFF, "pass", ""),
        (_LDX_MSH, base, "", ""),
        (_LD_B, base + 9, "", ""),
        (_JEQ, TCP, "v4ports", ""),
        (_JEQ, UDP, "v4ports", ""),
        (_JEQ, ICMP, "icmp", "others"),
        "v4ports",
        (_LD_IND_H, base + 2, "", ""),
        (_JGE, first_port, "pass", "drop"),
        "icmp",
        (_LD_IND_B, base, "", ""),
        (_JEQ, 3, "pass", ""),
        (_JEQ, 11, "pass", ""),
        (_JEQ, 12, "pass", ""),
        (_JEQ, 0, "", "drop"),
        (_LD_IND_H, base + 4, "", ""),
        (_JGE, first_port, "pass", "drop"),
        "v6",
        (_LD_B, base + 6, "", ""),
        (_JEQ, TCP, "v6ports", ""),
        (_JEQ, UDP, "v6ports", ""),
        (_JEQ, ICMPV6, "icmpv6", ""),
        (_JEQ, HOP_BY_HOP, "pass", ""),
        (_JEQ, ROUTING, "pass", ""),
        (_JEQ, FRAGMENT_HEADER, "pass", ""),
        (_JEQ, DESTINATION_OPTIONS, "pass", "others"),
        "v6ports",
        (_LD_H, base + 42, "", ""),
        (_JGE, first_port, "pass", "drop"),
        "icmpv6",
        (_LD_B, base + 40, "", ""),
        (_JEQ, 129, "icmpv6id", ""),
        (_JGE, 5, "drop", ""),
        (_JEQ, 0, "drop", "pass"),
        "icmpv6id",
        (_LD_H, base + 44, "", ""),
        (_JGE, first_port, "pass", "drop"),
        "pass",
        (_RET, 0x40000, "", ""),
        "drop",
        (_RET, 0, "", ""),
        "others",
        *((_JEQ, protocol, "listed", "") for protocol in sorted(protocols - {TCP, UDP})),
        (_RET, 0, "", ""),
        "listed",
        (_RET, 0x40000, "", ""),
    ]
    return _assemble(steps)


def _assemble(steps: list[Step | str]) -> bytes:
    places: dict[str, int] = {}
    program: list[Step] = []
    for step in steps:
        if isinstance(step, str):
            places[step] = len(program)
        else:
            program.append(step)
    code = b""
    for at, (operation, operand, yes, no) in enumerate(program):
        jumps = [places[label] - at - 1 if label else 0 for label in (yes, no)]
        code += struct.pack("=HBBI", operation, *jumps, operand)
    return code


@dataclass(slots=True)
class PacketStatistics:
    """Frames that passed the filter, and those of them that the kernel dropped because the queue was full."""

    packets: int = 0
    drops: int = 0


class PacketSocket(Closing):
    """A packet socket on one device, with virtio-net headers and the filter for what may be ours."""

    def __init__(
        self, device: str, *, ethernet: bool, first_port: int, protocols: frozenset[int] = frozenset()
    ) -> None:
        """Open and bind.

        Raises:
            PermissionMissing: CAP_NET_RAW is not there.
            KernelError: the device is gone, or an option is not known.
        """
        self.device = device
        self.ethernet = ethernet
        self._statistics = PacketStatistics()
        try:
            # Protocol 0: nothing is received before the filter is in place.
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        except PermissionError as error:
            raise PermissionMissing("a packet socket needs CAP_NET_RAW: run as root") from error
        try:
            self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            self._socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            program = inbound_filter(first_port, protocols, ethernet=ethernet)
            self._attach(program)
            for option in (SO_RCVBUFFORCE, SO_SNDBUFFORCE):
                self._socket.setsockopt(socket.SOL_SOCKET, option, QUEUE)
            # The netdev table knows our frames by it.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, FRAME_PRIORITY)
            self._socket.bind((device, ETH_P_ALL))
        except OSError as error:
            self._socket.close()
            raise KernelError(f"packet socket on {device}: {error.strerror}") from error
        self.send = self._socket.send
        self._file = io.FileIO(self._socket.fileno(), "r", closefd=False)
        # Receives one frame, virtio header first: its bytes, or None where there is none just now (an exception for
        # that would cost as much as a packet). OSError where the device went down (ENETDOWN) or away; EINVAL for a
        # super-packet of a kind that virtio cannot name.
        self.read_into = self._file.readinto

    def _attach(self, program: bytes) -> None:
        import ctypes  # only here: a pointer to the program has to be handed over

        buffer = ctypes.create_string_buffer(program)
        self._socket.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program) // 8, ctypes.addressof(buffer))
        )
        self._socket.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)

    def is_bound(self) -> bool:
        """Whether the device is still there: a new one with its index is another (af_packet.c, packet_notifier)."""
        return bool(self._socket.getsockname()[0])

    def fileno(self) -> int:
        """The file descriptor, to wait on."""
        return self._socket.fileno()

    def statistics(self) -> PacketStatistics:
        """What passed the filter since the socket was opened (the kernel's counters restart at each look)."""
        packets, drops = struct.unpack("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self._statistics.packets += packets
        self._statistics.drops += drops
        return self._statistics

    def close(self) -> None:
        """Close the socket."""
        self._file.close()  # its descriptor will be another file's
        self._socket.close()
