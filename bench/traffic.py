"""An app that never stops trying all that an app can, and tells how each attempt ended.

A TCP stream, connected and unconnected datagrams, new connections, pings, questions for names; IPv4 and IPv6. All that
it sends says whose it is, and in which epoch it was sent: a number that somebody else counts up in a file.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import trio

from tunsplit.lab.addresses import Address
from tunsplit.lab.programs import Program

PATIENCE_S = 20.0

# A thread of each kind. Told a number on stdin, it prints what came of all attempts since, and the number: kind, when
# they ended, how long they took, and the error, if any. Told `fork N`, it has so many children, each of which sends.
TRAFFIC = """
import contextlib, errno, itertools, json, mmap, os, socket, struct, sys, threading, time
REST_S, AGAIN_S, CHILD_S = 0.02, 0.25, 1.0
name, patience_s, epochs, targets, resolvers = json.loads(sys.argv[1])
done, lock, numbers = [], threading.Lock(), itertools.count()
socket.setdefaulttimeout(patience_s)
epoch = bytes(8)
if epochs:
    with open(epochs, "rb") as file:
        epoch = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)

def token():
    return b"%s--%d--%d--" % (name.encode(), int.from_bytes(epoch[:8], "big"), next(numbers))

def family(target):
    return socket.AF_INET6 if ":" in target else socket.AF_INET

def attempt(kind, work):
    began = time.monotonic()
    try:
        work()
        error = ""
    except TimeoutError:
        error = "stuck"
    except OSError as raised:
        error = errno.errorcode.get(raised.errno, str(raised))
    now = time.monotonic()
    with lock:
        done.append((kind, now, now - began, error))
    time.sleep(REST_S)
    return not error

def connect(target):
    with socket.create_connection((target, 7)) as own:
        own.sendall(token())
        own.recv(100)

def stream(target, kind):
    while True:
        own = socket.socket(family(target))
        def begin():
            own.connect((target, 7))
            own.recv(100)
        def go_on():
            own.sendall(token())
            if not own.recv(100):
                raise ConnectionResetError(errno.ECONNRESET, "closed")
        going = attempt(kind, begin)
        while going:
            going = attempt(kind, go_on)
        own.close()

def exchange(own, send, expected):
    # Datagrams may be lost: by a VPN that has not shaken hands yet.
    until = time.monotonic() + socket.getdefaulttimeout()
    own.settimeout(AGAIN_S)
    while True:
        send()
        try:
            while expected not in (answer := own.recv(1000)):
                pass
            return answer
        except TimeoutError:
            if time.monotonic() > until:
                raise

def datagrams(target, kind):
    own = socket.socket(family(target), socket.SOCK_DGRAM)
    flowing = False
    while True:
        said = token()
        def once():
            # A socket whose flow was ended is connected no more.
            if not flowing:
                own.connect((target, 7))
            exchange(own, lambda: own.send(said), said)
        flowing = attempt(kind, once)

def unconnected(target, kind):
    own = socket.socket(family(target), socket.SOCK_DGRAM)
    while True:
        said = token()
        attempt(kind, lambda: exchange(own, lambda: own.sendto(said, (target, 7)), said))

def ping(target, kind):
    protocol, echo = (58, 128) if ":" in target else (1, 8)
    own = socket.socket(family(target), socket.SOCK_DGRAM, protocol)
    while True:
        said = token()
        request = struct.pack("!BBHHH", echo, 0, 0, 0, next(numbers) % 65536) + said
        def once():
            own.connect((target, 0))
            exchange(own, lambda: own.send(request), said)
        attempt(kind, once)

def connections(target, kind):
    while True:
        attempt(kind, lambda: connect(target))

def ask(resolver):
    number = os.urandom(2)
    asked = b"".join(bytes((len(label),)) + label for label in (token(), b"who", b"is")) + bytes(1)
    message = number + struct.pack("!5H", 0x0100, 1, 0, 0, 0) + asked + struct.pack("!2H", 1, 1)
    with socket.socket(family(resolver), socket.SOCK_DGRAM) as own:
        own.connect((resolver, 53))
        answer = exchange(own, lambda: own.send(message), asked)
    if answer[:2] != number or answer[3] & 15:
        raise OSError(errno.EIO, "no name")

