"""The end of flows, and what NAT keeps: no more than it must, for no longer."""

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import craft
from tests.craft import ACK, FIN, ICMP, ICMPV6, RST, TCP, UDP, ends, tcp, udp
from tests.world import BACK, BOTH, OUT, TUNNEL, UPLINK, World
from tunsplit.engine import nat
from tunsplit.engine.direction import destination_of, reversed_key, source_of
from tunsplit.engine.flow import Flow, FlowEvent, Rewrite
from tunsplit.engine.ports import LOOKED_AT

# The end


@BOTH
def test_after_its_end_no_packet_of_a_flow_passes(world, app, out, back, to_app, outside):
    flow = world.open(app, outside=outside)

    world.nat.end(flow, FlowEvent.BLOCK, world.now)
    assert world.sent(udp(app)) is None
    assert world.received(udp(back)) is None
    assert 0 == len(world.nat)
    assert [] == list(world.nat)
    with pytest.raises(KeyError):
        world.nat.end(flow, FlowEvent.BLOCK, world.now)
    with pytest.raises(KeyError):
        world.nat.close(flow)


@pytest.mark.parametrize(
    ("protocol", "seconds"), [(UDP, 300), (ICMP, 60), (TCP, 240), (craft.GRE, 600)], ids=["udp", "icmp", "tcp", "gre"]
)
def test_an_idle_flow_ends_at_its_time_and_not_before(world, protocol, seconds):
    text = "10.128.0.1:5000 > 1.1.1.1:0" if protocol in (ICMP, craft.GRE) else OUT
    world.open(text, outside="192.0.2.7:40000", protocol=protocol)

    assert 0 == world.later(seconds - 1)
    assert 1 == world.later(2)
    assert 0 == len(world.nat)


def test_packets_of_either_direction_keep_a_flow_alive(world):
    world.open(OUT, outside="192.0.2.7:40000")
    for _ in range(5):
        assert 0 == world.later(200)
        assert world.sent(udp(OUT)) is not None
        assert 0 == world.later(200)
        assert world.received(udp(BACK)) is not None
    assert 1 == world.later(302)


def test_an_established_connection_stays_for_two_hours_and_a_closed_one_for_its_last_packets(world):
    for flags in (ACK, ACK, FIN | ACK):
        flow = world.nat.outbound.find(TCP, ends(OUT).key)
        if flow is None:
            world.open(OUT, outside="192.0.2.7:40000", protocol=TCP)
            world.sent(tcp(OUT))
            world.received(tcp(BACK))
        world.sent(tcp(OUT, flags=flags))

    assert 0 == world.later(7000)
    assert world.received(tcp(BACK, flags=FIN | ACK)) is not None
    assert 0 == world.later(9)
    assert world.sent(tcp(OUT)) is not None  # the last ACK
    assert 0 == world.later(9)
    assert 1 == world.later(2)


def test_what_has_ended_is_kept_nowhere(world):
    """2,000 connections a second, each closed at once, must not pile up until they would have been idle."""
    for number in range(3000):
        port = 40000 + number % 200
        if number >= 200 and number % 200 == 0:
            world.later(70)
        world.open(OUT, outside=f"192.0.2.7:{port}", protocol=TCP)
        world.sent(tcp(OUT, flags=RST))
        (flow,) = world.nat
        world.nat.end(flow, FlowEvent.TIMEOUT, world.now)
        for pool in world.nat.pools.values():
            pool.rested(world.now + 100)

    assert [{}, {}] == [world.nat._due, world.nat._closing]  # noqa: SLF001  # what would pile up


def test_what_has_ended_leaves_the_collector_nothing_to_do(world):
    """Its passes stop everything: a flow and its two rewrites, which refer to each other, must not wait for one."""

    def alive():
        return [one for one in gc.get_objects() if isinstance(one, Flow | Rewrite)]

    before = len(alive())
    gc.disable()
    try:
        world.open(OUT, outside="192.0.2.7:40000")
        assert 3 == len(alive()) - before
        world.later(1000.0)
        assert 0 == len(alive()) - before
    finally:
        gc.enable()


