"""Ports are in one place each, random, and never live twice."""

import random
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.craft import SYN, tcp
from tunsplit.engine.ports import BATCH, LOOKED_AT, REST_S, UNUSED_S, PortPool
from tunsplit.engine.timewait import Connection


def pool(first: int = 1, last: int = 200, seed: int = 1) -> PortPool:
    return PortPool(first, last, random.Random(seed).randrange)


def drawn(one: PortPool, count: int) -> list[int | None]:
    ports = []
    for _ in range(count):
        if one.must_reserve:
            one.reserve(0.0)
        ports.append(one.draw())
    return ports


def test_nothing_is_drawn_before_the_kernel_has_been_told():
    one = pool()

    assert (True, None) == (one.must_reserve, one.draw())
    told = one.reserve(0.0)
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
    assert {"free": 0, "reserved": 0, "live": 1, "resting": 1, "foreign": 0} == one.statistics()
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


def test_a_port_that_is_somebody_elses_is_left_alone_for_a_while():
    """Else it would be all that is left to try, while there are others that have rested."""
    one = pool(last=2)
    foreign, own = drawn(one, 2)
    assert foreign is not None
    assert own is not None
    one.refuse(foreign, 10.0)
    one.give_back(own, 10.0)

    assert (False, [own]) == (one.must_reserve, one.taken())
    assert [own, None] == drawn(one, 2)
    assert [] == one.rested(10.0 + REST_S - 0.1)
    assert [] == one.rested(10.0 + REST_S), "the kernel has it already"
    assert [foreign] == drawn(one, 1)


def test_a_port_that_is_put_back_is_free_again():
    one = pool(last=1)
    (port,) = drawn(one, 1)
    assert port is not None
    one.put_back(port)

    assert (True, []) == (one.must_reserve, one.taken())
    assert [port] == one.reserve(0.0)


def test_what_is_reserved_and_not_needed_is_given_back():
    """A server that begins to listen on such a port would get nobody new."""
    one = pool()
    reserved = one.reserve(10.0)
    drawn_one = one.draw()

    assert [] == one.rested(10.0 + UNUSED_S - 0.1)
    assert set(reserved) - {drawn_one} == set(one.rested(10.0 + UNUSED_S))
    assert [drawn_one] == one.taken()
    assert one.must_reserve


def connection(isn: int) -> Connection:
    return Connection(b"ends", tcp("10.0.0.1:900 > 198.51.100.1:80", flags=SYN, seq=isn)[20:], 0.0, 0)


def test_of_ports_that_have_rested_long_one_is_given_again_that_its_server_cannot_take_for_the_last():
    one = pool(last=3)
    first, second, third = map(int, filter(None, drawn(one, 3)))
    one.give_back(first, 10.0, connection(5000))
    one.give_back(second, 11.0, connection(1000))
    one.give_back(third, 12.0, connection(1000))

    assert second == one.draw(connection(2000))
    assert third == one.draw(connection(2000))
    assert first == one.draw(connection(2000)), "better than none"


def test_only_some_of_those_that_rest_are_looked_at():
    one = pool(last=LOOKED_AT + 1)
    ports = [int(port or 0) for port in drawn(one, LOOKED_AT + 1)]
    for number, port in enumerate(ports):
        one.give_back(port, 10.0, connection(1000 if number == LOOKED_AT else 5000))

    assert ports[0] == one.draw(connection(2000))
    assert ports[-1] == one.draw(connection(2000))


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
        self.live, self.resting, self.foreign = set[int](), dict[int, float](), dict[int, float]()
        self.now = self.reserved_at = 0.0

    @precondition(lambda self: self.pool.must_reserve)
    @rule()
    def reserve(self) -> None:
        told = set(self.pool.reserve(self.now))
        self.reserved_at = self.now
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
        self.pool.refuse(port, self.now)
        self.live.remove(port)
        self.foreign[port] = self.now

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(sorted(self.live)))
        self.pool.put_back(port)
        self.live.remove(port)
        self.free.add(port)

    @precondition(lambda self: self.reserved)
    @rule()
    def give_up(self) -> None:
        assert self.reserved == set(self.pool.give_up())
        self.free |= self.reserved
        self.reserved.clear()

    @rule(seconds=st.floats(0, 100))
    def rest(self, seconds: float) -> None:
        self.now += seconds
        done = {port for port, since in self.resting.items() if since + REST_S <= self.now}
        unused = self.reserved if self.reserved_at + UNUSED_S <= self.now else set()
        others = {port for port, since in self.foreign.items() if since + REST_S <= self.now}
        assert done | unused == set(self.pool.rested(self.now))
        self.resting = {port: since for port, since in self.resting.items() if port not in done}
        self.foreign = {port: since for port, since in self.foreign.items() if port not in others}
        self.free |= done | unused | others
        self.reserved -= unused

    @invariant()
    def every_port_is_in_one_place(self) -> None:
        places = (self.free, self.reserved, self.live, self.resting, self.foreign)
        assert list(map(len, places)) == list(self.pool.statistics().values())
        assert 150 == sum(map(len, places))
        assert sorted(self.pool.taken()) == sorted({*self.reserved, *self.live, *self.resting})
        assert self.pool.must_reserve == (not self.reserved and bool(self.free))
        some = self.pool.some_live()
        assert some in self.live if self.live else some is None


TestPorts = Ports.TestCase
TestPorts.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
