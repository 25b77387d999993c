"""What apps get from the DNS proxy: answers, sizes, refusals; the resolvers are in the same network namespace."""

from ipaddress import ip_address

import dns.edns
import dns.flags
import dns.rcode
import pytest
import trio
import trio.testing

from tests.fakes.resolvers import FakeResolver, address_answer, answer, asked, query, quick_answer, read
from tests.tasks.proxystage import PUBLIC, RELAY, RELAY2, RELAY6, SYSTEM, Stage, names, staged
from tunsplit.engine.dnstable import DnsTable
from tunsplit.engine.flow import App
from tunsplit.engine.policy import Verdict
from tunsplit.engine.resolver import MOST_OF_ONE
from tunsplit.tasks import dnsproxy
from tunsplit.tasks.dnsproxy import MOST_RECENT, Asker, boottime
from tunsplit.tasks.upstream import MOST_SOCKETS
from tunsplit.wire import dns as wire_dns

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("resolvers_here")]


# Questions and answers


async def test_a_question_gets_its_answer():
    async with staged(FakeResolver(RELAY)) as stage:
        question = query("www.example.com")
        got = await stage.ask(question)

    assert read(question).id == read(got).id
    assert ["www.example.com. 60 IN A 192.0.2.1"] == names(got)


async def test_an_answer_is_given_again_in_the_spelling_of_the_question():
    relay = FakeResolver(RELAY)
    async with staged(relay) as stage:
        await stage.ask(query("www.example.com"))
        question = query("WWW.example.com")
        got = read(await stage.ask(question))

    assert 1 == len(relay.seen)
    assert read(question).id == got.id
    assert "WWW.example.com." == got.question[0].name.to_text()


async def test_an_answers_ttl_counts_down():
    now = [5000.0]
    async with staged(FakeResolver(RELAY), clock=lambda: now[0]) as stage:
        await stage.ask(query(), now=now[0])
        got = await stage.ask(query(), now=now[0] + 45)

    assert ["www.example.com. 15 IN A 192.0.2.1"] == names(got)


async def test_one_sides_answer_is_not_the_others():
    relay = FakeResolver(RELAY)
    system = FakeResolver(SYSTEM, lambda question, _: [answer(question, "www.example.com. 60 IN A 198.51.100.7")])
    async with staged(relay, system, platform="per-app") as stage:
        inside = [await stage.ask(query()) for _ in range(2)]
        outside = [await stage.ask(query(), Verdict.UPLINK) for _ in range(2)]

    assert [["www.example.com. 60 IN A 192.0.2.1"]] * 2 == [names(one) for one in inside]
    assert [["www.example.com. 60 IN A 198.51.100.7"]] * 2 == [names(one) for one in outside]
    assert [1, 1] == [len(relay.seen), len(system.seen)]


async def test_what_is_asked_in_tunnel_and_outside_of_one_resolver_is_kept_apart():
    public = FakeResolver(PUBLIC)
    async with staged(public, custom=(PUBLIC,)) as stage:
        for verdict in (Verdict.TUNNEL, Verdict.UPLINK):
            await stage.ask(query(), verdict)

    assert 2 == len(public.seen)


async def test_an_ipv6_resolver_is_asked_like_any_other():
    async with staged(FakeResolver(RELAY6), relay=(RELAY6,)) as stage:
        assert names(await stage.ask(query()))
        assert names(await stage.ask(query("www.example.org"), over_tcp=True))


async def test_a_resolver_of_this_host_is_asked_on_the_loopback():
    async with staged(FakeResolver("127.0.0.1"), custom=("127.0.0.1",)) as stage:
        stage.network.devices["lan"] = None

        assert names(await stage.ask(query()))


async def test_unknown_types_pass():
    record = "www.example.com. 60 IN TYPE65280 \\# 4 c00c0001"
    async with staged(FakeResolver(RELAY, lambda question, _: [answer(question, record)])) as stage:
        assert [record] == names(await stage.ask(query("www.example.com", "TYPE65280")))


async def test_questions_in_flight_are_shared():
    relay = FakeResolver(RELAY)
    got: list[bytes] = []
    async with staged(relay) as stage, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(collect, stage, query(), got)

    assert 1 == len(relay.seen)
    assert 5 == len({read(one).id for one in got})


async def collect(stage: Stage, message: bytes, got: list[bytes]) -> None:
    got.append(await stage.ask(message))


async def test_a_thousand_questions_at_once():
    got: list[bytes] = []
    async with staged(FakeResolver(RELAY, quick_answer)) as stage, trio.open_nursery() as nursery:
        for number in range(1000):
            nursery.start_soon(collect, stage, query(f"n{number}.example.com"), got)

    assert 1000 == len({names(one)[0] for one in got})


