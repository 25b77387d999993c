"""Resolvers on this host's own addresses, whose answers the test makes up."""

import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field

import dns.flags
import dns.message
import dns.rrset
import trio

PORT = 53
SO_RCVBUFFORCE = 33  # asm-generic/socket.h


def query(name: str = "www.example.com", kind: str = "A", **options) -> bytes:
    """A question, as dnspython writes it; no EDNS unless it is asked for."""
    return dns.message.make_query(name, kind, **{"use_edns": False, **options}).to_wire()


def answer(question: bytes, *records: str, authority: tuple[str, ...] = (), **options) -> bytes:
    """The answer to a question, with records such as "www.example.com. 60 IN A 192.0.2.1"."""
    asked = dns.message.from_wire(question)
    made = dns.message.make_response(asked, recursion_available=True)
    made.answer += [rrset(record) for record in records]
    made.authority += [rrset(record) for record in authority]
    made.flags |= options.get("flags", 0)
    made.set_rcode(options.get("rcode", 0))
    return made.to_wire(max_size=65535)


def rrset(record: str) -> dns.rrset.RRset:
    name, ttl, class_, kind, data = record.split(maxsplit=4)
    return dns.rrset.from_text(name, int(ttl), class_, kind, data)


def read(message: bytes) -> dns.message.Message:
    return dns.message.from_wire(message)


def address_answer(question: bytes, over_tcp: bool) -> list[bytes]:
    """What an ordinary resolver says."""
    name = read(question).question[0].name.to_text()
    return [answer(question, f"{name} 60 IN A 192.0.2.1")]


def quick_answer(question: bytes, over_tcp: bool) -> list[bytes]:
    """The same, for our own questions, many at once."""
    section = question[12:-11]  # between the header and the OPT record
    record = b"\xc0\x0c\0\1\0\1" + struct.pack("!IH", 60, 4) + bytes((192, 0, 2, 1))
    return [question[:2] + struct.pack("!5H", 0x8180, 1, 1, 0, 0) + section + record]


Behaviour = Callable[[bytes, bool], list[bytes]]


@dataclass
class FakeResolver:
    """Answers with all that `behaviour` returns for a question; `seen` are the questions that came in."""

    address: str
    behaviour: Behaviour = address_answer
    seen: list[tuple[bytes, str]] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    hangs: bool = False  # keeps connections open
    heard: trio.Event = field(default_factory=trio.Event)

    async def serve_udp(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        with trio.socket.socket(family, socket.SOCK_DGRAM) as server:
            # A burst waits its turn: what does not fit is lost.
            server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
            await server.bind((self.address, PORT))
            task_status.started()
            while True:
                question, peer = await server.recvfrom(65535)
                self.note(question, "udp", peer[1])
                for message in self.behaviour(question, False):
                    await server.sendto(message, peer)

    def note(self, question: bytes, transport: str, port: int) -> None:
        self.seen.append((question, transport))
        self.ports.append(port)
        self.heard.set()
        self.heard = trio.Event()

    async def serve_tcp(self, stream: trio.SocketStream) -> None:
        with closing(stream.socket):
            size = await stream.receive_some(2)
            if len(size) < 2:
                return
            question = bytes(await stream.receive_some(struct.unpack("!H", size)[0]))
            self.note(question, "tcp", 0)
            for message in self.behaviour(question, True):
                await stream.send_all(struct.pack("!H", len(message)) + message)
            if self.hangs:
                await trio.sleep_forever()


@asynccontextmanager
async def resolvers(*fakes: FakeResolver) -> AsyncIterator[None]:
    """They answer within the block."""
    async with trio.open_nursery() as nursery:
        for fake in fakes:
            await nursery.start(fake.serve_udp)
            listeners = await trio.open_tcp_listeners(PORT, host=fake.address)
            nursery.start_soon(trio.serve_listeners, fake.serve_tcp, listeners)
        yield
        nursery.cancel_scope.cancel()


async def asked(fake: FakeResolver, times: int = 1) -> None:
    """Wait until so many questions have come in."""
    while len(fake.seen) < times:
        await fake.heard.wait()
