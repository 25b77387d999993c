"""Our own sockets to resolvers: each bound to one side's device, marked, and connected to one server.

The mark chooses the side's routing table, the device keeps the socket there, and the firewall lets it out by both and
by its owner. A connected socket hears its server alone, and hears at once that nobody listens. Ports are the
kernel's choice, random (net/ipv4/udp.c, udp_lib_get_port) and outside NAT's range; a socket serves few questions and
not for long, so that its port is not worth guessing. One epoll holds them all: trio is asked to wait once a batch.
"""

import select
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from tunsplit.engine.dnstable import Route, Server, is_private
from tunsplit.engine.resolver import Channel, Resolver
from tunsplit.names import MARK_TUNNEL, MARK_UPLINK
from tunsplit.tasks import mishap
from tunsplit.wire.dns import LARGEST

PORT = 53
BATCH = 64  # sockets read before packets get their turn again
POOL = 4  # sockets of a server that questions choose from by chance
MOST_USES = 128  # questions by one port
MOST_AGE_S = 5.0  # of one port
MOST_SOCKETS = 160  # of one route
MOST_TCP = 64  # connections at a time; others wait their turn
TCP_S = 4.0  # for a whole conversation

MARKS = {Route.TUNNEL: MARK_TUNNEL, Route.OUTSIDE: MARK_UPLINK, Route.LAN: MARK_UPLINK}

SideDevice = Callable[[Route, int], str | None]


@dataclass(slots=True, eq=False)
class UdpChannel(Channel):
    """One socket; once retired it takes no more questions, and is closed when the last is answered."""

    sock: socket.socket = field(kw_only=True)
    opened: float = field(kw_only=True)
    uses: int = 0
    retired: bool = False
    closed: bool = False