async def test_a_flood_of_random_names_leaves_no_more_than_is_allowed():
    async with staged(FakeResolver(RELAY, quick_answer)) as stage:
        got: list[bytes] = []
        message = query("n00000.example.com")
        for number in range(12_000):
            named = message.replace(b"n00000", b"n%05d" % number)
            stage.proxy.ask(named, Asker(None, Verdict.TUNNEL, None), got.append, boottime())
        held = stage.proxy.statistics()

    assert MOST_OF_ONE == held["in_flight"]
    assert 12_000 - MOST_OF_ONE == len(got)
    assert held["upstream_sockets"] <= MOST_SOCKETS
    assert len(stage.proxy.recent()) == MOST_RECENT


# EDNS, sizes, TCP

MANY = [f"www.example.com. 60 IN A 192.0.2.{n}" for n in range(1, 200)]


async def test_a_truncated_answer_is_fetched_over_tcp():
    def behave(question, over_tcp):
        return [answer(question, *MANY) if over_tcp else answer(question, flags=0x0200)]

    relay = FakeResolver(RELAY, behave)
    async with staged(relay) as stage:
        short = read(await stage.ask(query()))
        long = read(await stage.ask(query(), over_tcp=True))

    assert ["udp", "tcp"] == [transport for _, transport in relay.seen]
    assert short.flags & 0x0200
    assert 199 == sum(len(rrset) for rrset in long.answer)


async def test_who_asks_over_tcp_is_asked_for_over_tcp():
    relay = FakeResolver(RELAY, lambda question, _: [answer(question, *MANY)])
    async with staged(relay) as stage:
        got = read(await stage.ask(query(), over_tcp=True))

    assert ["tcp"] == [transport for _, transport in relay.seen]
    assert 199 == len(got.answer[0])


async def test_of_the_apps_edns_nothing_goes_on_but_do():
    relay = FakeResolver(RELAY)
    cookie = dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")
    async with staged(relay) as stage:
        got = read(await stage.ask(query(use_edns=0, payload=4096, ednsflags=dns.flags.DO, options=[cookie])))
    ours = read(relay.seen[0][0])

    assert (1232, (), True) == (ours.payload, ours.options, bool(ours.ednsflags & dns.flags.DO))
    assert (1232, (), True) == (got.payload, got.options, bool(got.ednsflags & dns.flags.DO))


async def test_a_connection_that_breaks_is_servfail():
    relay = FakeResolver(RELAY, lambda *_: [])
    async with staged(relay) as stage:
        got = read(await stage.ask(query(), over_tcp=True))

    assert dns.rcode.SERVFAIL == got.rcode()


async def test_a_server_that_takes_no_connection_is_passed_over():
    second = FakeResolver(RELAY2)
    async with staged(second, relay=(RELAY, RELAY2)) as stage:
        assert names(await stage.ask(query(), over_tcp=True))
    assert 1 == stage.proxy.statistics()["upstream_tcp_failed"]


async def test_over_tcp_too_a_wrong_answer_is_as_if_nothing_had_come():
    def lie(question, over_tcp):
        return [answer(query("www.example.org")), address_answer(question, over_tcp)[0]]

    async with staged(FakeResolver(RELAY, lie)) as stage:
        assert ["www.example.com. 60 IN A 192.0.2.1"] == names(await stage.ask(query(), over_tcp=True))


# What is no question, or none that is answered


async def test_what_cannot_be_read_is_formerr_or_silence():
    got: list[bytes] = []
    async with staged() as stage:
        asker = Asker(None, Verdict.TUNNEL, None)
        for message in (b"", b"x", query()[:-1], bytes(range(12, 40)), answer(query())):
            stage.proxy.ask(message, asker, got.append, boottime())

    assert [dns.rcode.FORMERR] == [read(one).rcode() for one in got[:1]]
    assert 5 == stage.proxy.statistics()["malformed"]


@pytest.mark.parametrize(
    ("message", "verdict", "rcode"),
    [
        (query("example.com", "AXFR"), Verdict.TUNNEL, dns.rcode.REFUSED),
        (query(use_edns=1), Verdict.TUNNEL, dns.rcode.BADVERS),
        (query(), Verdict.BLOCK, dns.rcode.REFUSED),
    ],
)
async def test_a_question_that_is_refused(message, verdict, rcode):
    relay = FakeResolver(RELAY)
    async with staged(relay) as stage:
        assert rcode == read(await stage.ask(message, verdict)).rcode()
    assert [] == relay.seen


