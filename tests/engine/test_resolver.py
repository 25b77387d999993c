"""Questions in flight, as a transcript: what is sent to whom, what comes back, what the app gets."""

from ipaddress import ip_address
from itertools import count

import dns.flags
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.resolvers import answer, query, read
from tunsplit.engine import resolver as module
from tunsplit.engine.dnstable import Route, Server
from tunsplit.engine.resolver import ATTEMPT_S, SILENT_S, WITHDRAWN, Channel, Outcome, Resolver
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


@pytest.fixture
def world():
    return World()


def codes(world: World) -> list[object]:
    return [None if outcome.answer is None else outcome.answer.rcode for outcome in world.outcomes]


def test_the_first_server_is_asked_and_its_answer_given_and_stored(world):
    world.ask()
    world.reply(A)

    assert ["udp 10.64.0.1"] == world.asked
    assert [(0, FIRST)] == [(outcome.answer.rcode, outcome.server) for outcome in world.outcomes]
    assert 1 == len(world.stored)
    assert world.is_idle


def test_a_name_that_is_not_there_is_an_answer(world):
    world.ask()
    world.reply(rcode=dns.rcode.NXDOMAIN)

    assert [dns.rcode.NXDOMAIN] == codes(world)
    assert ["udp 10.64.0.1"] == world.asked


def test_who_asks_the_same_waits_with_the_others(world):
    for _ in range(3):
        world.ask()
    world.reply(A)

    assert ["udp 10.64.0.1"] == world.asked
    assert [0, 0, 0] == codes(world)
    assert world.is_idle


def test_who_asks_again_is_answered_once(world):
    for _ in range(3):
        world.ask(identity="one app's socket")
    world.reply(A)

    assert [0] == codes(world)


def test_silence_leads_to_the_next_server_and_in_the_end_to_servfail(world):
    world.ask()
    for later in range(1, 4):
        assert NOW + later * ATTEMPT_S == world.resolver.due
        world.resolver.expire(NOW + later * ATTEMPT_S)

    assert ["udp 10.64.0.1", "udp 10.64.0.2", "udp 10.64.0.1"] == world.asked
    assert [None] == codes(world)
    assert world.is_idle


def test_nothing_expires_before_its_time(world):
    world.ask()
    world.resolver.expire(NOW + ATTEMPT_S - 0.01)

    assert ["udp 10.64.0.1"] == world.asked


def test_a_server_that_kept_silent_goes_last_for_a_while(world):
    world.ask()
    world.resolver.expire(NOW + ATTEMPT_S)
    world.reply(A)
    world.ask("www.example.org", now=NOW + ATTEMPT_S)
    world.ask("www.example.net", now=NOW + ATTEMPT_S + SILENT_S)

    assert ["udp 10.64.0.1", "udp 10.64.0.2", "udp 10.64.0.2", "udp 10.64.0.1"] == world.asked


def test_a_server_that_speaks_again_goes_first_again(world):
    world.ask()
    world.resolver.expire(NOW + ATTEMPT_S)
    world.reply(A, number=0)
    world.ask("www.example.org", now=NOW + ATTEMPT_S)

    assert "udp 10.64.0.1" == world.asked[-1]


def test_what_is_known_of_silent_servers_is_bounded(world, monkeypatch):
    monkeypatch.setattr(module, "MOST_SILENT", 1)
    world.ask()
    for later in range(1, 3):
        world.resolver.expire(NOW + later * ATTEMPT_S)
    world.ask("www.example.org", now=NOW + 2 * ATTEMPT_S)

    assert "udp 10.64.0.1" == world.asked[-1]


def test_a_late_answer_counts_while_the_question_is_in_flight(world):
    world.ask()
    world.resolver.expire(NOW + ATTEMPT_S)
    world.reply(A, number=0)

    assert [FIRST] == [outcome.server for outcome in world.outcomes]
    assert world.is_idle


def test_a_late_refusal_leaves_the_server_that_is_being_asked_its_time(world):
    world.ask()
    world.resolver.expire(NOW + ATTEMPT_S)
    world.reply(number=0, rcode=dns.rcode.REFUSED)

    assert ["udp 10.64.0.1", "udp 10.64.0.2"] == world.asked
    assert [] == world.outcomes
    world.reply(A)
    assert [0] == codes(world)


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED])
def test_who_cannot_answer_leads_to_the_next_server(world, rcode):
    world.ask()
    world.reply(rcode=rcode)
    world.reply(A)

    assert ["udp 10.64.0.1", "udp 10.64.0.2"] == world.asked
    assert [0] == codes(world)


