"""L27: a datagram is not taken for an heir's of its socket, nor an heir's for the giver's."""

import pytest

from tests.craft import ends
from tests.engine.story import CURL, FIREFOX, SH, Story, firefox, runs
from tests.fakes.judges import as_real
from tunsplit.engine.attribution import Certainty, Key, Owner
from tunsplit.errors import KernelError
from tunsplit.tasks import heirs as module
from tunsplit.tasks.heirs import Heirs
from tunsplit.wire.ip import UDP

SOCKETS = (7,)
KEY = ends("10.0.0.2:5000 > 1.1.1.1:53").key


class World:
    """A shell, 10, and its children, 11 and 12, which share a socket."""

    def __init__(self):
        self.story = Story(firefox)
        self.hold: dict[Key, None] = {}
        self.kept = {10: {7}, 11: {7}, 12: {7}}
        self.heirs = Heirs(self.story.tree, as_real(self), as_real(self.hold))
        self.carried = 0
        self.heirs.carry = self.carry
        for parent, child in ((1, 10), (10, 11), (10, 12)):
            self.story.fork(parent, child)

    def carry(self):
        self.carried += 1

    def keeps(self, pid, inodes):
        return not inodes.isdisjoint(self.kept[pid])

    def doubts(self, *pids, held=False):
        owner = Owner(tuple(runs(pid, SH) for pid in pids), Certainty.EXACT)
        return self.heirs.doubts(KEY, owner, SOCKETS, held=held)


@pytest.fixture
def world():
    return World()


def test_who_runs_another_program_has_sent_what_comes_since(world):
    """It has made its socket since, mostly."""
    assert not world.heirs
    world.story.exec(11, FIREFOX)
    assert world.heirs
    assert not world.doubts(11)


def test_on_one_side_all_may_run_what_they_like(world):
    world.story.exec(11, CURL)
    world.story.exit(11)
    assert not world.doubts(10)


@pytest.mark.parametrize("is_read", [True, False])
def test_what_an_heir_has_sent_that_may_be_gone_is_not_the_givers(world, is_read):
    world.story.exec(11, FIREFOX) if is_read else world.story.tree.exec(11, 10_000)
    assert world.doubts(10)
    assert world.doubts(10, 12)
    world.heirs.carried(False)
    assert world.doubts(10)
    world.heirs.carried(True)
    assert not world.doubts(10)
    world.story.exit(11)
    assert world.doubts(10)
    assert not world.doubts(12)  # a sibling


def test_what_a_dead_giver_has_sent_is_not_the_heirs(world):
    world.story.exec(11, FIREFOX)
    world.heirs.carried(True)
    assert not world.doubts(11)
    world.story.exit(10)
    assert world.doubts(11)


def test_a_plain_child_is_what_its_parent_is(world):
    world.story.exit(11)
    assert not world.heirs
    world.story.fork(12, 13)
    world.story.exit(12)
    assert world.heirs  # its child may have become another before


def test_a_socket_that_closes_on_exec_was_never_another_programs(world):
    world.story.exec(11, FIREFOX)
    world.kept[10] = {8}
    assert not world.doubts(10)


def test_what_is_held_is_as_old_as_when_it_was_read(world):
    world.hold[UDP, KEY] = None
    world.story.exec(11, FIREFOX)
    world.heirs.carried(True)
    assert (True, False) == (world.doubts(10, held=True), world.doubts(10))
    world.heirs.carried(True)
    assert world.doubts(10, held=True)
    world.hold.clear()
    world.story.exec(12, CURL)
    world.heirs.carried(True)
    assert not world.doubts(10, held=True)


def test_where_nobody_knows_who_it_was_nothing_is_guessed(world, monkeypatch):
    world.heirs.note_unknown()
    assert world.doubts(10)
    world.heirs.carried(True)
    assert not world.doubts(10)
    world.story.exec(11, CURL)
    world.kept[99] = {7}
    assert world.doubts(99)
    assert not world.heirs.doubts(KEY, None, SOCKETS)
    monkeypatch.setattr(module, "MOST", 0)
    assert world.doubts(10)


def test_the_tun_is_looked_into_when_somebody_is_another(world):
    world.heirs.heard()
    assert 0 == world.carried
    world.story.exec(11, CURL)
    world.heirs.heard()
    assert 1 == world.carried


def test_what_cannot_be_seen_is_an_error(world, monkeypatch):
    def fail(*_):
        raise KernelError("too many open files")

    monkeypatch.setattr(world, "keeps", fail)
    world.story.exec(11, FIREFOX)
    with pytest.raises(KernelError):
        world.doubts(10)
