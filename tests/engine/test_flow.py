"""A flow's states: the table walked whole."""

import itertools

import pytest

from tests.craft import ACK, FIN, ICMP, ICMPV6, RST, SYN, TCP, UDP, tcp
from tests.world import World
from tunsplit.engine import flow as rules
from tunsplit.engine.flow import TRANSITIONS, Flow, FlowEvent, FlowState

E, S = FlowEvent, FlowState
OUT, BACK = "10.128.0.1:5000 > 1.1.1.1:80", "1.1.1.1:80 > 192.0.2.7:40000"


def in_state(state: FlowState) -> Flow:
    return Flow(TCP, bytes(12), bytes(12), "uplink", 0.0, None, "", "", state=state)


def opened() -> tuple[World, Flow]:
    world = World()
    return world, world.open(OUT, outside="192.0.2.7:40000", protocol=TCP)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(FlowState, FlowEvent)))
def test_every_pair_is_in_the_table_or_our_bug(state, event):
    flow = in_state(state)
    if (state, event) in TRANSITIONS:
        flow.move(event)
        assert TRANSITIONS[state, event] is flow.state
    else:
        with pytest.raises(KeyError):
            flow.move(event)
        assert state is flow.state


def test_every_flow_is_gone_if_we_only_wait():
    for state in FlowState:
        for _ in FlowState:
            state = TRANSITIONS.get((state, E.TIMEOUT), state)
        assert S.GONE is state


def test_nothing_comes_back_from_refused_or_gone():
    reached = {TRANSITIONS[pair] for pair in TRANSITIONS if pair[0] in (S.REFUSED, S.GONE)}

    assert {S.GONE} == reached


def test_packets_pass_in_open_and_closing_only():
    assert [S.OPEN, S.CLOSING] == [state for state in FlowState if in_state(state).passes]


@pytest.mark.parametrize(
    ("protocol", "seconds"),
    [(UDP, 300.0), (ICMP, 60.0), (ICMPV6, 60.0), (47, 600.0), (TCP, 240.0)],
)
def test_how_long_a_new_flow_may_be_idle(protocol, seconds):
    world = World()
    text = "10.128.0.1:5000 > 1.1.1.1:443" if protocol != ICMPV6 else "[fd75::1]:5000 > [2001:db8::1]:0"
    outside = "192.0.2.7:40000" if protocol != ICMPV6 else "[2001:db8::7]:40000"

    assert seconds == world.open(text, outside=outside, protocol=protocol).idle_s


def test_a_port_that_has_asked_its_question_is_soon_forgotten():
    """RFC 4787 REQ-5 a: a server's well-known port may have a shorter time."""
    world = World()

    assert rules.DNS_S == world.open("10.128.0.1:5000 > 1.1.1.1:53", outside="192.0.2.7:40000").idle_s


def test_a_tcp_flow_is_established_once_the_app_has_answered_the_answer():
    world, flow = opened()
    world.sent(tcp(OUT, flags=ACK))
    assert rules.TCP_TRANSITORY_S == flow.idle_s
    world.received(tcp(BACK, flags=SYN | ACK))
    assert rules.TCP_TRANSITORY_S == flow.idle_s
    world.sent(tcp(OUT, flags=ACK))
    assert rules.TCP_ESTABLISHED_S == flow.idle_s


def test_an_untranslated_tcp_flow_is_older_than_we_are():
    flow = in_state(S.OPEN)
    flow.translated = False

    assert rules.TCP_ESTABLISHED_S == flow.idle_s


def test_fin_both_ways_closes_and_one_does_not():
    world, flow = opened()
    world.sent(tcp(OUT, flags=FIN | ACK))
    world.sent(tcp(OUT, flags=FIN | ACK))
    assert S.OPEN is flow.state
    world.received(tcp(BACK, flags=FIN | ACK))
    assert ("closing", rules.LINGER_S) == (flow.state.value, flow.idle_s)
    assert world.sent(tcp(OUT, flags=ACK)) is not None
    assert world.received(tcp(BACK, flags=FIN | ACK)) is not None
    assert "closing" == flow.state.value


@pytest.mark.parametrize("from_app", [True, False])
def test_a_reset_closes_and_another_changes_nothing(from_app):
    world, flow = opened()
    for _ in range(2):
        assert (world.sent(tcp(OUT, flags=RST)) if from_app else world.received(tcp(BACK, flags=RST))) is not None
        assert S.CLOSING is flow.state


def test_a_flow_that_opens_its_connection_again_is_as_new():
    """RFC 9293 §3.5.1: a server that knows an older connection answers a SYN with an ACK, and the RST is for that."""
    world, flow = opened()
    world.sent(tcp(OUT, flags=RST))
    world.nat.reopen(flow, world.now)
    assert (S.OPEN, rules.TCP_TRANSITORY_S, 0) == (flow.state, flow.idle_s, world.nat.statistics()["closing"])

    assert 0 == world.later(rules.TCP_TRANSITORY_S - 1)
    world.received(tcp(BACK, flags=FIN | ACK))
    assert (S.OPEN, False) == (flow.state, flow.finished)
    world.sent(tcp(OUT, flags=FIN | ACK))
    assert (S.CLOSING, True) == (flow.state, flow.finished)


def test_what_only_seemed_to_end_goes_on_and_ends_like_any_other():
    """L37: whoever guesses ports can forge a reset; its socket is asked before the flow is forgotten."""
    world, flow = opened()
    alive = [True]
    world.nat.goes_on = lambda one: one is flow and alive[0]
    world.sent(tcp(OUT, flags=ACK))
    world.received(tcp(BACK, flags=RST))
    world.sent(tcp(OUT, flags=ACK))
    assert 0 == world.later(rules.LINGER_S + 2)
    assert (S.OPEN, 0) == (flow.state, world.nat.statistics()["closing"])
    assert 0 == world.later(rules.TCP_TRANSITORY_S)
    assert world.received(tcp(BACK)) is not None

    alive[0] = False
    world.received(tcp(BACK, flags=RST))
    assert "closing" == flow.state.value
    assert 1 == world.later(rules.LINGER_S + 2)
    assert world.received(tcp(BACK)) is None


def test_last_seen_is_of_either_direction():
    world, flow = opened()
    world.now += 5
    world.sent(tcp(OUT))
    world.now += 5
    world.received(tcp(BACK))

    assert world.now == flow.last_seen