def test_if_nobody_can_answer_the_last_refusal_is_the_answer(world):
    world.ask()
    world.reply(rcode=dns.rcode.SERVFAIL)
    world.reply(rcode=dns.rcode.REFUSED)

    assert [dns.rcode.REFUSED] == codes(world)
    assert [] == world.stored
    assert world.is_idle


def test_a_truncated_answer_is_fetched_over_tcp_from_the_same_server(world):
    world.ask()
    world.reply(flags=dns.flags.TC)
    world.reply(A)

    assert ["udp 10.64.0.1", "tcp 10.64.0.1"] == world.asked
    assert [0] == codes(world)


def test_an_answer_that_is_truncated_over_tcp_too_is_none(world):
    world.ask("www.example.com", FIRST)
    world.reply(flags=dns.flags.TC)
    world.reply(flags=dns.flags.TC)

    assert [Outcome(None, FIRST)] == world.outcomes


def test_who_asks_over_tcp_is_asked_for_over_tcp(world):
    world.ask(over_tcp=True)

    assert ["tcp 10.64.0.1"] == world.asked


@pytest.mark.parametrize("rcode", [dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.BADVERS])
def test_who_knows_no_edns_is_asked_without(world, rcode):
    world.ask()
    world.reply(rcode=rcode)
    world.reply(A)

    assert ["udp 10.64.0.1", "udp 10.64.0.1"] == world.asked
    assert [0, -1] == [read(message).edns for *_, message in world.wires.sent]
    assert [0] == codes(world)


def test_who_does_not_even_understand_plain_questions_has_failed(world):
    world.ask("www.example.com", FIRST)
    world.reply(rcode=dns.rcode.FORMERR)
    world.reply(rcode=dns.rcode.FORMERR)

    assert [dns.rcode.FORMERR] == codes(world)


def test_a_code_that_only_edns_can_say_is_not_passed_on(world):
    world.ask("www.example.com", FIRST)
    world.reply(rcode=dns.rcode.BADCOOKIE)

    assert [Outcome(None, None)] == world.outcomes


def test_a_server_without_a_way_is_passed_over(world):
    world.wires.closed.add(FIRST)
    world.ask()

    assert ["udp 10.64.0.2"] == world.asked


def test_a_server_that_cannot_be_sent_to_is_passed_over(world):
    world.wires.broken.add(FIRST)
    world.ask()
    world.reply(A)

    assert ["udp 10.64.0.1", "udp 10.64.0.2"] == world.asked
    assert [SECOND] == [outcome.server for outcome in world.outcomes]
    assert world.is_idle


def test_without_any_way_it_is_servfail_at_once(world):
    world.wires.closed |= {FIRST, SECOND}
    world.ask()

    assert [Outcome(None, None)] == world.outcomes
    assert world.is_idle


def test_a_broken_channel_leads_to_the_next_server_at_once(world):
    world.ask()
    world.ask("www.example.org")
    world.resolver.lost(world.wires.sent[0][1], NOW)

    assert ["udp 10.64.0.1"] * 2 + ["udp 10.64.0.2"] * 2 == world.asked


@pytest.mark.parametrize("what", ["its channel", "everything"])
def test_who_waits_for_what_is_withdrawn_is_told_so(world, what):
    world.ask()
    world.ask("www.example.com")
    world.resolver.withdraw([world.wires.sent[0][1]] if what == "its channel" else None)

    assert [True, True] == [outcome is WITHDRAWN for outcome in world.outcomes]
    assert world.is_idle


def test_what_waits_on_other_channels_is_not_withdrawn(world):
    world.ask("www.example.com", FIRST)
    world.ask("www.example.org", SECOND)
    world.resolver.withdraw([world.wires.sent[1][1]])

    assert [True] == [outcome is WITHDRAWN for outcome in world.outcomes]
    assert 1 == len(world.resolver)


