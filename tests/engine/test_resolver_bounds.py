"""What is no answer to a question in flight, and how many there may be."""

import dns.flags
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.wires import FIRST, NOW, SECOND, A, World, codes
from tests.fakes.resolvers import answer, query, read
from tunsplit.engine import resolver as module
from tunsplit.engine.resolver import Channel, Outcome


@pytest.fixture
def world():
    return World()


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
