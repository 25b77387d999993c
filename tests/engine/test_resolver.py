"""Questions in flight, as a transcript: who is asked, in which order, and what it comes to."""

import dns.flags
import dns.rcode
import pytest

from tests.engine.wires import FIRST, NOW, SECOND, A, World, codes
from tests.fakes.resolvers import read
from tunsplit.engine import resolver as module
from tunsplit.engine.resolver import ATTEMPT_S, SILENT_S, WITHDRAWN, Outcome


@pytest.fixture
def world():
    return World()


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
