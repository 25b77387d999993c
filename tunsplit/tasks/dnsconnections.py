"""Questions over TCP (RFC 1035 §4.2.2, RFC 7766): several on a connection, answered in whatever order answers come.

A connection is bounded in questions that wait for their answer and in silence, and all of them together in number, of
one user and of everybody.
"""

import logging
import socket
from collections import Counter, deque
from collections.abc import Callable

import trio

from tunsplit.errors import KernelError
from tunsplit.host import IPAddress
from tunsplit.tasks import mishap
from tunsplit.tasks.dnsproxy import Reply

IDLE_S = 10.0  # RFC 7766 §6.2.3: a few seconds
MOST_PENDING = 64  # questions of one connection without answer; more wait in the socket
MOST_CONNECTIONS = 512
MOST_OF_A_USER = 128
BACKLOG = 128
IP_FREEBIND, IPV6_FREEBIND = 15, 78

Ask = Callable[[bytes, Reply], bool]
Identify = Callable[[trio.SocketStream], "tuple[int | None, Ask] | None"]

logger = logging.getLogger(__name__)


class Connection:
    """One connection, while `run` runs."""

    def __init__(self, stream: trio.abc.Stream, ask: Ask) -> None:
        """`ask` takes a question; False: the connection has lost its right to ask."""
        self._stream = stream
        self._ask = ask
        self._answers: deque[bytes] = deque()
        self._pending = 0
        self._unsent = 0
        self._moved = trio.Event()  # an answer came, or a question: whoever waits looks again
        self._closed = False

    async def run(self) -> None:
        """Answer until the other end leaves, or is silent for too long."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                if await self._receive():
                    with trio.move_on_after(IDLE_S):
                        while self._pending or self._unsent:
                            await self._moved.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._closed = True

    async def _receive(self) -> bool:
        """Whether the other end may still hear: it has closed its own half only."""
        received = bytearray()
        while True:
            while self._pending < MOST_PENDING and (message := take_untrusted(received)) is not None:
                self._pending += 1
                if not self._ask(message, self._reply):
                    return False
            with trio.move_on_after(IDLE_S) as silence:
                if self._pending >= MOST_PENDING:
                    await self._moved.wait()
                elif chunk := await self._stream.receive_some(65536):
                    received += chunk
                else:
                    return True
            # What has waited for so long gets no answer any more: some messages never do.
            if silence.cancelled_caught and not self._unsent:
                return False

    def _reply(self, answer: bytes) -> None:
        self._pending -= 1
        if not self._closed:
            self._unsent += 1
            self._answers.append(len(answer).to_bytes(2, "big") + answer)
            self._tell()

    def _tell(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()

    async def _send(self) -> None:
        while True:
            while not self._answers:
                await self._moved.wait()
            with trio.fail_after(IDLE_S):
                await self._stream.send_all(self._answers.popleft())
            self._unsent -= 1
            self._tell()


class Connections:
    """All connections of one listener or several."""

    def __init__(self, identify: Identify, counters: Counter[str]) -> None:
        """`identify` gives the user behind a connection, and what takes its questions; None: nobody's."""
        self._identify = identify
        self._counters = counters
        self._open: Counter[int | None] = Counter()

    async def converse(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        async with stream:
            try:
                identified = self._identify(stream)
            except (OSError, KernelError) as refusal:  # reset already, or nobody can be asked for its owner
                self._counters["dns_connections_broken"] += 1
                logger.debug("a connection cannot be identified", extra={"error": str(refusal)})
                return
            if identified is None:
                self._counters["dns_connections_of_nobody"] += 1
                return
            user, ask = identified
            if self._open.total() >= MOST_CONNECTIONS or self._open[user] >= MOST_OF_A_USER:
                self._counters["dns_connections_full"] += 1
                return
            self._open[user] += 1
            self._counters["dns_connections"] += 1
            try:
                await Connection(stream, ask).run()
            except* (trio.BrokenResourceError, trio.TooSlowError):
                self._counters["dns_connections_broken"] += 1
            except* Exception as group:
                for error in group.exceptions:
                    mishap.note(self._counters, error)
            finally:
                self._open[user] -= 1
                if not self._open[user]:
                    del self._open[user]


def take_untrusted(received: bytearray) -> bytes | None:
    """Take the first whole message out of what was received; None: there is none yet."""
    size = int.from_bytes(received[:2], "big")
    if len(received) < 2 or len(received) < 2 + size:
        return None
    message = bytes(received[2 : 2 + size])
    del received[: 2 + size]
    return message


def open_listener(address: IPAddress, port: int, device: str | None = None) -> trio.SocketListener:
    """A listener on an address that the host may not have yet; for what comes in by one device only, if given.

    Raises:
        KernelError: there can be none.
    """
    version4 = address.version == 4
    listener = socket.socket(socket.AF_INET if version4 else socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if version4:
            listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        if device is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        listener.bind((str(address), port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise KernelError(f"cannot listen on {address} port {port}: {error.strerror}") from error
    return trio.SocketListener(trio.socket.from_stdlib_socket(listener))
