"""What apps get from the DNS proxy when resolvers fail or lie, and when sides, tables and networks change."""

import socket
from ipaddress import ip_address
from itertools import pairwise

import dns.edns
import dns.flags
import dns.rcode
import pytest
import trio
import trio.testing

from tests.fakes.resolvers import FakeResolver, address_answer, answer, asked, query, read
from tests.tasks.proxystage import PUBLIC, RELAY, RELAY2, SYSTEM, names, staged
from tunsplit.engine import resolver
from tunsplit.engine.dnstable import DnsTable
from tunsplit.engine.policy import Verdict
from tunsplit.tasks import dnsproxy
from tunsplit.tasks.dnsproxy import Asker, boottime
from tunsplit.tasks.upstream import POOL

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("resolvers_here")]


# Resolvers that are down, slow, or lie


async def test_the_next_resolver_is_asked_at_once_when_nobody_listens():
    async with staged(FakeResolver(RELAY2), relay=(RELAY, RELAY2)) as stage:
        assert names(await stage.ask(query()))
        assert 0 == stage.proxy.statistics().get("timeouts", 0)


async def test_the_next_resolver_is_asked_when_the_first_keeps_silent():
    silent = FakeResolver(RELAY, lambda *_: [])
    async with staged(silent, FakeResolver(RELAY2), relay=(RELAY, RELAY2)) as stage:
        assert names(await stage.ask(query()))
    assert 1 == len(silent.seen)


async def test_silence_ends_in_servfail(monkeypatch):
    monkeypatch.setattr(resolver, "ATTEMPT_S", 0.05)
    relay = FakeResolver(RELAY, lambda *_: [])
    async with staged(relay) as stage:
        got = read(await stage.ask(query()))

    assert dns.rcode.SERVFAIL == got.rcode()
    assert 3 == len(relay.seen)


async def test_a_lying_resolver_is_heard_out():
    def lie(question: bytes, over_tcp: bool) -> list[bytes]:
        right = address_answer(question, over_tcp)[0]
        return [b"", right[:20], bytes((right[0] ^ 1,)) + right[1:], answer(query("www.example.org"))[2:], right]

    async with staged(FakeResolver(RELAY, lie)) as stage:
        assert ["www.example.com. 60 IN A 192.0.2.1"] == names(await stage.ask(query()))
        assert 4 == stage.proxy.statistics()["unmatched"]


async def test_nobody_else_can_answer():
    relay = FakeResolver(RELAY, lambda *_: [])
    got: list[bytes] = []
    async with staged(relay) as stage:
        stage.proxy.ask(query(), Asker(None, Verdict.TUNNEL, None), got.append, boottime())
        await asked(relay)
        sent, port = relay.seen[0][0], relay.ports[0]
        forged = answer(sent, "www.example.com. 60 IN A 203.0.113.66")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.bind((PUBLIC, 53))
            stranger.sendto(forged, (RELAY, port))
        relay.behaviour = address_answer
        got.append(await stage.ask(query()))

    assert {("www.example.com. 60 IN A 192.0.2.1",)} == {tuple(names(one)) for one in got}


async def test_neither_ports_nor_identifiers_can_be_foreseen():
    relay = FakeResolver(RELAY)
    async with staged(relay) as stage:
        for number in range(300):
            await stage.ask(query(f"n{number}.example.com"))
    ports = list(dict.fromkeys(relay.ports))
    ids = [read(question).id for question, _ in relay.seen]

    assert POOL <= len(ports)
    assert 1 < len({later - earlier for earlier, later in pairwise(ports)})
    assert 290 < len(set(ids))
    assert ids != sorted(ids)


# Sides that change


async def test_without_a_way_it_is_servfail_at_once():
    relay = FakeResolver(RELAY)
    async with staged(relay) as stage:
        stage.network.devices["tunnel"] = None
        stage.proxy.network_changed()
        for over_tcp in (False, True):
            assert dns.rcode.SERVFAIL == read(await stage.ask(query(), over_tcp=over_tcp)).rcode()
    assert [] == relay.seen


@pytest.mark.parametrize("over_tcp", [False, True])
async def test_a_side_that_goes_fails_its_questions_at_once(over_tcp):
    relay = FakeResolver(RELAY, lambda *_: [])
    relay.hangs = True
    got: list[bytes] = []
    async with staged(relay) as stage:
        stage.proxy.ask(query(), Asker(None, Verdict.TUNNEL, None, over_tcp), got.append, boottime())
        await asked(relay)
        stage.network.devices["tunnel"] = None
        stage.proxy.network_changed()

        assert [dns.rcode.SERVFAIL] == [read(one).rcode() for one in got]
        await trio.testing.wait_all_tasks_blocked()
        assert 0 == stage.proxy.statistics()["upstream_sockets"]
    assert 1 == len(relay.seen)