def test_the_clock_may_start_anywhere_and_time_without_flows_costs_nothing(world):
    assert 0 == sum(world.nat.expire(1e12))
    world.now = 1e12
    world.open(OUT, outside="192.0.2.7:40000")
    assert 0 == world.later(299)
    assert 1 == world.later(2)


def test_many_that_are_due_at_once_end_a_few_at_a_time(world, monkeypatch):
    """Two thousand connections a second are as many that end in one moment: packets are not to wait for them all."""
    monkeypatch.setattr(nat, "EXPIRED", 2)
    flows = [
        world.open(f"10.128.0.1:{5000 + n} > 1.1.1.1:53", outside=f"192.0.2.7:{40000 + n}", protocol=UDP)
        for n in range(5)
    ]
    expiry = world.nat.expire(world.now + 31.0)

    assert [2, 2] == [next(expiry), next(expiry)]
    world.nat.end(flows[-1], FlowEvent.TIMEOUT, world.now)  # it may end in between
    assert [[], []] == [list(expiry), list(world.nat)]


def test_after_a_long_sleep_what_is_due_ends_and_new_flows_have_their_whole_time(world):
    """A process that was stopped for a day: its clock has gone on, in one step."""
    flows = [
        world.open(f"10.128.0.1:{port} > 1.1.1.1:53", outside=f"192.0.2.7:{port + 35000}") for port in (5000, 5001)
    ]
    day = 86_400
    world.now += day
    fresh = world.open("10.128.0.1:5002 > 1.1.1.1:443", outside="192.0.2.7:40002")

    assert len(flows) == world.later(0)
    assert [fresh] == list(world.nat)
    assert (0, 1) == (world.later(299), world.later(2))


# The bounds


def test_a_full_table_takes_the_place_of_what_closed_first():
    world = World(most_flows=2)
    texts = [f"10.128.0.1:{port} > 1.1.1.1:80" for port in (5001, 5002)]
    flows = [
        world.open(text, outside=f"192.0.2.7:{40001 + at}", protocol=TCP, user=at) for at, text in enumerate(texts)
    ]
    assert not world.nat.has_room(world.now)
    assert 1 == world.nat.statistics()["table_full"]

    world.sent(tcp(texts[1], flags=RST))
    world.sent(tcp(texts[0], flags=RST))
    assert world.nat.has_room(world.now)
    assert [flows[0]] == list(world.nat)
    assert world.nat.has_room(world.now)


def test_one_user_has_three_quarters_of_the_table_at_most():
    """L35; and makes room among his own, though another's flow closed before."""
    world = World(most_flows=8)
    others, *his = [
        world.open(f"10.128.0.1:{5000 + at} > 1.1.1.1:80", outside=f"192.0.2.7:{40000 + at}", protocol=TCP, user=user)
        for at, user in enumerate([8, *[7] * 6])
    ]
    world.nat.close(others)
    assert (True, False) == (world.nat.has_room(world.now, 8), world.nat.has_room(world.now, 7))
    assert 1 == world.nat.statistics()["user_full"]

    world.nat.close(his[2])
    assert world.nat.has_room(world.now, 7)
    assert [others, *his[:2], *his[3:]] == list(world.nat)
    assert world.nat.has_room(world.now, 7)


def test_ports_are_counted_to_who_has_opened_them(world):
    """And given back once nobody uses them any more, whoever was last."""
    pool = world.nat.pools["tcp"]
    flows = [
        world.open(f"10.128.0.1:{5000 + user} > 1.1.1.{user}:80", outside="192.0.2.7:40000", protocol=TCP, user=user)
        for user in (7, 8)
    ]
    most = pool.size * 3 // 4
    for number in range(1, most):
        world.open(
            f"10.128.0.1:{6000 + number} > 1.1.1.1:80", outside=f"192.0.2.7:{40000 + number}", protocol=TCP, user=7
        )
    assert (False, True) == (world.nat.may_have_port("tcp", 7), world.nat.may_have_port("tcp", 8))
    assert world.nat.may_have_port("udp", 7)

    world.nat.end(flows[0], FlowEvent.TIMEOUT, world.now)
    assert not world.nat.may_have_port("tcp", 7)
    world.nat.end(flows[1], FlowEvent.TIMEOUT, world.now)
    assert world.nat.may_have_port("tcp", 7)


