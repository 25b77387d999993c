"""The DNS proxy: takes an app's question, and gives the answer that the table's resolvers have for it.

app's bytes ─▶ ask ─▶ table: which route, which resolvers ─▶ cache ─▶ resolver ─▶ upstream's socket on that side
                                                              └──────────┴─▶ answer_for ─▶ reply

Whatever it does with the app's message, and with what comes back, is bytes; no object of a DNS library is made.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, Protocol

import trio

from tunsplit.engine.dnscache import PARTITION, DnsCache
from tunsplit.engine.dnstable import Choice, DnsTable, Route, Server
from tunsplit.engine.flow import App
from tunsplit.engine.policy import Verdict
from tunsplit.engine.resolver import WITHDRAWN, Channel, Outcome, Resolver
from tunsplit.host import FAMILIES, IPAddress
from tunsplit.tasks import mishap
from tunsplit.tasks.chance import Chance
from tunsplit.tasks.upstream import Upstream
from tunsplit.wire.dns import (
    AAAA,
    AXFR,
    BADVERS,
    IXFR,
    REFUSED,
    SERVFAIL,
    Question,
    answer_for,
    fault_untrusted,
    name_of,
    rcode_name,
    read_question_untrusted,
    refusal,
    type_name,
    without_records,
)

MOST_RECENT = 512
MOST_PLANS = 512  # asked addresses that are remembered with what becomes of their questions
TICK_S = 0.05  # how late a silence may be noticed
SWEEP_S = 1.0
TUNNEL_SIDE, UPLINK_SIDE = frozenset({Route.TUNNEL}), frozenset({Route.OUTSIDE, Route.LAN})
SIDE_OF = {Verdict.TUNNEL: Route.TUNNEL, Verdict.UPLINK: Route.OUTSIDE}

Reply = Callable[[bytes], None]
Resolvers = tuple[tuple[IPAddress, Route], ...]  # what a partition of the cache belongs to


def boottime() -> float:
    """Seconds of a clock that goes on while the host sleeps: TTLs run out in the meantime."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class SideNetwork(Protocol):
    """What the proxy needs to know of the network."""

    def side_device(self, route: Route, family: int) -> str | None:
        """The device by which questions of this route leave for addresses of family 4 or 6; None: no way now."""

    def side_identity(self, route: Route) -> Hashable:
        """Another value when the network behind the route is another: its addresses, gateway, the gateway's MAC."""


class Asker(NamedTuple):
    """Who asks; `client`: it is the VPN's client.

    `asked` is the resolver that the app has asked; None: our own stub. Two questions of one `identity` (the flow's
    four-tuple, say) with one identifier are the same, asked again.
    """

    app: App | None
    verdict: Verdict
    asked: IPAddress | None
    over_tcp: bool = False
    identity: Hashable = None
    client: bool = False


@dataclass(frozen=True, slots=True)
class Recent:
    """A question that was answered, in plain values; `number` counts on, `at` is the wall clock's second."""

    number: int
    at: float
    app: App | None
    verdict: str
    route: str
    row: str
    asked: str | None
    upstream: str | None
    name: str
    type: str
    rcode: str
    ms: float
    cached: bool


class Plan(NamedTuple):
    """What becomes of one class of questions."""

    choice: Choice
    partition: bytes
    without_aaaa: bool


class Record(NamedTuple):
    """What `Recent` is made of when someone looks."""

    at: float
    asker: Asker
    section: bytes
    route: Route
    row: str
    server: Server | None
    rcode: int
    seconds: float
    cached: bool