async def test_the_other_sides_questions_go_on_meanwhile():
    system = FakeResolver(SYSTEM, lambda *_: [])
    got: list[bytes] = []
    async with staged(system, platform="per-app") as stage:
        stage.proxy.ask(query(), Asker(None, Verdict.UPLINK, None), got.append, boottime())
        await asked(system)
        stage.network.devices["tunnel"] = None
        stage.proxy.network_changed()

        assert [] == got
        assert 1 == stage.proxy.statistics()["in_flight"]


async def test_on_another_network_questions_are_asked_anew():
    system = FakeResolver(SYSTEM, lambda *_: [])
    got: list[bytes] = []
    async with staged(system, platform="per-app") as stage:
        stage.proxy.ask(query(), Asker(None, Verdict.UPLINK, None), got.append, boottime())
        await asked(system)
        system.behaviour = address_answer
        stage.network.identity += 1
        stage.proxy.network_changed()
        await asked(system, 2)
        got.append(await stage.ask(query(), Verdict.UPLINK))

    assert [["www.example.com. 60 IN A 192.0.2.1"]] * 2 == [names(one) for one in got]


async def test_on_another_network_nothing_is_remembered_of_the_last():
    relay = FakeResolver(RELAY)
    async with staged(relay) as stage:
        await stage.ask(query())
        stage.proxy.network_changed()
        await stage.ask(query())
        assert 1 == len(relay.seen)
        stage.network.identity += 1
        stage.proxy.network_changed()
        await stage.ask(query())
    assert 2 == len(relay.seen)


async def test_another_table_holds_from_the_next_question_on():
    relay, public = FakeResolver(RELAY), FakeResolver(PUBLIC)
    async with staged(relay, public) as stage:
        await stage.ask(query())
        stage.proxy.configure(DnsTable("linux", custom=(ip_address(PUBLIC),)))
        await stage.ask(query())
        (_, shown) = stage.proxy.recent()

    assert [1, 1] == [len(relay.seen), len(public.seen)]
    assert "linux · public custom · normal app" == shown.row


async def test_what_is_in_flight_when_the_table_changes_is_asked_by_the_new_one():
    """L16: after a reload nobody is asked whom only the table before has named, not by a retry either."""
    relay, public = FakeResolver(RELAY, lambda *_: []), FakeResolver(PUBLIC)
    send, receive = trio.open_memory_channel[bytes](1)
    async with staged(relay, public) as stage:
        stage.proxy.ask(query(), Asker(None, Verdict.TUNNEL, None), send.send_nowait, boottime())
        await asked(relay)
        stage.proxy.configure(DnsTable("linux", custom=(ip_address(PUBLIC),)))
        with trio.fail_after(20):
            got = await receive.receive()

    assert ["www.example.com. 60 IN A 192.0.2.1"] == names(got)
    assert [1, 1] == [len(relay.seen), len(public.seen)]


async def test_a_resolver_of_the_last_network_is_not_asked_on_the_next():
    """A private address is another machine there, and it would hear what was in flight."""
    system = FakeResolver(SYSTEM, lambda *_: [])
    got: list[bytes] = []
    async with staged(system, platform="per-app") as stage:
        stage.proxy.ask(query(), Asker(None, Verdict.UPLINK, None), got.append, boottime())
        await asked(system)
        stage.network.identity += 1
        stage.proxy.configure(DnsTable("per-app"))
        await trio.testing.wait_all_tasks_blocked(0.05)

    assert [dns.rcode.SERVFAIL] == [read(one).rcode() for one in got]
    assert 1 == len(system.seen)


async def test_what_is_remembered_of_asked_addresses_is_bounded(monkeypatch):
    monkeypatch.setattr(dnsproxy, "MOST_PLANS", 2)
    relay = FakeResolver(RELAY)
    async with staged(relay, FakeResolver(PUBLIC), FakeResolver(RELAY2), listed_only=True) as stage:
        for address in (PUBLIC, RELAY2, RELAY, PUBLIC):
            assert names(await stage.ask(query(), Verdict.UPLINK, asked=ip_address(address)))
    assert 1 == len(relay.seen)


async def test_whatever_address_is_asked_the_answer_is_one(monkeypatch):
    monkeypatch.setattr(dnsproxy, "MOST_PLANS", 2)
    relay = FakeResolver(RELAY)
    async with staged(relay) as stage:
        for number in range(4):
            assert names(await stage.ask(query(), asked=ip_address(f"8.8.8.{number}")))
    assert 1 == len(relay.seen)