def questions(resolver, kind):
    while True:
        attempt(kind, lambda: ask(resolver))

def child():
    for target in targets:
        with contextlib.suppress(OSError), socket.socket(family(target), socket.SOCK_DGRAM) as own:
            own.settimeout(CHILD_S)
            own.sendto(token(), (target, 7))
            own.recv(100)
    with contextlib.suppress(OSError), socket.create_connection((targets[0], 7)) as own:
        own.sendall(token())

def fork(count):
    pids = []
    for _ in range(count):
        pid = os.fork()
        if not pid:
            try:
                child()
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)

def begin(work, version, target):
    threading.Thread(target=work, args=(target, f"{work.__name__} IPv{version}"), daemon=True).start()

for version, target in zip("46", targets):
    for work in (stream, datagrams, unconnected, connections, ping):
        begin(work, version, target)
for version, resolver in zip("46", resolvers):
    begin(questions, version, resolver)
for line in sys.stdin:
    if line.startswith("fork"):
        fork(int(line.split()[1]))
        continue
    with lock:
        told, done[:] = json.dumps(done), []
    print(told, "#" + line, sep="\\n", flush=True)
"""
WORDS = ("stream", "datagrams", "unconnected", "connections", "ping")
KINDS = tuple(f"{word} IPv{version}" for word in WORDS for version in (4, 6))
QUESTIONS = ("questions IPv4", "questions IPv6")
TOKEN = re.compile(rb"([a-z-]+)--(\d+)--\d+--")


class Token(NamedTuple):
    """Who has sent something, and in which epoch."""

    name: str
    epoch: int


def tokens(payload: bytes, names: Iterable[str]) -> Iterator[Token]:
    """What a frame's payload says, of these apps. In a packet that is quoted, a header's octets may stand before it."""
    for found, epoch in TOKEN.findall(payload):
        for name in names:
            if found.endswith(name.encode()):
                yield Token(name, int(epoch))


def traffic(
    program: Path,
    name: str,
    stuck_s: float,
    targets: Iterable[Address],
    *,
    epochs: Path | None = None,
    resolvers: Iterable[Address] = (),
) -> list[str]:
    """The command that runs it.

    Args:
        program: an interpreter.
        name: of lower-case letters and single hyphens.
        stuck_s: an attempt without an answer or an error for so long is stuck.
        targets: echo servers, of IPv4 and of IPv6.
        epochs: a file that begins with the epoch, eight octets in network order.
        resolvers: whom it asks for names, IPv4 and IPv6; nobody, if there are none.
    """
    words = [name, stuck_s, str(epochs or ""), [str(one) for one in targets], [str(one) for one in resolvers]]
    return [str(program), "-I", "-S", "-c", TRAFFIC, json.dumps(words)]


@dataclass(frozen=True)
class Attempt:
    """What came of one attempt of an app."""

    kind: str
    ended: float  # seconds of the system's monotonic clock
    took_s: float
    error: str


class App:
    """A copy of the interpreter, and its traffic."""

    def __init__(self, name: str, program: Program) -> None:
        self.name = name
        self.program = program
        self.attempts: list[Attempt] = []
        self._numbers = itertools.count()

    async def ask(self) -> list[Attempt]:
        """What was attempted since the last time."""
        number = next(self._numbers)
        await self._tell(str(number))
        with trio.fail_after(PATIENCE_S):
            await self.program.wait_written(f"\n#{number}\n")
        answer = self.program.output.partition(f"\n#{number}\n")[0].rpartition("\n")[2]
        new = [Attempt(*one) for one in json.loads(answer)]
        self.attempts += new
        return new

    async def fork(self, children: int) -> None:
        """Have it fork so many children, each of which sends, and wait for them."""
        await self._tell(f"fork {children}")
        await self.ask()

    async def _tell(self, line: str) -> None:
        stdin = self.program.process.stdin
        assert stdin is not None
        await stdin.send_all(f"{line}\n".encode())