async def test_what_a_platform_does_not_support_is_refused():
    async with staged(platform="macos", custom=(SYSTEM,)) as stage:
        assert dns.rcode.REFUSED == read(await stage.ask(query())).rcode()
        (shown,) = stage.proxy.recent()

    assert ("refused", "macos · private custom · normal app", None) == (shown.route, shown.row, shown.upstream)


async def test_an_app_that_cannot_be_told_keeps_nobody_else_from_the_answer():
    def broken(message: bytes) -> None:
        raise OSError(5, "gone")

    async with staged(FakeResolver(RELAY)) as stage:
        stage.proxy.ask(query(), Asker(None, Verdict.TUNNEL, None), broken, boottime())
        assert names(await stage.ask(query()))
    assert 1 == stage.proxy.statistics()["failed_OSError_5"]


@pytest.mark.parametrize("over_tcp", [False, True])
async def test_a_mistake_costs_one_answer(over_tcp, monkeypatch):
    """What a resolver sends must not end the daemon, and with it all that keeps included apps off the uplink."""
    mistakes = [ValueError("a mistake of ours")]
    real = wire_dns.answer_for

    def answer_for(*arguments, **options):
        if mistakes:
            raise mistakes.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(dnsproxy, "answer_for", answer_for)
    relay = FakeResolver(RELAY)
    async with staged(relay) as stage:
        stage.proxy.ask(query("a.example"), Asker(None, Verdict.TUNNEL, None, over_tcp), lambda _: None, boottime())
        await asked(relay)
        assert names(await stage.ask(query("b.example"), over_tcp=over_tcp))
    assert [] == mistakes
    assert 1 == stage.proxy.statistics()["failed_ValueError"]


async def test_an_app_whose_side_has_no_ipv6_gets_no_ipv6_addresses():
    record = "www.example.com. 60 IN AAAA 2001:db8::1"
    relay = FakeResolver(RELAY, lambda question, _: [answer(question, record)])
    async with staged(relay) as stage:
        with_ipv6 = await stage.ask(query("www.example.com", "AAAA"))
        stage.network.families["tunnel"] = {4}
        stage.proxy.network_changed()
        without = [await stage.ask(query("www.example.com", "AAAA")) for _ in range(2)]
        stage.proxy.configure(stage.table, filter_aaaa=False)
        unfiltered = await stage.ask(query("www.example.com", "AAAA"))

    assert [[record], [], [], [record]] == [names(one) for one in (with_ipv6, *without, unfiltered)]


async def test_the_vpns_client_asks_system_dns_whichever_side_it_is_on():
    """L39: its own answers, of which IPv6 is kept, since its packets leave by the uplink."""
    record = "vpn.example.com. 60 IN AAAA 2001:db8::1"
    relay, system = (FakeResolver(one, lambda question, _: [answer(question, record)]) for one in (RELAY, SYSTEM))
    async with staged(relay, system) as stage:
        stage.network.families["tunnel"] = {4}
        stage.proxy.network_changed()
        question = query("vpn.example.com", "AAAA")
        app = await stage.ask(question)
        client = [await stage.ask(question, verdict, client=True) for verdict in (Verdict.TUNNEL, Verdict.UPLINK)]

    assert [[], [record], [record]] == [names(one) for one in (app, *client)]
    assert [1, 1] == [len(one.seen) for one in (relay, system)]


# What is shown


async def test_what_was_asked_is_shown():
    app = App(4711, "/usr/bin/dig", 1000)
    async with staged(FakeResolver(RELAY)) as stage:
        for _ in range(2):
            await stage.ask(query(), app=app, identity="one socket")
        first, second = stage.proxy.recent()

    assert ("www.example.com.", "A", "NOERROR", RELAY) == (first.name, first.type, first.rcode, first.upstream)
    assert ("tunnel", "linux · default · normal app", "8.8.8.8") == (first.route, first.row, first.asked)
    assert (app, "tunnel", 0, 1) == (first.app, first.verdict, first.number, second.number)
    assert (False, True, 0.0) == (first.cached, second.cached, second.ms)


async def test_a_proxy_that_is_closed_answers_servfail():
    stage = Stage(DnsTable("linux", relay=(ip_address(RELAY),)))
    stage.proxy.close()
    stage.proxy.close()

    assert dns.rcode.SERVFAIL == read(await stage.ask(query())).rcode()
    assert dns.rcode.SERVFAIL == read(await stage.ask(query(), over_tcp=True)).rcode()