def test_what_breaks_late_leaves_the_server_that_is_being_asked_its_time(world):
    world.ask()
    world.resolver.expire(NOW + ATTEMPT_S)
    world.resolver.lost(world.wires.sent[0][1], NOW)

    assert ["udp 10.64.0.1", "udp 10.64.0.2"] == world.asked


def test_a_channel_may_break_twice_for_one_question(world):
    world.ask("www.example.com", FIRST)
    world.resolver.expire(NOW + ATTEMPT_S)
    world.resolver.lost(world.wires.sent[0][1], NOW)

    assert [Outcome(None, None)] == world.outcomes
    assert world.is_idle


def forged(message: bytes) -> list[bytes]:
    """What somebody sends who does not know the question as it was sent."""
    good = answer(message, A)
    return [
        b"",
        b"\0",
        bytes((good[0] ^ 1,)) + good[1:],
        message,
        good[:2] + answer(query("www.example.org", id=0), A)[2:],
        good[:-1],
    ]


def test_a_wrong_answer_is_as_if_nothing_had_come(world):
    world.ask()
    _, channel, message = world.wires.sent[0]
    for one in forged(message):
        world.resolver.answered_untrusted(channel, one, NOW)
    assert [] == world.outcomes
    world.reply(A)

    assert [0] == codes(world)
    assert len(forged(message)) == world.resolver.counters["unmatched"]


def test_an_answer_on_another_channel_is_no_answer(world):
    world.ask()
    _, _, message = world.wires.sent[0]
    world.resolver.answered_untrusted(Channel(SECOND, False), answer(message, A), NOW)

    assert [] == world.outcomes


def test_an_answer_counts_once(world):
    world.ask()
    world.reply(A)
    world.reply(A)

    assert [0] == codes(world)


def test_no_identifier_is_used_twice_at_a_time(world):
    drawn = iter([7, 7, 7, 8])
    world.below = lambda _: next(drawn)
    world.ask()
    world.ask("www.example.org")

    assert [7, 8] == [read(message).id for *_, message in world.wires.sent]


def test_one_user_cannot_take_all_the_room(world, monkeypatch):
    monkeypatch.setattr(module, "MOST_OF_ONE", 2)
    for number in range(3):
        world.ask(f"n{number}.example.com", user=1000)
    world.ask("other.example.com", user=1001)

    assert [Outcome(None, None)] == world.outcomes
    assert 3 == len(world.resolver)


def test_questions_in_flight_are_bounded(world, monkeypatch):
    monkeypatch.setattr(module, "MOST_PENDING", 2)
    for number in range(3):
        world.ask(f"n{number}.example.com")

    assert [Outcome(None, None)] == world.outcomes
    assert 1 == world.resolver.counters["overflow"]


def test_those_who_wait_are_bounded(world, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    for _ in range(3):
        world.ask()
    assert [Outcome(None, None)] == world.outcomes
    world.reply(A)

    assert 3 == len(world.outcomes)


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ("ask", "answer", "refuse", "truncate", "deaf", "garbage", "lose", "withdraw", "close", "wait")
        ),
        st.integers(0, 3),
    ),
    max_size=40,
)


@given(steps)
def test_whoever_asks_is_answered_once_whatever_happens(steps):
    world = World()
    asked, now = 0, NOW
    for step, number in steps:
        if step == "ask":
            asked += 1
            world.ask(f"n{number}.example.com", now=now)
        elif step == "close":
            world.wires.closed ^= {(FIRST, SECOND)[number % 2]}
        elif step == "wait":
            now += number
            world.resolver.expire(now)
        elif world.wires.sent:
            channel, message = world.wires.sent[number % len(world.wires.sent)][1:]
            if step == "lose":
                world.resolver.lost(channel, now)
            elif step == "withdraw":
                world.resolver.withdraw([channel] if number else None)
            else:
                rcode = {"refuse": 5, "deaf": 1}.get(step, 0)
                flags = dns.flags.TC if step == "truncate" else 0
                told = b"" if step == "garbage" else answer(message, flags=flags, rcode=rcode)
                world.resolver.answered_untrusted(channel, told, now)
    while world.resolver.due is not None:
        now = max(now, world.resolver.due)
        world.resolver.expire(now)

    assert asked == len(world.outcomes)
    assert world.is_idle
    assert len(world.wires.sent) == world.wires.released