class DnsProxy:
    """One for the daemon. `ask` may be called before `run`, and at any time."""

    def __init__(
        self,
        table: DnsTable,
        network: SideNetwork,
        *,
        filter_aaaa: bool = True,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._table, self._network, self._filter_aaaa, self._clock = table, network, filter_aaaa, clock
        chance = Chance()
        self._upstream = Upstream(network.side_device, chance.below, clock)
        self._cache = DnsCache()
        self._resolver = self._upstream.resolver = Resolver(self._upstream, self._cache.put, chance.below)
        self._plans: dict[tuple[Verdict, bool, IPAddress | None], Plan] = {}
        # The same by the asker himself: a flow's is one object, and addresses and verdicts are dear to compare. Each is
        # held, so that no other has his number.
        self._known: dict[int, tuple[Asker, Plan]] = {}
        self._partitions: dict[Resolvers, bytes] = {}
        self._numbers = count()
        self._identities = self._look()
        self._recent: deque[Record] = deque(maxlen=MOST_RECENT)
        self._answered = 0
        self._wake = trio.Event()
        self.counters: Counter[str] = Counter()

    def ask(self, message: bytes, asker: Asker, reply: Reply, now: float) -> None:
        """Answer a question.

        Args:
            message: as it came from the app.
            asker: who asks.
            reply: called once, at once or later, with the whole answer, or never: to what is no question.
            now: seconds of CLOCK_BOOTTIME.
        """
        self.counters["questions"] += 1
        question = read_question_untrusted(message)
        if question is None:
            self._fault(message, reply)
        else:
            self._take(question, asker, reply, now)

    def _take(self, question: Question, asker: Asker, reply: Reply, now: float) -> None:
        known = self._known.get(id(asker))
        plan = known[1] if known is not None else self._plan_of(asker)
        if question.version or question.type in (AXFR, IXFR) or asker.verdict is Verdict.BLOCK:
            # A zone's transfer is many messages, and no resolver's business.
            self._refuse(question, asker, plan, reply, BADVERS if question.version else REFUSED)
            return
        if not plan.choice.servers:
            rcode = REFUSED if plan.choice.route is Route.REFUSED else SERVFAIL
            self._refuse(question, asker, plan, reply, rcode)
            return
        key = plan.partition + question.key
        entry = self._cache.get(key, now)
        if entry is not None:
            self.counters["cached"] += 1
            self._note(asker, question, plan.choice.servers[0], entry.answer.rcode, 0.0, cached=True)
            self._reply(reply, self._fit(question, entry.shown, asker, plan))
            return

        def answered(outcome: Outcome) -> None:
            if outcome is WITHDRAWN:
                self._take(question, asker, reply, self._clock())
                return
            seconds = self._clock() - now
            server = outcome.server or plan.choice.servers[0]
            if outcome.answer is None:
                self.counters["servfail"] += 1
                self._note(asker, question, server, SERVFAIL, seconds)
                self._reply(reply, refusal(question, SERVFAIL))
                return
            self._note(asker, question, server, outcome.answer.rcode, seconds)
            self._reply(reply, self._fit(question, outcome.answer.message, asker, plan))

        identity = None if asker.identity is None else (asker.identity, question.id)
        user = -1 if asker.app is None else asker.app.uid
        idle = not len(self._resolver)
        self._resolver.ask(
            key, question, plan.choice.servers, answered, now, user=user, identity=identity, over_tcp=asker.over_tcp
        )
        if idle:
            self._wake.set()

    def _reply(self, reply: Reply, message: bytes) -> None:
        try:
            reply(message)
        except Exception as error:
            # One asker who cannot be told must not keep the others' answers from them.
            mishap.note(self.counters, error)

    def _fault(self, message: bytes, reply: Reply) -> None:
        self.counters["malformed"] += 1
        if (answer := fault_untrusted(message)) is not None:
            self._reply(reply, answer)

    def _refuse(self, question: Question, asker: Asker, plan: Plan, reply: Reply, rcode: int) -> None:
        self.counters["refused"] += 1
        self._answered += 1
        choice = plan.choice
        route = Route.REFUSED if asker.verdict is Verdict.BLOCK else choice.route
        self._recent.append(
            Record(time.time(), asker, question.section, route, choice.row, None, rcode, 0.0, cached=False)
        )
        self._reply(reply, refusal(question, rcode))

    def _fit(self, question: Question, message: bytes, asker: Asker, plan: Plan) -> bytes:
        if plan.without_aaaa and question.type == AAAA:
            message = without_records(message, question.section)
        return answer_for(question, message, over_tcp=asker.over_tcp)

    def _note(
        self, asker: Asker, question: Question, server: Server, rcode: int, seconds: float, *, cached: bool = False
    ) -> None:
        self._answered += 1
        self._recent.append(
            Record(time.time(), asker, question.section, server.route, server.row, server, rcode, seconds, cached)
        )

    def _plan_of(self, asker: Asker) -> Plan:
        plan = self._plans.get((asker.verdict, asker.client, asker.asked)) or self._plan(asker)
        if len(self._known) >= MOST_PLANS:
            self._known.clear()
        self._known[id(asker)] = (asker, plan)
        return plan

    def _plan(self, asker: Asker) -> Plan:
        """Work out what becomes of a class of questions."""
        choice = self._table.choose(
            excluded=asker.verdict is Verdict.UPLINK,
            tunnel_up=self._has(Route.TUNNEL),
            asked=asker.asked,
            client=asker.client,
        )
        resolvers = tuple((server.address, server.route) for server in choice.servers)
        partition = self._partitions.get(resolvers)
        if partition is None:
            if len(self._partitions) >= MOST_PLANS:
                self._forget(self._partitions)
            # Never a number twice: what is in flight may yet be stored under its old one.
            partition = self._partitions[resolvers] = next(self._numbers).to_bytes(PARTITION, "big")
        # The VPN's client asks for where its transport is to go.
        side = Route.OUTSIDE if asker.client else SIDE_OF.get(asker.verdict)
        lacks_ipv6 = side is not None and self._network.side_device(side, 6) is None
        plan = Plan(choice, partition, self._filter_aaaa and lacks_ipv6)
        if len(self._plans) >= MOST_PLANS:
            self._unplan()
        self._plans[asker.verdict, asker.client, asker.asked] = plan
        return plan

    def _unplan(self) -> None:
        self._plans.clear()
        self._known.clear()

    def _has(self, route: Route) -> bool:
        return any(self._network.side_device(route, family) is not None for family in FAMILIES)

    def _forget(self, which: Iterable[Resolvers]) -> None:
        """Forget the answers of these resolvers."""
        self._unplan()
        self._cache.flush({self._partitions.pop(resolvers) for resolvers in list(which)})

    # What changes

    def configure(self, table: DnsTable, *, filter_aaaa: bool = True) -> None:
        """Follow another table, and the network as it is now, as `network_changed` does.

        What is in flight is asked anew: from now on no packet goes to whom only the table before has named.
        """
        is_other = table != self._table
        self._table, self._filter_aaaa = table, filter_aaaa
        if is_other:
            self._forget(self._partitions)
        ended = self._follow()
        self._resolver.withdraw(None if is_other else ended)

    def network_changed(self) -> None:
        """Look at the sides again: of one that is gone or another, sockets are closed and answers forgotten.

        Its questions in flight end with SERVFAIL, or are asked again if there is a way.
        """
        self._resolver.withdraw(self._follow())

    def _follow(self) -> list[Channel]:
        """Close all sockets of sides that are not what they were, before anything is asked anew; which they were."""
        before, self._identities = self._identities, self._look()
        self._unplan()
        ended: list[Channel] = []
        for side in (TUNNEL_SIDE, UPLINK_SIDE):
            if any(before[route] != self._identities[route] for route in side):
                self._forget([one for one in self._partitions if any(route in side for _, route in one)])
                ended += self._upstream.end_side(side)
        return ended

    def _look(self) -> dict[Route, Hashable]:
        return {
            route: (self._network.side_identity(route), *(self._network.side_device(route, one) for one in FAMILIES))
            for route in TUNNEL_SIDE | UPLINK_SIDE
        }

    # Tasks

    async def run(self) -> None:
        """Carry answers and notice silence, until cancelled; then all sockets are closed."""
        try:
            await self._run()
        finally:
            self.close()

    def close(self) -> None:
        """Close all sockets, for good: for a proxy that does not come to run."""
        self._upstream.close()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._upstream.run)
            nursery.start_soon(self._sweep)
            while True:
                if self._resolver.due is None:
                    self._wake = trio.Event()
                    await self._wake.wait()
                await trio.sleep(TICK_S)
                self._resolver.expire(self._clock())

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            self._upstream.sweep(self._clock())

    # What is shown

    def recent(self) -> list[Recent]:
        """The latest questions with their answers, oldest first; at most MOST_RECENT."""
        first = self._answered - len(self._recent)
        return list(self._show(first))

    def _show(self, first: int) -> Iterator[Recent]:
        for number, record in enumerate(self._recent, first):
            asker, server = record.asker, record.server
            yield Recent(
                number=number,
                at=record.at,
                app=asker.app,
                verdict=asker.verdict.value,
                route=record.route.value,
                row=record.row,
                asked=str(asker.asked) if asker.asked is not None else None,
                upstream=str(server.address) if server is not None else None,
                name=name_of(record.section),
                type=type_name(int.from_bytes(record.section[-4:-2], "big")),
                rcode=rcode_name(record.rcode),
                ms=round(record.seconds * 1000, 3),
                cached=record.cached,
            )

    def statistics(self) -> dict[str, int]:
        """Counters, and how much is held now."""
        return {
            "in_flight": len(self._resolver),
            **self.counters,
            **self._resolver.counters,
            **self._cache.statistics(),
            **self._upstream.statistics(),
        }
