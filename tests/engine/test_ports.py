"""Ports are in one place each, random, and never live twice."""

import random
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tunsplit.engine.ports import BATCH, REST_S, PortPool


def pool(first: int = 1, last: int = 200, seed: int = 1) -> PortPool:
    return PortPool(first, last, random.Random(seed).randrange)


def drawn(one: PortPool, count: int) -> list[int | None]:
    ports = []
    for _ in range(count):
        if one.must_reserve:
            one.reserve()
        ports.append(one.draw())
    return ports


def test_nothing_is_drawn_before_the_kernel_has_been_told():
    one = pool()

    assert (True, None) == (one.must_reserve, one.draw())
    told = one.reserve()
    assert (BATCH, False) == (len(set(told)), one.must_reserve)
    assert set(told) == set(one.taken())
    assert one.draw() in told


def test_every_port_is_drawn_once_and_then_none():
    ports = drawn(pool(), 201)

    assert set(range(1, 201)) == set(ports[:200])
    assert ports[200] is None


def test_ports_come_in_an_order_that_chance_gives():
    """RFC 6056: every draw follows the caller's chance, and nothing else."""
    asked = []

    def always(pick: Callable[[int], int]) -> list[int | None]:
        return drawn(PortPool(1, 200, pick), 5)

    def lowest(below: int) -> int:
        asked.append(below)
        return 0

    assert always(lowest) != always(lambda below: below - 1)
    assert list(range(200, 200 - BATCH, -1)) == asked
    assert drawn(pool(seed=1), 20) != drawn(pool(seed=2), 20)


def test_a_port_rests_before_it_is_free():
    one = pool(last=2)
    first, second = drawn(one, 2)
    assert first is not None
    one.give_back(first, 10.0)

    assert [] == one.rested(10.0 + REST_S - 0.1)
    assert {"free": 0, "reserved": 0, "live": 1, "resting": 1} == one.statistics()
    assert [first] == one.rested(10.0 + REST_S)
    assert [second] == one.taken()


def test_what_has_rested_longest_is_given_again_when_none_is_free():
    one = pool(last=2)
    first, second = drawn(one, 2)
    assert first is not None
    assert second is not None
    one.give_back(second, 10.0)
    one.give_back(first, 11.0)

    assert [second, first, None] == drawn(one, 3)


def test_a_refused_port_is_free_again():
    one = pool(last=1)
    (port,) = drawn(one, 1)
    assert port is not None
    one.refuse(port)

    assert (True, []) == (one.must_reserve, one.taken())
    assert [port] == one.reserve()


def test_some_live_port_is_any_of_them():
    one = pool(last=5)
    assert one.some_live() is None

    live = set(drawn(one, 5))
    assert live == {one.some_live() for _ in range(200)}


class Ports(RuleBasedStateMachine):
    """A pool against five sets: a port is in exactly one place, whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PortPool(1, 150, random.Random(1).randrange)
        self.free, self.reserved = set(range(1, 151)), set[int]()
        self.live, self.resting = set[int](), dict[int, float]()
        self.now = 0.0

    @precondition(lambda self: self.pool.must_reserve)
    @rule()
    def reserve(self) -> None:
        told = set(self.pool.reserve())
        assert told <= self.free
        assert len(told) == min(BATCH, len(self.free))
        self.free -= told
        self.reserved |= told

    @rule()
    def draw(self) -> None:
        port = self.pool.draw()
        if port is None:
            assert not self.reserved
            assert not self.resting
            return
        assert port not in self.live
        if self.reserved:
            self.reserved.remove(port)
        else:
            assert min(self.resting.values()) == self.resting.pop(port)
        self.live.add(port)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), seconds=st.floats(0, 30))
    def give_back(self, data: st.DataObject, seconds: float) -> None:
        self.now += seconds
        port = data.draw(st.sampled_from(sorted(self.live)))
        self.pool.give_back(port, self.now)
        self.live.remove(port)
        self.resting[port] = self.now

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(sorted(self.live)))
        self.pool.refuse(port)
        self.live.remove(port)
        self.free.add(port)

    @rule(seconds=st.floats(0, 100))
    def rest(self, seconds: float) -> None:
        self.now += seconds
        done = set(self.pool.rested(self.now))
        assert done == {port for port, since in self.resting.items() if since + REST_S <= self.now}
        self.resting = {port: since for port, since in self.resting.items() if port not in done}
        self.free |= done

    @invariant()
    def every_port_is_in_one_place(self) -> None:
        places = (self.free, self.reserved, self.live, self.resting)
        assert list(map(len, places)) == list(self.pool.statistics().values())
        assert 150 == sum(map(len, places))
        assert sorted(self.pool.taken()) == sorted({*self.reserved, *self.live, *self.resting})
        assert self.pool.must_reserve == (not self.reserved and bool(self.free))
        some = self.pool.some_live()
        assert some in self.live if self.live else some is None


TestPorts = Ports.TestCase
TestPorts.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
