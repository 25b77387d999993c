"""Who has live flows is read again, as long as rules go by what no event tells of."""

import itertools
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from tests.fakes.judges import as_real, process
from tunsplit.engine.attribution import Owner
from tunsplit.errors import KernelError
from tunsplit.tasks import untold as module
from tunsplit.tasks.untold import Untold


class Judge:
    """Notes who is read, and what is told after how many; fails where it is told to. All descend from process 1."""

    goes_by_untold = True

    def __init__(self):
        self.looked, self.told, self.failures = [], [], []
        self.storm = False
        self.tree = SimpleNamespace(lineage=lambda pid, start: [process(pid=pid), process(pid=1)] if start == 1 else [])

    def prepare(self):
        if self.storm:
            raise KernelError("processes are born faster than they can be taken in")

    def read_again(self, pid):
        if self.failures and (error := self.failures.pop(0)):
            raise error
        self.looked.append(pid)

    def tell(self):
        self.told.append(len(self.looked))


class World:
    def __init__(self):
        self.flows: list[SimpleNamespace] = []
        self.judge, self.unknown = Judge(), 0
        self.untold = Untold(as_real(self.judge), as_real(self.flows), self.be_unknown)

    def be_unknown(self):
        self.unknown += 1

    def flow_of(self, *pids):
        owner = Owner(tuple(process(pid=pid) for pid in pids)) if pids else None
        self.flows.append(SimpleNamespace(owner=owner))


@pytest.fixture
def world():
    return World()


async def test_every_holder_of_live_flows_is_read_once_and_those_above_it(world):
    for pids in ((100,), (100, 200), ()):
        world.flow_of(*pids)
    await world.untold.look()

    assert [1, 100, 200] == sorted(world.judge.looked)
    assert [3] == world.judge.told


async def test_where_events_tell_all_nobody_is_read(world):
    world.flow_of(100)
    world.judge.goes_by_untold = False
    await world.untold.look()

    assert ([], []) == (world.judge.looked, world.judge.told)


async def test_where_there_are_many_others_get_their_turn(world, nursery):
    """And what has been found by then takes effect."""
    for pid in range(100, 100 + 3 * module.PAUSE - 1):
        world.flow_of(pid)
    turns = itertools.count()

    async def others():
        while True:
            next(turns)
            await trio.lowlevel.checkpoint()

    nursery.start_soon(others)
    await world.untold.look()

    assert next(turns) >= 2
    assert [module.PAUSE * number for number in (1, 2, 3, 3)] == world.judge.told
    nursery.cancel_scope.cancel()


async def test_one_who_cannot_be_read_is_read_next_time(world, nursery, autojump_clock):
    world.flow_of(100)
    world.judge.failures = [KernelError("no room")] * (module.MOST_FAILURES - 1)
    nursery.start_soon(world.untold.watch)
    await trio.sleep((module.MOST_FAILURES - 0.5) * module.LOOK_S)

    assert [1, 100] == sorted(world.judge.looked)
    assert 0 == world.unknown
    nursery.cancel_scope.cancel()


async def test_where_nobody_can_be_read_for_long_flows_end(world, nursery, autojump_clock, caplog):
    """L21."""
    world.flow_of(100)
    world.judge.failures = [KernelError("no room")] * 2 * module.MOST_FAILURES
    nursery.start_soon(world.untold.watch)
    await trio.sleep((2 * module.MOST_FAILURES - 0.5) * module.LOOK_S)

    assert 2 == world.unknown
    assert ["no room"] * 2 == [record.error for record in caplog.records]
    nursery.cancel_scope.cancel()


async def test_looks_that_take_long_are_made_seldom(world, nursery, mock_clock):
    """One that takes a tenth of a second has two of rest."""
    world.flow_of(100)
    world.judge.read_again = lambda pid: (world.judge.looked.append(pid), mock_clock.jump(0.05))
    nursery.start_soon(world.untold.watch)
    for expected in (2, 2, 4):
        await trio.testing.wait_all_tasks_blocked()
        assert expected == len(world.judge.looked)
        mock_clock.jump(0.1 * module.REST * 0.6)
    nursery.cancel_scope.cancel()


async def test_while_births_cannot_be_taken_in_flows_go_on(world, nursery, autojump_clock):
    """L29."""
    world.flow_of(100)
    world.judge.storm = True
    nursery.start_soon(world.untold.watch)
    await trio.sleep(3 * module.MOST_FAILURES * module.LOOK_S)

    assert ([], 0) == (world.judge.looked, world.unknown)
    nursery.cancel_scope.cancel()