@dataclass(slots=True, eq=False)
class TcpChannel(Channel):
    """One connection, for one question."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Upstream:
    """The sockets. `side_device` names the device of a route and family (4, 6), None while there is no such way."""

    def __init__(self, side_device: SideDevice, below: Callable[[int], int], clock: Callable[[], float]) -> None:
        self._side_device, self._below, self._clock = side_device, below, clock
        self._epoll = select.epoll()
        self._channels: dict[int, UdpChannel] = {}
        self._by_route: Counter[Route] = Counter()
        self._pools: dict[Server, list[UdpChannel | None]] = {}
        self._conversations: set[TcpChannel] = set()
        self._limit = trio.CapacityLimiter(MOST_TCP)
        self._nursery: trio.Nursery | None = None
        self._buffer = bytearray(LARGEST)
        self._view = memoryview(self._buffer)
        self.counters: Counter[str] = Counter()
        self.resolver: Resolver

    # The resolver's carrier

    def open(self, server: Server, *, over_tcp: bool, now: float) -> Channel | None:
        """A channel for one more question."""
        if over_tcp:
            if self._nursery is None or self._device(server) is None:
                return None
            conversation = TcpChannel(server, over_tcp=True)
            self._conversations.add(conversation)
            return conversation
        pool = self._pools.get(server)
        if pool is None:
            pool = self._pools[server] = [None] * POOL
        slot = self._below(POOL)
        channel = pool[slot]
        if channel is not None and channel.uses < MOST_USES and now - channel.opened < MOST_AGE_S:
            channel.uses += 1
            return channel
        if self._by_route[server.route] >= MOST_SOCKETS:
            self.counters["upstream_sockets_short"] += 1
            return channel
        fresh = self._open_udp(server, now)
        if fresh is not None:
            pool[slot] = fresh
            if channel is not None:
                self._retire(channel)
        return fresh

    def send(self, channel: Channel, message: bytes) -> bool:
        """Send a question."""
        if isinstance(channel, TcpChannel):
            assert self._nursery is not None  # `open` gives none without
            self._nursery.start_soon(self._converse, channel, message)
            return True
        assert isinstance(channel, UdpChannel)
        try:
            channel.sock.send(message)
        except OSError as error:
            self.counters[f"upstream_send_{error.errno}"] += 1
            return False
        return True

    def release(self, channel: Channel) -> None:
        """An attempt less waits on it."""
        if channel.attempts:
            return
        if isinstance(channel, TcpChannel):
            channel.scope.cancel()
        elif isinstance(channel, UdpChannel) and channel.retired:
            self._close(channel)

    # Sockets

    def _device(self, server: Server) -> str | None:
        """The device to the server, "" where it is this host itself."""
        if server.route is Route.LAN and not is_private(server.address):
            return None
        if server.address.is_loopback:
            return "" if server.route is Route.LAN else None
        return self._side_device(server.route, server.address.version)

    def _socket(self, server: Server, kind: socket.SocketKind) -> socket.socket | None:
        device = self._device(server)
        if device is None or self._epoll.closed:
            return None
        family = socket.AF_INET if server.address.version == 4 else socket.AF_INET6
        made = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        try:
            if device:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARKS[server.route])
                made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        except OSError:
            made.close()
            raise
        return made

    def _open_udp(self, server: Server, now: float) -> UdpChannel | None:
        try:
            made = self._socket(server, socket.SOCK_DGRAM)
            if made is None:
                return None
            try:
                made.connect((str(server.address), PORT))
                self._epoll.register(made, select.EPOLLIN)
            except OSError:
                made.close()
                raise
        except OSError as error:
            self.counters[f"upstream_open_{error.errno}"] += 1
            return None
        channel = UdpChannel(server, over_tcp=False, sock=made, opened=now, uses=1)
        self._channels[made.fileno()] = channel
        self._by_route[server.route] += 1
        return channel

    def _retire(self, channel: UdpChannel) -> None:
        channel.retired = True
        if not channel.attempts:
            self._close(channel)

    def _close(self, channel: UdpChannel) -> None:
        if not channel.closed:
            channel.closed = True
            self._by_route[channel.server.route] -= 1
            del self._channels[channel.sock.fileno()]
            self._epoll.unregister(channel.sock)
            channel.sock.close()

    def _drop(self, channel: UdpChannel) -> None:
        """Close it, and take it out of its pool."""
        pool = self._pools.get(channel.server)
        if pool is not None and channel in pool:
            pool[pool.index(channel)] = None
        self._close(channel)

    # Tasks

    async def run(self) -> None:
        """Carry answers until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                while True:
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                    now = self._clock()
                    for number, _ in self._epoll.poll(0, BATCH):
                        if (channel := self._channels.get(number)) is not None:
                            self._read(channel, now)
            finally:
                self._nursery = None

    def _read(self, channel: UdpChannel, now: float) -> None:
        receive, view = channel.sock.recv_into, self._view
        while True:
            try:
                size = receive(view)
            except BlockingIOError:
                return
            except OSError as error:  # nobody listens there, or the way is gone
                self.counters[f"upstream_receive_{error.errno}"] += 1
                self._drop(channel)
                self.resolver.lost(channel, now)
                return
            self._take_untrusted(channel, bytes(view[:size]), now)
            if channel.closed or not channel.attempts:
                return  # what else has come in wakes us again

    def _take_untrusted(self, channel: Channel, message: bytes, now: float) -> None:
        try:
            self.resolver.answered_untrusted(channel, message, now)
        except Exception as error:  # a mistake of ours must not end the daemon
            mishap.note(self.counters, error)

    async def _converse(self, channel: TcpChannel, message: bytes) -> None:
        try:
            with channel.scope, trio.move_on_after(TCP_S):
                async with self._limit:
                    await self._ask(channel, message)
        except (OSError, trio.BrokenResourceError):
            self.counters["upstream_tcp_failed"] += 1
        finally:
            self._conversations.discard(channel)
            self.resolver.lost(channel, self._clock())

    async def _ask(self, channel: TcpChannel, message: bytes) -> None:
        made = self._socket(channel.server, socket.SOCK_STREAM)
        if made is None:
            return
        with trio.socket.from_stdlib_socket(made) as connection:
            await connection.connect((str(channel.server.address), PORT))
            stream = trio.SocketStream(connection)
            # In one segment: RFC 7766 §8.
            await stream.send_all(len(message).to_bytes(2, "big") + message)
            while channel.attempts:
                size = int.from_bytes(await _exactly(stream, 2), "big")
                self._take_untrusted(channel, await _exactly(stream, size), self._clock())

    def sweep(self, now: float) -> None:
        """Close the sockets that nobody waits on and whose port has served for long enough."""
        for server, pool in list(self._pools.items()):
            for slot, channel in enumerate(pool):
                if channel is not None and now - channel.opened >= MOST_AGE_S:
                    pool[slot] = None
                    self._retire(channel)
            if not any(pool):
                del self._pools[server]

    def end_side(self, routes: frozenset[Route]) -> list[Channel]:
        """A side is gone, or leads elsewhere: close its sockets, and give back what may still be waited on."""
        sockets = [one for one in self._channels.values() if one.server.route in routes]
        conversations = [one for one in self._conversations if one.server.route in routes]
        for channel in sockets:
            self._drop(channel)
        for conversation in conversations:
            conversation.scope.cancel()
        return [*sockets, *conversations]

    def close(self) -> None:
        """Close everything, for good; harmless twice."""
        for channel in list(self._channels.values()):
            self._close(channel)
        self._pools.clear()
        self._epoll.close()

    def statistics(self) -> dict[str, int]:
        """Sockets open now, and what went wrong."""
        return {"upstream_sockets": len(self._channels) + len(self._conversations), **self.counters}


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    """Read so many bytes; BrokenPipeError when the server is through before."""
    read = bytearray()
    while len(read) < size:
        piece = await stream.receive_some(size - len(read))
        if not piece:
            raise BrokenPipeError
        read += piece
    return bytes(read)
