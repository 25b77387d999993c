"""A resolver whose wires are the test's: what is sent to whom, what comes back, what the app gets."""

from ipaddress import ip_address
from itertools import count

from tests.fakes.resolvers import answer, query
from tunsplit.engine.dnstable import Route, Server
from tunsplit.engine.resolver import Channel, Outcome, Resolver
from tunsplit.wire.dns import Answer, read_question_untrusted

FIRST, SECOND = (Server(ip_address(f"10.64.0.{number}"), Route.TUNNEL, "row") for number in (1, 2))
NOW = 1000.0
A = "www.example.com. 60 IN A 192.0.2.1"


class Wires:
    """A carrier that keeps what is sent, by server; closed servers have no way, broken ones cannot be sent to."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Channel, bytes]] = []
        self.closed: set[Server] = set()
        self.broken: set[Server] = set()
        self.released = 0
        self.channels: dict[tuple[Server, bool], Channel] = {}

    def open(self, server: Server, *, over_tcp: bool, now: float) -> Channel | None:
        if server in self.closed:
            return None
        return self.channels.setdefault((server, over_tcp), Channel(server, over_tcp))

    def send(self, channel: Channel, message: bytes) -> bool:
        self.sent.append((f"{'tcp' if channel.over_tcp else 'udp'} {channel.server.address}", channel, message))
        return channel.server not in self.broken

    def release(self, channel: Channel) -> None:
        self.released += 1


class World:
    def __init__(self) -> None:
        self.wires = Wires()
        self.stored: list[bytes] = []
        numbers = count(1)
        self.below = lambda limit: next(numbers) % limit
        self.resolver = Resolver(self.wires, self.store, lambda limit: self.below(limit))
        self.outcomes: list[Outcome] = []

    def store(self, key: bytes, answer: Answer, now: float) -> None:
        self.stored.append(key)

    def ask(self, name: str = "www.example.com", *servers: Server, now: float = NOW, **options) -> None:
        found = read_question_untrusted(query(name, use_edns=0))
        assert found is not None
        options.setdefault("identity", object())
        self.resolver.ask(found.key, found, servers or (FIRST, SECOND), self.outcomes.append, now, **options)

    @property
    def asked(self) -> list[str]:
        return [to for to, *_ in self.wires.sent]

    def reply(self, *records: str, number: int = -1, now: float = NOW, **options) -> None:
        """The server answers the question that was sent so manieth."""
        _, channel, message = self.wires.sent[number]
        self.resolver.answered_untrusted(channel, answer(message, *records, **options), now)

    @property
    def is_idle(self) -> bool:
        channels = self.wires.channels.values()
        return not len(self.resolver) and self.resolver.due is None and not any(one.attempts for one in channels)


def codes(world: World) -> list[object]:
    return [None if outcome.answer is None else outcome.answer.rcode for outcome in world.outcomes]
