"""The holder of a new socket, if it is who was born since all processes were looked through: told without a search."""

import os
import socket

import pytest

from tests.apps import inode
from tunsplit.kernel import descriptors, newcomers, procfs, tables

SOME_PID = 2**22 + 1  # nobody's


class World:
    """Processes that are all there are, the test's own among them."""

    def __init__(self, processes, apps):
        self.processes = processes
        self.apps = apps
        self.there = [os.getpid()]
        processes.newcomers._own = 0  # noqa: SLF001 -- the test's own process is one of many here
        processes.newcomers.line = lambda *_: {os.getpid(), *self.siblings}
        self.siblings: set[int] = set()

    def look(self):
        """A pass over all."""
        list(self.processes.scan_all({1}))

    def bear(self, *inherited, heard=True):
        pid = self.apps.start(*inherited)
        self.there.append(pid)
        if heard:
            self.processes.newcomers.note_birth(pid)
        return pid


@pytest.fixture
def world(processes, apps, monkeypatch):
    world = World(processes, apps)
    monkeypatch.setattr(procfs, "pids", lambda: list(world.there))
    monkeypatch.setattr(procfs, "last_pid", lambda: 1)
    return world


@pytest.fixture
def own():
    """A socket, opened when it is called."""
    opened = []

    def open_socket():
        opened.append(socket.socket(type=socket.SOCK_DGRAM))
        return opened[-1], inode(opened[-1])

    yield open_socket
    for one in opened:
        one.close()


def test_who_was_born_since_and_holds_it_alone_is_found_at_once(world, own):
    world.look()
    sock, number = own()
    other, _ = own()
    pid = world.bear(sock)
    world.bear(other)
    sock.close()

    assert pid == world.processes.newborn(number).process.pid
    assert pid == world.processes.recheck(number).process.pid  # as by a search
    assert {"rechecked": 2, "scanned": 1}.items() <= world.processes.statistics().items()


@pytest.mark.parametrize("who", ["parent", "sibling", "newborn"])
def test_who_else_may_have_it_by_birth_is_looked_at(world, own, who):
    world.look()
    sock, number = own()
    world.bear(sock)
    if who == "sibling":  # of one made with CLONE_PARENT
        world.siblings = {world.bear(sock, heard=False)}
    elif who == "newborn":
        world.bear(sock)
    if who != "parent":
        sock.close()

    assert world.processes.newborn(number) is None


def test_a_socket_that_was_there_before_may_be_anybodys(world, own):
    sock, number = own()
    world.look()
    world.bear(sock)
    sock.close()

    assert world.processes.newborn(number) is None


def test_who_was_born_before_is_searched_for(world, own):
    sock, number = own()
    world.bear(sock)
    world.look()

    assert world.processes.newborn(number) is None


@pytest.mark.parametrize("how", ["never looked", "lost", "too many", "no line", "shared", "long"])
def test_where_there_is_no_telling_nobody_is_told(world, own, monkeypatch, how):
    strangers = iter(range(SOME_PID, SOME_PID + 3 * newcomers.MOST_BORN))
    for _ in range(newcomers.MOST_BORN):
        world.processes.newcomers.note_birth(next(strangers))
    if how != "never looked":
        world.look()
    sock, number = own()
    pid = world.bear(sock)
    sock.close()
    if how == "lost":
        world.processes.newcomers.lose_births()
    elif how == "too many":
        for _ in range(newcomers.MOST_BORN - 1):
            world.processes.newcomers.note_birth(next(strangers))
        assert pid == world.processes.newborn(number).process.pid
        world.look()
        sock, number = own()
        world.bear(sock)  # which is one too many
        for _ in range(newcomers.MOST_BORN - 1):
            world.processes.newcomers.note_birth(next(strangers))
        world.bear(sock)
        sock.close()
    elif how == "no line":
        world.processes.newcomers.line = lambda *_: None
    elif how == "shared":  # as far as one can see
        monkeypatch.setattr(descriptors, "share_table", lambda *_: None)
    elif how == "long":
        monkeypatch.setattr(newcomers, "MOST_READ", 10)  # it has fewer, and its parent more

    assert world.processes.newborn(number) is None


