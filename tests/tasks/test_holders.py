"""One look at everybody's descriptors for all who ask, and what becomes of one that fails."""

from collections import Counter

import pytest
import trio

from tests.fakes.judges import as_real
from tunsplit.errors import KernelError
from tunsplit.tasks import holders as module
from tunsplit.tasks.holders import HoldersWatch

ONE, TWO = frozenset({(100, 1)}), frozenset({(200, 1)})


class Processes:
    """Who holds what; each scan is noted, and fails where it is told to."""

    def __init__(self):
        self.scans = []
        self.failures = []

    def scan_all(self, inodes):
        self.scans.append(inodes)
        yield None
        if self.failures and (error := self.failures.pop(0)):
            raise error
        yield from ((inode, ONE if inode == 1 else TWO) for inode in inodes)


class Asker:
    def __init__(self, *inodes):
        self.inodes = set(inodes)
        self.taken = []
        self.error = None
        self.unknown = 0

    def wanted_sockets(self):
        if self.error:
            raise self.error
        return self.inodes

    def take_holders(self, held):
        self.taken.append({inode: held[inode] for inode in self.inodes})
        yield

    def holders_unknown(self):
        self.unknown += 1


class World:
    def __init__(self):
        self.processes, self.first, self.second = Processes(), Asker(1, 2), Asker(2)
        self.counters: Counter[str] = Counter()
        self.watch = HoldersWatch(as_real(self.processes), (self.first, self.second), self.counters)


@pytest.fixture
def world():
    return World()


async def test_all_who_ask_are_served_by_one_look(world):
    assert await world.watch.look()

    assert [{1, 2}] == world.processes.scans
    assert [{1: ONE, 2: TWO}] == world.first.taken
    assert [{2: TWO}] == world.second.taken


async def test_where_nobody_asks_all_are_looked_through_for_the_first_packets_to_come(world):
    world.first.inodes, world.second.inodes = set(), set()
    assert await world.watch.look()

    assert [set()] == world.processes.scans
    assert [{}] == world.first.taken


async def test_the_failure_of_one_is_none_of_the_others(world, caplog):
    world.first.error = KernelError("no sock_diag")
    assert not await world.watch.look()
    assert not await world.watch.look()

    assert [{2: TWO}] * 2 == world.second.taken
    assert 2 == world.counters["holders_not_seen"]
    assert ["holders of sockets cannot be found"] == caplog.messages


async def test_a_look_that_fails_once_is_repeated_soon_and_costs_nobody_anything(world, nursery, autojump_clock):
    world.processes.failures = [KernelError("too many open files")]
    nursery.start_soon(world.watch.watch)
    await trio.sleep(module.RETRY_S * 1.5)

    assert (2, 1, 0) == (len(world.processes.scans), len(world.first.taken), world.first.unknown)


async def test_where_looks_go_on_failing_everybody_is_told(world, nursery, autojump_clock):
    """L21: within five seconds of the last look that succeeded."""
    world.processes.failures = [None, *[KernelError("too many open files")] * module.MOST_FAILURES]
    nursery.start_soon(world.watch.watch)
    await trio.sleep(5)
    assert (1, 1) == (world.first.unknown, world.second.unknown)
    await trio.sleep(module.LOOK_S * 2)

    assert (1, 1) == (world.first.unknown, world.second.unknown)
    assert len(world.first.taken) > 1
