"""Our own stub resolver on loopback: who asks it is attributed like the owner of a flow.

Theory of operation. A local stub asks in its own name, so the table can only see the stub. Of this one, which runs in
the daemon, the other end of each question is a socket on this host: its holders are found as those of a flow are
(tasks/sources.py), judged, and the question goes on in their name. Who cannot be told at once is searched for by a
task, together with all others. Nobody found, or an app that is blocked: REFUSED, at once. An answer whose asker has
changed sides meanwhile is kept from him.
"""

import logging
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

import trio

from tunsplit.config import Listener
from tunsplit.engine.attribution import Attribution, Owner
from tunsplit.engine.flow import App
from tunsplit.engine.policy import Verdict
from tunsplit.errors import KernelError
from tunsplit.host import IPAddress
from tunsplit.tasks import mishap
from tunsplit.tasks.dnscapture import Ask
from tunsplit.tasks.dnsconnections import Connections, open_listener
from tunsplit.tasks.dnsproxy import Asker, Reply, boottime
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.sources import SocketSource
from tunsplit.wire.ip import TCP, UDP

BATCH = 64
SEARCHED = 64  # questions whose askers are searched for at once
MOST_WAITING = 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A question whose asker is being searched for."""

    protocol: int
    four_tuple: bytes
    message: bytes
    reply: Reply
    deadline: float


class Stub:
    """Answers on loopback."""

    def __init__(
        self,
        listen: Iterable[Listener],
        *,
        source: SocketSource,
        judge: Judge,
        ask: Ask,
        hold_s: Callable[[], float],
        counters: Counter[str],
    ) -> None:
        """Listen on these addresses and ports.

        Args:
            listen: where, all of them loopback.
            source: finds the owners of flows on loopback.
            judge: judges them.
            ask: the proxy.
            hold_s: how long a question may wait for its asker to be found.
            counters: counted in here.

        Raises:
            KernelError: an address or port cannot be had.
        """
        self._source = source
        self._judge = judge
        self._ask = ask
        self._hold_s = hold_s
        self._counters = counters
        self._waiting: deque[Waiting] = deque()
        self._queued = trio.Event()
        self._connections = Connections(self._identify, counters)
        self._sockets: list[socket.socket] = []
        self._listeners: list[trio.SocketListener] = []
        try:
            for one in listen:
                self._sockets.append(_open_socket(one.address, one.port))
                self._listeners.append(open_listener(one.address, one.port))
        except KernelError:
            self.close()
            raise

    def close(self) -> None:
        """Give the sockets back."""
        for one in self._sockets:
            one.close()
        for listener in self._listeners:
            listener.socket.close()

    async def run(self) -> None:
        """Answer until cancelled."""
        async with trio.open_nursery() as nursery:
            for one in self._sockets:
                nursery.start_soon(self._serve, one)
            nursery.start_soon(self._search)
            for listener in self._listeners:
                nursery.start_soon(trio.serve_listeners, self._connections.converse, [listener])

    # Over UDP

    async def _serve(self, own: socket.socket) -> None:
        address, number, *_ = own.getsockname()
        destination, port = ip_address(address).packed, number.to_bytes(2, "big")
        while True:
            await trio.lowlevel.wait_readable(own)
            for _ in range(BATCH):
                try:
                    message, sender = own.recvfrom(65535)
                except BlockingIOError:
                    break
                except OSError as error:  # an ICMP error about an answer of ours
                    self._counters[f"dns_stub_receive_{error.errno}"] += 1
                    continue
                four_tuple = ip_address(sender[0]).packed + destination + sender[1].to_bytes(2, "big") + port
                self._counters["dns_stub_questions_udp"] += 1
                self._take(UDP, four_tuple, message, partial(self._send, own, sender))

    def _send(self, own: socket.socket, to: tuple[object, ...], answer: bytes) -> None:
        try:
            own.sendto(answer, to)
        except OSError as error:  # the asker is gone, or does not read
            self._counters[f"dns_stub_send_{error.errno}"] += 1

    # Over TCP

    def _identify(self, stream: trio.SocketStream) -> tuple[int | None, Callable[[bytes, Reply], bool]]:
        peer, own = stream.socket.getpeername(), stream.socket.getsockname()
        four_tuple = ip_address(peer[0]).packed + ip_address(own[0]).packed
        four_tuple += peer[1].to_bytes(2, "big") + own[1].to_bytes(2, "big")

        def ask(message: bytes, reply: Reply) -> bool:
            self._counters["dns_stub_questions_tcp"] += 1
            self._take(TCP, four_tuple, message, reply)
            return True

        return self._source.user(TCP, four_tuple), ask

    # Askers

    def _take(self, protocol: int, four_tuple: bytes, message: bytes, reply: Reply) -> None:
        waiting = Waiting(protocol, four_tuple, message, reply, trio.current_time() + self._hold_s())
        try:
            attribution = self._source.attribute(protocol, four_tuple)
            if attribution is not None:
                self._judge_and_ask(waiting, attribution)
            elif len(self._waiting) < MOST_WAITING:
                self._waiting.append(waiting)
                self._queued.set()
            else:
                self._refuse(waiting, "full")
        except KernelError:
            self._refuse(waiting, "failed")
        except Exception as error:  # a mistake of ours must not end the daemon
            mishap.note(self._counters, error)

    async def _search(self) -> None:
        while True:
            while not self._waiting:
                self._queued = trio.Event()
                await self._queued.wait()
            some = [self._waiting.popleft() for _ in range(min(SEARCHED, len(self._waiting)))]
            try:
                await self._search_some(some)
            except KernelError:
                for waiting in some:
                    self._refuse(waiting, "failed")
            except Exception as error:  # as above
                mishap.note(self._counters, error)

    async def _search_some(self, some: list[Waiting]) -> None:
        """Judge these, and take out of the list whoever has been."""
        for found in self._source.search(list({(one.protocol, one.four_tuple): None for one in some})):
            now = trio.current_time()
            for waiting in list(some):
                if found is not None and found[0] == (waiting.protocol, waiting.four_tuple):
                    some.remove(waiting)
                    self._judge_and_ask(waiting, found[1])
                elif waiting.deadline <= now:
                    some.remove(waiting)
                    self._judge_and_ask(waiting, Attribution("nobody found", None))
            await trio.lowlevel.checkpoint()
        while some:
            self._judge_and_ask(some.pop(), Attribution("nobody found", None))

    def _judge_and_ask(self, waiting: Waiting, attribution: Attribution) -> None:
        owner = attribution.owner
        verdict, client = self._judge_now(owner)
        asker = Asker(
            App.of(attribution), verdict, None, waiting.protocol == TCP, identity=waiting.four_tuple, client=client
        )

        def reply(answer: bytes) -> None:
            try:
                stands = self._judge_now(owner) == (verdict, client)
            except KernelError:
                stands = False
            if stands:
                waiting.reply(answer)
            else:
                self._counters["dns_answers_late"] += 1

        self._ask(waiting.message, asker, reply, boottime())

    def _judge_now(self, owner: Owner | None) -> tuple[Verdict, bool]:
        """On which side it is, and whether it is the VPN's client."""
        self._judge.prepare()
        return self._judge.judge(owner).verdict, self._judge.is_client(owner)

    def _refuse(self, waiting: Waiting, why: str) -> None:
        self._counters[f"dns_stub_refused_{why}"] += 1
        asker = Asker(None, Verdict.BLOCK, None, over_tcp=waiting.protocol == TCP)
        self._ask(waiting.message, asker, waiting.reply, boottime())


def _open_socket(address: IPAddress, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    own = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        own.bind((str(address), port))
    except OSError as error:
        own.close()
        raise KernelError(f"[dns] listen: cannot bind {address} port {port}: {error.strerror}") from error
    return own