def test_who_has_ended_is_none_of_too_many(world, own):
    world.look()
    newcomers_of = world.processes.newcomers
    for number in range(2 * newcomers.MOST_BORN):
        newcomers_of.note_birth(SOME_PID + number)
        newcomers_of.ended(SOME_PID + number)
    sock, number = own()
    pid = world.bear(sock)
    sock.close()
    assert pid == world.processes.newborn(number).process.pid
    newcomers_of.ended(pid)
    assert world.processes.newborn(number) is None


def test_of_two_passes_that_overlap_the_later_one_counts(world, own):
    """Also where the earlier one ends last."""
    earlier = world.processes.newcomers.begin_pass()._replace(at=0)
    world.bear()
    later = world.processes.newcomers.begin_pass()
    sock, number = own()
    pid = world.bear(sock)
    sock.close()
    for one in (later, earlier):
        world.processes.newcomers.cover(one)
    asked: list[tuple[int, int]] = []
    world.processes.newcomers.line = lambda *what: asked.append(what)

    assert world.processes.newborn(number) is None
    assert [(pid, later.at)] == asked


def test_after_the_next_pass_it_is_told_again(world, own):
    world.look()
    world.processes.newcomers.lose_births()
    world.look()
    sock, number = own()
    pid = world.bear(sock)
    sock.close()

    assert pid == world.processes.newborn(number).process.pid


def test_who_is_born_during_a_pass_counts_as_born_since(world, own, monkeypatch):
    sock, number = own()
    pid = world.apps.start(sock)
    sock.close()

    def there():
        world.processes.newcomers.note_birth(pid)
        return [os.getpid()]

    monkeypatch.setattr(procfs, "pids", there)
    world.look()

    assert pid == world.processes.newborn(number).process.pid


@pytest.mark.parametrize("who", ["parent", "nobody"])
def test_a_search_counts_as_a_pass_though_it_puts_somebody_off(world, own, monkeypatch, who):
    """What those have opened since then, who is born later has from them: they are looked at."""
    with monkeypatch.context() as patch:
        patch.setattr(tables, "LARGE", 0)
        patch.setattr(world.processes.newcomers, "line", lambda *_: set())
        world.look()
        world.processes.newcomers.lose_births()
        sock, number = own()  # by who is put off
        other, other_number = own()
        pid = world.bear(other)
        other.close()
        *_, found = world.processes.find_holders({other_number})
        assert [pid] == [holder.process.pid for holder in found[other_number]]
    later = world.bear(sock)
    if who == "nobody":
        sock.close()
    holder = world.processes.newborn(number)

    assert (None if who == "parent" else later) == (holder and holder.process.pid)


@pytest.mark.parametrize(
    ("givers", "shared"), [({os.getpid(), SOME_PID}, True), ({SOME_PID}, False), (set(), False), (None, True)]
)
def test_who_may_have_a_socket_from_a_large_process_is_not_taken_to_be_alone(world, own, monkeypatch, givers, shared):
    """What that has opened since its table was read. Who has given nothing to anybody is not read again for that."""
    monkeypatch.setattr(tables, "LARGE", 0)
    asked: list[tuple[int, int]] = []

    def tell(*what):
        asked.append(what)
        return givers

    world.processes.newcomers.line = tell
    world.look()
    sock, number = own()
    pid = world.bear(sock)
    *_, found = world.processes.find_holders({number})

    assert ({pid, os.getpid()} if shared else {pid}) == {holder.process.pid for holder in found[number]}
    ((born, since),) = asked
    assert pid == born
    assert since <= world.processes.read(pid).start_time


def test_who_is_older_than_a_large_processs_table_shows_in_it(world, own, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 0)
    monkeypatch.setattr(procfs, "LATELY_S", -1.0)
    world.look()
    sock, number = own()
    pid = world.bear(sock)
    *_, found = world.processes.find_holders({number})

    assert [pid] == [holder.process.pid for holder in found[number]]


def test_we_ourselves_are_not_looked_at(world, own, monkeypatch):
    """We have hundreds of descriptors, and give none of them to whom we start."""
    world.look()
    sock, number = own()
    pid = world.bear(sock)
    world.processes.newcomers._own = os.getpid()  # noqa: SLF001 -- as it is outside of this test

    assert pid == world.processes.newborn(number).process.pid