def test_for_a_port_some_of_those_that_closed_first_end(world):
    """L35: of this protocol, and for one who has his share of his own; so that of some ports one may do."""
    flows = [
        world.open(f"10.128.0.1:{at} > 1.1.1.1:80", outside=f"192.0.2.7:{40000 + at}", protocol=protocol, user=user)
        for at, (protocol, user) in enumerate([(TCP, 7), (UDP, 8), *[(TCP, 8)] * (LOOKED_AT + 1)], start=5000)
    ]
    for flow in flows:
        world.nat.close(flow)
    assert world.nat.free_port("tcp", world.now, user=8, his=True)
    assert {*flows[:2], flows[-1]} == set(world.nat)
    assert world.nat.free_port("tcp", world.now, user=8, his=False)
    assert [flows[1]] == list(world.nat)


def test_where_no_flow_is_idle_all_are_looked_at_once_a_second(world, monkeypatch):
    """Who has his share and sends on from new sockets must not cost the others a look at every flow a packet."""
    flow = world.open(OUT, outside="192.0.2.7:40000", user=7)
    looks: list[float] = []
    flows = type(world.nat).__iter__

    def look(nat):
        looks.append(world.now)
        return flows(nat)

    monkeypatch.setattr(type(world.nat), "__iter__", look)

    def free(user):
        return world.nat.free_port("udp", world.now, user=user, his=True)

    assert [False, False, False] == [free(7), free(7), free(8)]
    assert 2 == len(looks)
    world.now += 1.0
    assert not free(7)
    assert 3 == len(looks)
    world.now += 10.0
    assert free(7)
    assert [] == list(world.nat)
    assert not flow.passes


def test_flows_are_found_by_their_device(world):
    first = world.open(OUT, outside="192.0.2.7:40000")
    second = world.open("10.128.0.1:5001 > 1.1.1.1:443", outside="10.64.0.2:40001", device=TUNNEL)

    assert [first] == world.nat.flows_of([UPLINK])
    assert {first, second} == set(world.nat.flows_of([UPLINK, TUNNEL]))
    world.nat.end(second, FlowEvent.BLOCK, world.now)
    world.nat.forget_device(TUNNEL)
    world.nat.forget_device(TUNNEL)
    assert [] == world.nat.flows_of([TUNNEL])


def test_statistics_count_what_grows(world):
    world.open(OUT, outside="192.0.2.7:40000")
    statistics = world.nat.statistics()

    assert (1, 1, 1, 0, 1) == tuple(
        statistics[name] for name in ("flows", "opened", "mappings", "closing", "ports_udp_live")
    )


@pytest.mark.parametrize("protocol", [ICMP, ICMPV6])
def test_echo_never_takes_the_fast_path(world, protocol):
    text = "10.128.0.1 > 1.1.1.1" if protocol == ICMP else "fd75::1 > 2001:db8::1"
    world.echo(text, 7, outside="192.0.2.7:40000" if protocol == ICMP else "[2001:db8:50::2]:40000")

    assert world.sent(craft.echo(text, 7)) is None


@given(st.sampled_from((12, 36)).flatmap(lambda size: st.binary(min_size=size, max_size=size)))
def test_a_four_tuple_turned_twice_is_itself(key):
    assert key == reversed_key(reversed_key(key))
    assert (source_of(key), key[-4:-2]) == (destination_of(reversed_key(key)), reversed_key(key)[-2:])
