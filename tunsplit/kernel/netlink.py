"""Netlink's framing: messages, attributes, and a socket that asks and waits for the answer.

Some facts about netlink:

- A request is carried out within sendto() (af_netlink.c, netlink_unicast_kernel), so its answer is there when sendto()
  returns: asking never waits for anything but the kernel's own work.
- A dump is produced piecewise, one recv() at a time; NLM_F_DUMP_INTR says that what is dumped changed meanwhile.
- NETLINK_GET_STRICT_CHK makes the kernel honour filters in dump requests; without it, it sends everything.
- NETLINK_EXT_ACK adds the kernel's own words to an error.

pyroute2's codecs are not used here: importing any of them imports all of pyroute2 with asyncio, which is 200 ms of a
start that is to take less than a second.
"""

import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterator

from tunsplit.errors import KernelError
from tunsplit.kernel.closing import Closing

# include/uapi/linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLM_F_DUMP_INTR = 0x10
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
SOL_NETLINK = 270
NETLINK_NETFILTER = 12
NETLINK_ADD_MEMBERSHIP, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 1, 11, 12

HEADER = struct.Struct("=IHHII")  # length · type · flags · sequence · port
ATTRIBUTE = struct.Struct("=HH")  # length with this header · type
ERROR = struct.Struct("=i")

RECEIVE_SIZE = 1 << 18  # the kernel fills up to 32 KiB of a dump at once; others' bursts may be larger
ATTEMPTS = 8  # at a dump that keeps changing


class Refused(KernelError):
    """The kernel answered a request with an error."""

    def __init__(self, what: str, number: int, words: str = "") -> None:
        super().__init__(f"{what}: {os.strerror(number)}" + (f" ({words})" if words else ""))
        self.errno = number


def attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute, padded to the next."""
    size = len(value) + 4
    return ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """Encode an attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(inner))


def attributes(data: bytes, at: int = 0) -> dict[int, bytes]:
    """Decode the attributes from `at` to the end; of two of one kind, the last."""
    return dict(iterate_attributes(data, at))


