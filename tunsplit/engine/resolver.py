"""Questions in flight: from the first sending to the answer that all who asked get.

Theory of operation. Who asks what is being asked already, in the same partition, waits with the others. A question
goes to its servers in order: to the next when one has refused, failed or kept silent for ATTEMPT_S; a truncated
answer is fetched from the same server over TCP, and who cannot read EDNS is asked without. The answer counts that
comes on the socket that asked, from the server (the socket is connected), with the attempt's identifier and question;
all else is as if nothing had come: who guesses wrong has not even spoilt the question. A late answer counts
as long as the question is in flight. Once all servers have failed, or after MOST_ATTEMPTS silences, it is SERVFAIL.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tunsplit.engine.dnstable import Server
from tunsplit.wire.dns import (
    BADVERS,
    FORMERR,
    NOERROR,
    NOTIMP,
    NXDOMAIN,
    Answer,
    Question,
    read_answer_untrusted,
    upstream_question,
)

ATTEMPT_S = 1.5  # thrice is less than the 5 s after which apps ask again (resolv.conf(5), timeout)
MOST_ATTEMPTS = 3
SILENT_S = 10.0  # for how long a server that kept silent is asked after the others
MOST_SILENT = 64  # servers of which that is known
MOST_PENDING = 4096
MOST_OF_ONE = 2048  # of those, by one user: a flood leaves room for the others
MOST_WAITING = 16_384  # who wait, all questions together


@dataclass(slots=True, eq=False)
class Channel:
    """A socket of ours that is connected to one server; `attempts` by the identifiers in use on it."""

    server: Server
    over_tcp: bool
    attempts: dict[int, "Attempt"] = field(default_factory=dict)


class Carrier(Protocol):
    """Who has the sockets."""

    def open(self, server: Server, *, over_tcp: bool, now: float) -> Channel | None:
        """A channel for one more question; None: there is no way to the server now."""

    def send(self, channel: Channel, message: bytes) -> bool:
        """Send; False: it cannot be sent, and the channel is no good."""

    def release(self, channel: Channel) -> None:
        """One attempt less waits on this channel."""


class Outcome(NamedTuple):
    """What became of a question; without an answer, it is SERVFAIL. `server` is who said so, if anyone."""

    answer: Answer | None
    server: Server | None


Waiter = Callable[[Outcome], None]
SILENCE = Outcome(None, None)
WITHDRAWN = Outcome(None, None)  # told by identity: nothing is wrong, but it is to be asked by what holds now


@dataclass(slots=True, eq=False)
class Pending:
    """A question in flight. `waiters` by who waits: who asks again waits once."""

    key: bytes
    question: Question
    servers: tuple[Server, ...]
    user: int
    over_tcp: bool
    waiters: dict[Hashable, Waiter]
    attempts: list["Attempt"] = field(default_factory=list)
    failed: frozenset[int] = frozenset()
    turn: int = 0
    silences: int = 0
    last: Outcome = SILENCE


@dataclass(slots=True, eq=False)
class Attempt:
    """One sending of a question to one server; `number` is the server's in the question's list."""

    pending: Pending
    number: int
    channel: Channel
    id: int
    edns: bool
    due: float


class Resolver:
    """Bounded: questions in all, of one user, and those who wait."""

    def __init__(self, carrier: Carrier, store: Callable[[bytes, Answer, float], None], below: Callable[[int], int]):
        """`store` takes what may be cached; `below(n)` is a number under n that nobody can guess."""
        self._carrier, self._store, self._below = carrier, store, below
        self._pending: dict[bytes, Pending] = {}
        self._by_user: Counter[int] = Counter()
        self._timers: OrderedDict[Attempt, None] = OrderedDict()  # by when they are due: each waits for as long
        self._silent: dict[Server, float] = {}  # until when they go last
        self._waiting = 0
        self.counters: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def due(self) -> float | None:
        """When `expire` has something to do; None: nothing is in flight."""
        return next(iter(self._timers)).due if self._timers else None

    def ask(
        self,
        key: bytes,
        question: Question,
        servers: tuple[Server, ...],
        waiter: Waiter,
        now: float,
        *,
        user: int = -1,
        identity: Hashable = None,
        over_tcp: bool = False,
    ) -> None:
        """Ask, or wait with those who have; `waiter` is called once, at once or later.

        Args:
            key: the partition and the question's key.
            identity: who asks, with the app's own identifier: repeats of one asker are answered once; None: no repeat.
            user: whose share of the room it takes.
        """
        identity = waiter if identity is None else identity
        pending = self._pending.get(key)
        if pending is not None:
            self.counters["shared"] += 1
            if identity not in pending.waiters:
                if self._waiting >= MOST_WAITING:
                    self._refuse(waiter)
                    return
                self._waiting += 1
            pending.waiters[identity] = waiter
            return
        if len(self._pending) >= MOST_PENDING or self._by_user[user] >= MOST_OF_ONE or self._waiting >= MOST_WAITING:
            self._refuse(waiter)
            return
        pending = Pending(key, question, servers, user, over_tcp, {identity: waiter})
        self._pending[key] = pending
        self._by_user[user] += 1
        self._waiting += 1
        self._advance(pending, now)

    def _refuse(self, waiter: Waiter) -> None:
        self.counters["overflow"] += 1
        waiter(SILENCE)

    def _advance(self, pending: Pending, now: float) -> None:
        """Ask the next server that has not failed; one that is known to be silent, only after the others."""
        servers, turn = pending.servers, pending.turn
        order = [number % len(servers) for number in range(turn, turn + len(servers))]
        if self._silent and len(servers) > 1:
            order.sort(key=lambda number: self._silent.get(servers[number], now) > now)
        for number in order:
            if number not in pending.failed:
                pending.turn = number + 1
                if self._try(pending, number, now, over_tcp=pending.over_tcp):
                    return
        self._finish(pending, pending.last)

    def _try(self, pending: Pending, number: int, now: float, *, over_tcp: bool, edns: bool = True) -> bool:
        channel = self._carrier.open(pending.servers[number], over_tcp=over_tcp, now=now)
        if channel is None:
            pending.failed |= {number}
            return False
        while (id_ := self._below(0x10000)) in channel.attempts:
            pass
        attempt = Attempt(pending, number, channel, id_, edns, now + ATTEMPT_S)
        channel.attempts[id_] = attempt
        pending.attempts.append(attempt)
        self._timers[attempt] = None
        self.counters["upstream_tcp" if over_tcp else "upstream_udp"] += 1
        if self._carrier.send(channel, upstream_question(pending.question, id_, edns=edns)):
            return True
        pending.failed |= {number}
        self._end(attempt)
        return False

    def _end(self, attempt: Attempt) -> None:
        attempt.pending.attempts.remove(attempt)
        self._timers.pop(attempt, None)
        del attempt.channel.attempts[attempt.id]
        self._carrier.release(attempt.channel)

    def answered_untrusted(self, channel: Channel, message: bytes, now: float) -> None:
        """A message has come in on a channel."""
        attempt = channel.attempts.get(int.from_bytes(message[:2], "big"))
        answer = read_answer_untrusted(message, attempt.pending.question.section) if attempt else None
        if attempt is None or answer is None:
            self.counters["unmatched"] += 1
            return
        pending, server = attempt.pending, channel.server
        current = attempt is pending.attempts[-1]
        self._end(attempt)
        if self._silent:
            self._silent.pop(server, None)
        if answer.truncated:
            pending.last = Outcome(None, server)
            again = not channel.over_tcp and self._try(pending, attempt.number, now, over_tcp=True, edns=attempt.edns)
        elif answer.rcode in (NOERROR, NXDOMAIN):
            self._store(pending.key, answer, now)
            self._finish(pending, Outcome(answer, server))
            return
        else:
            self.counters["refused_upstream"] += 1
            pending.last = Outcome(answer, server) if answer.rcode < BADVERS else pending.last
            # RFC 6891 §7: old servers know no EDNS.
            deaf = attempt.edns and answer.rcode in (FORMERR, NOTIMP, BADVERS)
            again = deaf and self._try(pending, attempt.number, now, over_tcp=channel.over_tcp, edns=False)
        if not again:
            pending.failed |= {attempt.number}
            if current:
                self._advance(pending, now)

    def lost(self, channel: Channel, now: float) -> None:
        """A channel has broken: what waits on it goes on at once, to another server."""
        for attempt in list(channel.attempts.values()):
            pending = attempt.pending
            current = attempt is pending.attempts[-1]
            pending.failed |= {attempt.number}
            self._end(attempt)
            if current:
                self._advance(pending, now)

    def withdraw(self, channels: Iterable[Channel] | None = None) -> None:
        """End the questions that wait on these channels, or all: who waits is told `WITHDRAWN`, and may ask anew."""
        if channels is None:
            pending = dict.fromkeys(self._pending.values())
        else:
            pending = {attempt.pending: None for channel in channels for attempt in channel.attempts.values()}
        for one in pending:
            self._finish(one, WITHDRAWN)

    def expire(self, now: float) -> None:
        """Deal with silence: the next server, or the end. The silent one may still answer."""
        while self._timers and (attempt := next(iter(self._timers))).due <= now:
            del self._timers[attempt]
            self.counters["timeouts"] += 1
            if len(self._silent) >= MOST_SILENT:
                self._silent.clear()
            self._silent[attempt.channel.server] = now + SILENT_S
            pending = attempt.pending
            pending.silences += 1
            if pending.silences < MOST_ATTEMPTS:
                self._advance(pending, now)
            else:
                self._finish(pending, pending.last)

    def _finish(self, pending: Pending, outcome: Outcome) -> None:
        for attempt in pending.attempts[::-1]:
            self._end(attempt)
        del self._pending[pending.key]
        self._by_user[pending.user] -= 1
        if not self._by_user[pending.user]:
            del self._by_user[pending.user]
        self._waiting -= len(pending.waiters)
        for waiter in pending.waiters.values():
            waiter(outcome)
