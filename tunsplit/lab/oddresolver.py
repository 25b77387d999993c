"""A resolver that misbehaves, as told: silent, slow, lying, truncating, failing.

It runs in our own process, with sockets that belong to a namespace. Whatever it is asked for, its address is the
resolver's own, so that an answer tells who gave it; a lie tells of LIE.

    silent      never answers
    slow        answers after `delay_s`
    lying       sends four lies before the truth: from another port, with a wrong ID, to another question, cut off
    truncating  by UDP says that the answer does not fit, by TCP gives LONG addresses
    failing     answers SERVFAIL
"""

import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from typing import Any, Literal, NamedTuple

import trio

from tunsplit.lab.addresses import Address
from tunsplit.lab.dnsclient import encode_name, skip_name
from tunsplit.lab.netns import Namespace

Behaviour = Literal["silent", "slow", "lying", "truncating", "failing"]

PORT = 53
LIE = {4: ip_address("192.0.2.66"), 6: ip_address("2001:db8:bad::66")}
LONG = 200  # more addresses than a datagram of 1232 octets holds
TTL_S = 60
KIND = {4: 1, 6: 28}  # A and AAAA (RFC 1035 §3.2.2, RFC 3596 §2.1)
HEADER = struct.Struct("!6H")  # ID, flags, questions, answers, authority, additional (RFC 1035 §4.1.1)
ANSWER, TRUNCATED, SERVFAIL = 0x8180, 0x8380, 0x8182  # QR, RD, RA; with TC; with RCODE 2


class OddQuestion(NamedTuple):
    """What it was asked: the name, from where, and how."""

    name: str
    source: Address
    over_tcp: bool


class OddResolver:
    """A resolver on one address of a namespace, which must be there already.

    Attributes:
        address: its own.
        behaviour: what it does with a question; may be changed.
        questions: what it was asked so far, in order.
    """

    def __init__(self, namespace: Namespace, address: Address, behaviour: Behaviour, delay_s: float) -> None:
        self.address = address
        self.behaviour = behaviour
        self.questions: list[OddQuestion] = []
        self._delay_s = delay_s
        self._namespace = namespace

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer, until cancelled."""
        with (
            self._make(socket.SOCK_STREAM) as listener,
            self._make(socket.SOCK_DGRAM) as own,
            self._make(socket.SOCK_DGRAM) as elsewhere,
        ):
            for made, port in ((listener, PORT), (own, PORT), (elsewhere, 0)):
                await made.bind((str(self.address), port))
            listener.listen(100)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self._serve_stream, [trio.SocketListener(listener)])
                task_status.started()
                while True:
                    message, sender = await own.recvfrom(65536)
                    nursery.start_soon(self._answer_datagram, own, elsewhere, message, sender)

    def _make(self, kind: int) -> trio.socket.SocketType:
        family = socket.AF_INET6 if self.address.version == 6 else socket.AF_INET
        made = trio.socket.from_stdlib_socket(self._namespace.socket(family, kind))
        if kind == socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return made

    async def _answer_datagram(
        self, own: trio.socket.SocketType, elsewhere: trio.socket.SocketType, message: bytes, sender: Any
    ) -> None:
        """Answer one datagram; what finds no way back is lost, as datagrams are."""
        self.questions.append(OddQuestion(read_name(message), ip_address(sender[0]), over_tcp=False))
        try:
            if self.behaviour == "lying":
                await elsewhere.sendto(answer(message, [LIE[self.address.version]]), sender)
                for lie in tell_lies(message, LIE[self.address.version]):
                    await own.sendto(lie, sender)
            if (right := await self._answer(message, over_tcp=False)) is not None:
                await own.sendto(right, sender)
        except OSError:
            return

    async def _serve_stream(self, stream: trio.SocketStream) -> None:
        try:
            data = b""
            async for part in stream:
                data += part
                while len(data) >= 2 and len(data) >= 2 + (size := int.from_bytes(data[:2], "big")):
                    message, data = data[2 : 2 + size], data[2 + size :]
                    source = ip_address(stream.socket.getpeername()[0])
                    self.questions.append(OddQuestion(read_name(message), source, over_tcp=True))
                    if (right := await self._answer(message, over_tcp=True)) is not None:
                        await stream.send_all(len(right).to_bytes(2, "big") + right)
        except (trio.BrokenResourceError, OSError):
            return  # a client may go at any time
        finally:
            await stream.aclose()

    async def _answer(self, message: bytes, *, over_tcp: bool) -> bytes | None:
        """The right answer, in good time or not; or none."""
        match self.behaviour:
            case "silent":
                return None
            case "failing":
                return answer(message, [], flags=SERVFAIL)
            case "truncating":
                return answer(message, [self.address] * LONG) if over_tcp else answer(message, [], flags=TRUNCATED)
            case "slow":
                await trio.sleep(self._delay_s)
        return answer(message, [self.address])


def read_name(message: bytes) -> str:
    """The name that is asked for, in lower case: a question may carry any (draft-vixie-dnsext-dns0x20)."""
    return b".".join(_labels(message, HEADER.size)).decode(errors="replace").lower()


def _labels(message: bytes, at: int) -> Iterator[bytes]:
    while message[at]:
        yield message[at + 1 : at + 1 + message[at]]
        at += message[at] + 1


def answer(message: bytes, addresses: Iterable[Address], *, flags: int = ANSWER, question: bytes = b"") -> bytes:
    """An answer to a question, with these addresses; `question`: as if that had been asked."""
    question = question or message[HEADER.size : skip_name(message, HEADER.size) + 4]
    records = [
        # The name is the question's, by a pointer (RFC 1035 §4.1.4).
        struct.pack("!3HIH", 0xC000 | HEADER.size, KIND[address.version], 1, TTL_S, len(address.packed))
        + address.packed
        for address in addresses
    ]
    (number,) = struct.unpack_from("!H", message)
    return HEADER.pack(number, flags, 1, len(records), 0, 0) + question + b"".join(records)


def tell_lies(message: bytes, lie: Address) -> Iterator[bytes]:
    """What a forger sends who does not see the question: nobody is to believe a word."""
    (number,) = struct.unpack_from("!H", message)
    yield answer(struct.pack("!H", number ^ 1) + message[2:], [lie])
    yield answer(message, [lie], question=encode_name("another.name") + struct.pack("!2H", KIND[lie.version], 1))
    yield answer(message, [lie])[:-3]
