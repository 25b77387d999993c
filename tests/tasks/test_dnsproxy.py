"""What apps get from the DNS proxy, whatever resolvers do; the resolvers are in the same network namespace."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ipaddress import ip_address

import dns.rcode
import pytest
import trio

from tests.fakes.resolvers import FakeResolver, answer, asked, query, read, resolvers
from tests.hosts import own_namespace, run
from tunsplit.engine.dnstable import DnsTable, Route
from tunsplit.engine.policy import Verdict
from tunsplit.tasks.dnsproxy import Asker, DnsProxy, boottime

pytestmark = pytest.mark.netns

RELAY, RELAY2, SYSTEM, PUBLIC, RELAY6 = "10.64.0.1", "10.64.0.2", "192.168.50.53", "198.51.100.53", "fd64::1"


class FakeNetwork:
    """Both sides are the loopback device, until the test says otherwise."""

    def __init__(self) -> None:
        self.devices: dict[str, str | None] = {"tunnel": "lo", "outside": "lo", "lan": "lo"}
        self.families = {"tunnel": {4, 6}, "outside": {4, 6}, "lan": {4, 6}}
        self.identity = 0

    def side_device(self, route: Route, family: int) -> str | None:
        return self.devices[route.value] if family in self.families[route.value] else None

    def side_identity(self, route: Route) -> int:
        return self.identity


class Stage:
    """The proxy, and an app of either kind."""

    def __init__(self, table: DnsTable, **options) -> None:
        self.network = FakeNetwork()
        self.proxy = DnsProxy(table, self.network, **options)

    async def ask(self, message: bytes, verdict: Verdict = Verdict.TUNNEL, **asker) -> bytes:
        """Ask, and wait for the answer."""
        send, receive = trio.open_memory_channel[bytes](1)
        self.proxy.ask(
            message, Asker(None, verdict, **{"asked": ip_address("8.8.8.8"), **asker}), send.send_nowait, boottime()
        )
        with trio.fail_after(20):
            return await receive.receive()


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with own_namespace():
        run("ip", "link", "set", "lo", "up")
        for address in (RELAY, RELAY2, SYSTEM, PUBLIC):
            run("ip", "address", "add", f"{address}/32", "dev", "lo")
        run("ip", "address", "add", f"{RELAY6}/128", "dev", "lo", "nodad")
        yield


@asynccontextmanager
async def staged(*fakes: FakeResolver, relay: tuple[str, ...] = (RELAY,), **options) -> AsyncIterator[Stage]:
    table = DnsTable(
        options.pop("platform", "linux"),
        relay=tuple(map(ip_address, relay)),
        system=(ip_address(SYSTEM),),
        custom=tuple(map(ip_address, options.pop("custom", ()))),
    )
    stage = Stage(table, **options)
    async with resolvers(*fakes), trio.open_nursery() as nursery:
        nursery.start_soon(stage.proxy.run)
        yield stage
        nursery.cancel_scope.cancel()


async def test_a_question_gets_its_answer():
    relay = FakeResolver(RELAY)
    async with staged(relay) as stage:
        question = query("www.example.com")
        got = read(await stage.ask(question))

    assert read(question).id == got.id
    assert "www.example.com. 60 IN A 192.0.2.1" == got.answer[0].to_text()


async def test_an_answer_is_given_again():
    relay = FakeResolver(RELAY)
    async with staged(relay) as stage:
        await stage.ask(query("www.example.com"))
        question = query("WWW.example.com")
        got = read(await stage.ask(question))

    assert 1 == len(relay.seen)
    assert read(question).id == got.id
    assert "WWW.example.com." == got.question[0].name.to_text()


async def test_one_side_does_not_get_the_other_sides_answers():
    relay = FakeResolver(RELAY)
    system = FakeResolver(SYSTEM, lambda question, _: [answer(question, "www.example.com. 60 IN A 198.51.100.7")])
    async with staged(relay, system, platform="per-app") as stage:
        inside = read(await stage.ask(query()))
        outside = read(await stage.ask(query(), Verdict.UPLINK))

    assert "192.0.2.1" == inside.answer[0][0].to_text()
    assert "198.51.100.7" == outside.answer[0][0].to_text()


async def test_a_truncated_answer_is_fetched_over_tcp():
    records = [f"www.example.com. 60 IN A 192.0.2.{n}" for n in range(1, 200)]

    def behave(question, over_tcp):
        return [answer(question, *records) if over_tcp else answer(question, flags=0x0200)]

    relay = FakeResolver(RELAY, behave)
    async with staged(relay) as stage:
        short = read(await stage.ask(query()))
        long = read(await stage.ask(query(), over_tcp=True))

    assert ["udp", "tcp"] == [transport for _, transport in relay.seen]
    assert short.flags & 0x0200
    assert 199 == sum(len(rrset) for rrset in long.answer)


async def test_without_a_way_it_is_servfail_at_once():
    async with staged() as stage:
        stage.network.devices["tunnel"] = None
        stage.proxy.network_changed()
        got = read(await stage.ask(query()))

    assert dns.rcode.SERVFAIL == got.rcode()


async def test_the_next_resolver_is_asked_when_nobody_listens():
    second = FakeResolver(RELAY2)
    async with staged(second, relay=(RELAY, RELAY2)) as stage:
        got = read(await stage.ask(query()))

    assert "192.0.2.1" == got.answer[0][0].to_text()


async def test_silence_ends_in_servfail():
    relay = FakeResolver(RELAY, lambda *_: [])
    async with staged(relay) as stage:
        got = read(await stage.ask(query()))

    assert dns.rcode.SERVFAIL == got.rcode()
    assert 3 == len(relay.seen)


async def test_what_was_asked_is_shown():
    async with staged(FakeResolver(RELAY)) as stage:
        await stage.ask(query("www.example.com", "HTTPS"))
        (shown,) = stage.proxy.recent()

    assert ("www.example.com.", "HTTPS", "NOERROR", RELAY) == (shown.name, shown.type, shown.rcode, shown.upstream)
    assert ("tunnel", "linux · default · normal app", "8.8.8.8") == (shown.route, shown.row, shown.asked)


async def test_a_side_that_goes_fails_its_questions_at_once():
    relay = FakeResolver(RELAY, lambda *_: [])
    async with staged(relay) as stage, trio.open_nursery() as nursery:

        async def go() -> None:
            await asked(relay)
            stage.network.devices["tunnel"] = None
            stage.proxy.network_changed()

        nursery.start_soon(go)
        got = read(await stage.ask(query()))

    assert dns.rcode.SERVFAIL == got.rcode()
    assert 1 == len(relay.seen)