def iterate_attributes(data: bytes, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Decode the attributes from `at` to the end, one by one."""
    while at + 4 <= len(data):
        size, kind = ATTRIBUTE.unpack_from(data, at)
        if size < 4:
            return
        yield kind & NLA_TYPE_MASK, data[at + 4 : at + size]
        at += size + 3 & ~3


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """Frame one message; `body` is padded already, since all of ours end with attributes or fixed headers."""
    return HEADER.pack(16 + len(body), kind, flags, sequence, 0) + body


def iterate_messages(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Take a datagram apart: (type, flags, sequence, port, body) of each message."""
    at = 0
    while at + 16 <= len(data):
        size, kind, flags, sequence, port = HEADER.unpack_from(data, at)
        if size < 16:
            return
        yield kind, flags, sequence, port, data[at + 16 : at + size]
        at += size + 3 & ~3


def error_of(flags: int, body: bytes) -> tuple[int, str]:
    """Read an NLMSG_ERROR: the errno (0: done) and the kernel's words, if it has any."""
    (number,) = ERROR.unpack_from(body)
    words = ""
    if flags & NLM_F_ACK_TLVS:
        # The request's header follows the number, and the whole request unless NLM_F_CAPPED.
        (request_size,) = struct.unpack_from("=I", body, 4)
        at = 20 if flags & NLM_F_CAPPED else 4 + (request_size + 3 & ~3)
        words = attributes(body, at).get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode(errors="replace")
    return -number, words


class NetlinkSocket(Closing):
    """A netlink socket of the calling thread's network namespace, for requests that the kernel answers at once.

    With `bound` it is that one.
    """

    def __init__(self, protocol: int, *, strict: bool = False, bound: socket.socket | None = None) -> None:
        try:
            self._socket = bound or socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            raise KernelError(f"socket(AF_NETLINK, {protocol}): {error.strerror}") from error
        if bound is None:
            self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        if strict:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        self._sequence = itertools.count(1)
        self._interrupted = False
        self._buffer = memoryview(bytearray(RECEIVE_SIZE))
        self.port: int = self._socket.getsockname()[0]

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def request(self, what: str, kind: int, flags: int, body: bytes) -> None:
        """Ask for a change, and wait for the kernel's yes.

        Raises:
            Refused: the kernel's no, with `what` as its subject.
        """
        for _ in self._ask(what, kind, flags | NLM_F_ACK, body):
            pass

    def get(self, what: str, kind: int, flags: int, body: bytes) -> bytes:
        """Ask for one object; return the body of the answer.

        Raises:
            Refused: the kernel's no.
        """
        for _, answer in self._ask(what, kind, flags | NLM_F_ACK, body):
            found = answer
        return found

    def look_up(self, what: str, kind: int, body: bytes) -> bytes | None:
        """Ask for one object by its key; return the body of the answer, or None where there is no such object.

        Raises:
            Refused: the kernel's no.
        """
        sequence = self.next_sequence()
        self._send(what, HEADER.pack(16 + len(body), kind, NLM_F_REQUEST, sequence, 0) + body)
        while True:
            self._receive_into(what)
            size, answered, flags, number, _ = HEADER.unpack_from(self._buffer)
            if number != sequence:
                continue  # of a question that was given up
            if answered != NLMSG_ERROR:
                return bytes(self._buffer[16:size])
            if ERROR.unpack_from(self._buffer, 16)[0] == -errno.ENOENT:
                return None
            raise Refused(what, *error_of(flags, bytes(self._buffer[16:size])))

    def dump(self, what: str, kind: int, body: bytes) -> list[tuple[int, bytes]]:
        """Ask for all objects that fit; return (type, body) of each.

        Raises:
            Refused: the kernel's no, or the list never held still.
        """
        for _ in range(ATTEMPTS):
            self._interrupted = False
            found = list(self._ask(what, kind, NLM_F_DUMP, body))
            if not self._interrupted:
                return found
        raise Refused(what, errno.EINTR, f"changed during {ATTEMPTS} dumps in a row")

    def batch(self, datagram: bytes, first: int, last: int) -> dict[int, tuple[int, str]]:
        """Send several framed messages at once; return {sequence: (errno, words)} of the answers to first … last.

        Every message numbered from `first` to `last` has to ask for an acknowledgement. When one is refused, the kernel
        may say nothing of the others.
        """
        self._send("batch", datagram)
        answers: dict[int, tuple[int, str]] = {}
        failed = False
        while len(answers) <= last - first and not failed:
            for kind, flags, sequence, _, body in iterate_messages(self._receive("batch")):
                if kind == NLMSG_ERROR:
                    answers[sequence] = error_of(flags, body)
                    failed = failed or answers[sequence][0] != 0
        return answers

    def next_sequence(self) -> int:
        """A number for the next message."""
        return next(self._sequence) & 0xFFFFFFFF

    def _ask(self, what: str, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        sequence = self.next_sequence()
        self._send(what, message(kind, flags | NLM_F_REQUEST, sequence, body))
        while True:
            for answer, answer_flags, answered, _, content in iterate_messages(self._receive(what)):
                if answered != sequence:
                    continue  # the rest of a dump that was given up
                if answer_flags & NLM_F_DUMP_INTR:
                    self._interrupted = True
                if answer in (NLMSG_ERROR, NLMSG_DONE):
                    number, words = error_of(answer_flags, content) if answer == NLMSG_ERROR else _done(content)
                    if number:
                        raise Refused(what, number, words)
                    return
                yield answer, content

    def _send(self, what: str, datagram: bytes) -> None:
        try:
            self._socket.send(datagram)  # to whom it is not connected: the kernel
        except OSError as error:
            raise Refused(what, error.errno or errno.EIO) from error

    def _receive(self, what: str) -> bytes:
        return bytes(self._buffer[: self._receive_into(what)])

    def _receive_into(self, what: str) -> int:
        try:
            return self._socket.recv_into(self._buffer)  # recv() would ask for fresh memory of this size each time
        except OSError as error:
            raise Refused(what, error.errno or errno.EIO) from error


def _done(content: bytes) -> tuple[int, str]:
    """A dump that ends badly says so in its NLMSG_DONE."""
    return (-ERROR.unpack_from(content)[0], "") if len(content) >= ERROR.size else (0, "")
