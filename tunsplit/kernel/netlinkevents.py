"""News that the kernel sends to the groups of a netlink family, as sockets that never wait.

Some facts about them (net/netlink/af_netlink.c):

- A group's message goes to every member but its sender. Unbound, our port number would be 0, which is the kernel's own.
- What finds no room in our queue is lost, and the next recv() says so, once: ENOBUFS.
- Programs with CAP_NET_ADMIN may send to groups as well; the sender's port tells them from the kernel.
- All messages of one datagram carry one port, that of who asked: a filter on the first is enough to leave out what is
  our own, before it wakes anybody.
"""

import ctypes
import errno
import select
import socket
import struct
from collections.abc import Iterable, Iterator

from tunsplit.errors import KernelError
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.netlink import NETLINK_ADD_MEMBERSHIP, RECEIVE_SIZE, SOL_NETLINK

SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33  # asm-generic/socket.h

BPF_LOAD_WORD, BPF_JUMP_EQUAL, BPF_RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
PORT_AT = 12  # of nlmsg_pid in nlmsghdr
BPF = struct.Struct("=HBBI")


class NetlinkEvents(Closing):
    """A member of groups, in the network namespace that the calling thread was in when this was made.

    Args:
        what: how errors name it.
        protocol: NETLINK_….
        groups: their numbers.
        queue: bytes; 0: the system's default.
        unheard: what the requests of this netlink port cause is left out; 0: nothing.

    Raises:
        KernelError: there are no such groups.
    """

    def __init__(self, what: str, protocol: int, groups: Iterable[int], *, queue: int = 0, unheard: int = 0) -> None:
        self._what = what
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            self._socket = socket.socket(socket.AF_NETLINK, kind, protocol)
        except OSError as error:
            raise self._failed(error) from error
        try:
            if queue:
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, queue)
            if unheard:
                _leave_out(self._socket, unheard)
            self._socket.bind((0, 0))
            for group in groups:
                self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except OSError as error:
            self.close()
            raise self._failed(error) from error
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor to wait on until it is readable."""
        return self._socket.fileno()

    def waiting(self) -> bool:
        """Whether there is something to read: cheaper than to try, where that is asked for each batch of packets."""
        return bool(self._poll.poll(0))

    def _datagrams(self) -> Iterator[bytes | None]:
        """What the kernel has sent since, in order; None where something was lost.

        Raises:
            KernelError: no more news will come.
        """
        while True:
            try:
                datagram, sender = self._socket.recvfrom(RECEIVE_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise self._failed(error) from error
                yield None
                continue
            if sender[0] == 0:
                yield datagram

    def _failed(self, error: OSError) -> KernelError:
        return KernelError(f"{self._what}: {error.strerror}")


def _leave_out(own: socket.socket, port: int) -> None:
    """Have the kernel drop what comes from a port; a filter reads words as the network has them."""
    (word,) = struct.unpack("!I", struct.pack("=I", port))
    program = (
        BPF.pack(BPF_LOAD_WORD, 0, 0, PORT_AT)
        + BPF.pack(BPF_JUMP_EQUAL, 0, 1, word)
        + BPF.pack(BPF_RETURN, 0, 0, 0)
        + BPF.pack(BPF_RETURN, 0, 0, RECEIVE_SIZE)
    )
    code = ctypes.create_string_buffer(program)
    filtering = struct.pack("HL", len(program) // BPF.size, ctypes.addressof(code))
    own.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filtering)
