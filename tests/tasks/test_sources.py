"""The socket behind a packet, and who holds it: a program that is gone in the next moment."""

import time
from functools import partial
from typing import Any

import pytest

from tests.craft import ends
from tests.fakes.judges import as_real
from tunsplit.engine.attribution import Certainty
from tunsplit.engine.flow import Flow
from tunsplit.errors import KernelError
from tunsplit.kernel import procnet
from tunsplit.kernel.procfs import Holder
from tunsplit.kernel.sockdiag import CLOSE, ESTABLISHED, LISTEN, SYN_RECV, TIME_WAIT, Socket
from tunsplit.process import Process
from tunsplit.tasks import sources
from tunsplit.tasks.sources import SocketSource

TCP, UDP = 6, 17
KEY = ends("10.128.0.1:5000 > 198.51.100.1:7").key
SENDER = Holder(Process(4711, 100, 1, 1000, None), "3")
MANAGER, SERVICE, WORKER = (Holder(Process(pid, 100, 1, 0, None), "3") for pid in (1, 4712, 4713))


class FakeKernel:
    """A socket, while it is `open`, and the newcomer who holds it; `closes` once all sockets are looked through."""

    def __init__(self):
        self.open = self.is_newcomer = True
        self.known = self.is_newborn = self.closes = False
        self.walk_s = 0.0

    def find(self, *_):
        return Socket(20000, 1000, b"cookie00", CLOSE, 0) if self.open else None

    def find_all_of(self, four_tuples):
        self.open = self.open and not self.closes
        return {one: [self.find()] if self.open else [] for one in four_tuples}

    def recheck(self, _):
        return SENDER if self.known else None

    def newborn(self, _):
        return SENDER if self.is_newborn and self.open else None

    def newcomer(self, *_):
        return SENDER if self.is_newcomer and self.open else None

    def find_holders(self, inodes):
        return iter([None, {inode: [SENDER] for inode in inodes} if self.open else {}])


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(procnet, "find_raw", lambda *_: [])
    return FakeKernel()


@pytest.fixture
def source(kernel):
    return SocketSource(as_real(kernel), as_real(kernel))


def searched(source):
    ((_, answer),) = filter(None, source.search([(UDP, KEY)]))
    return answer


@pytest.mark.parametrize("known", [False, True], ids=["newcomer", "known"])
@pytest.mark.parametrize("walk_s", [0.0, sources.DEAR_S * 2])
def test_who_sends_and_ends_is_known_if_it_was_noted_in_time(source, kernel, known, walk_s):
    kernel.known, kernel.is_newcomer, kernel.walk_s = known, not known, walk_s
    kernel.closes = True
    assert source.attribute(UDP, KEY) is None
    assert SENDER.process == searched(source).owner.process


def test_who_is_gone_while_he_is_searched_for_is_who_was_noted(source, kernel):
    """His socket was another by then, and nobody held it."""
    assert source.attribute(UDP, KEY) is None
    search = source.search([(UDP, KEY)])
    other = Socket(30000, 1000, b"another!", CLOSE, 0)
    kernel.find = lambda *_: other
    kernel.find_holders = lambda _: iter([None, {}])
    assert next(search) is None
    kernel.open = False
    ((_, answer),) = filter(None, search)

    assert SENDER.process == answer.owner.process


def test_else_there_is_no_socket(source, kernel):
    kernel.is_newcomer = False
    kernel.closes = True
    assert sources.NO_SOCKET == source.attribute(UDP, KEY)


def test_a_note_is_for_one_packet_alone(source, kernel):
    """Whoever has the port next, and is gone too, is somebody else."""
    kernel.known = True
    assert source.attribute(UDP, KEY) is not None
    kernel.known = False
    assert source.attribute(UDP, KEY) is None
    kernel.open = False
    assert sources.NO_SOCKET == source.attribute(UDP, KEY)


def test_notes_are_bounded(source, kernel, monkeypatch):
    monkeypatch.setattr(sources, "MOST_EARLY", 2)
    kernel.walk_s = sources.DEAR_S * 2
    keys = [ends(f"10.128.0.1:{port} > 198.51.100.1:7").key for port in range(5000, 5010)]
    for key in keys:
        kernel.known = not kernel.known
        source.attribute(UDP, key)
    assert len(source._early) <= 2  # noqa: SLF001 -- what is bounded is not shown


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_newborn_is_not_searched_for(source, kernel, protocol):
    kernel.is_newborn = True
    found = source.attribute(protocol, KEY)
    assert (SENDER.process, Certainty.EXACT) == (found.owner.holders[0], found.owner.certainty)


def test_who_has_many_newborns_looked_at_is_searched_for(source, kernel, monkeypatch):
    """Packets of all flows wait meanwhile, and a search gives way to them."""
    kernel.is_newborn = True
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    source = SocketSource(as_real(kernel), as_real(kernel))

    def takes(seconds, _inode):
        clock[0] += seconds
        return SENDER

    kernel.newborn = partial(takes, sources.OWED_S / 4)
    assert [False, False, True] == [source.attribute(TCP, KEY) is None for _ in range(3)]
    clock[0] += sources.OWED_S
    assert source.attribute(TCP, KEY) is not None


# Many at once


class FakeCrowd(FakeKernel):
    """A socket for each flow, of which some are `rechecked` and the others held by `holders`."""

    def __init__(self):
        super().__init__()
        self.rechecked, self.newborns, self.holders, self.passes, self.walks = set(), set(), {}, [], 0
        self.generation = 0  # of the sockets

    def find_all_of(self, four_tuples):
        self.walks += 1
        return {one: [Socket(number_of(one) + self.generation, 1000, bytes(8), CLOSE, 0)] for one in four_tuples}

    def recheck(self, inode):
        return SENDER if inode in self.rechecked else None

    def newborn(self, inode):
        return WORKER if inode in self.newborns else None

    def find_holders(self, inodes):
        self.passes.append(set(inodes))
        yield None
        yield {inode: self.holders[inode] for inode in inodes if inode in self.holders}


def number_of(four_tuple):
    return int.from_bytes(four_tuple[-4:-2], "big")


@pytest.fixture
def crowd(kernel):
    return FakeCrowd()


PORTS = range(5000, 5020)
FLOWS = [(UDP, ends(f"10.128.0.1:{port} > 198.51.100.1:7").key) for port in PORTS]


def test_many_are_searched_for_in_one_pass(crowd):
    crowd.rechecked = {5000, 5001}
    crowd.holders = {port: [SERVICE] for port in PORTS if port != 5019}
    found: Any = dict(filter(None, SocketSource(as_real(crowd), as_real(crowd)).search(FLOWS)))

    assert [set(PORTS) - {5000, 5001}] == crowd.passes
    assert [SENDER.process] * 2 + [SERVICE.process] * 17 == [found[one].owner.process for one in FLOWS[:19]]
    assert found[FLOWS[19]].owner is None
    assert 2 == crowd.walks  # before the search and after it


def test_a_few_are_looked_for_among_newborns_and_of_many_no_more(crowd):
    crowd.newborns = {*PORTS}
    crowd.holders = {port: [SERVICE] for port in PORTS}
    found: Any = dict(filter(None, SocketSource(as_real(crowd), as_real(crowd)).search(FLOWS)))

    newborns = [WORKER.process] * sources.FEW
    assert newborns + [SERVICE.process] * (len(FLOWS) - sources.FEW) == [found[one].owner.process for one in FLOWS]


def test_who_is_known_is_not_looked_for_twice(crowd):
    crowd.rechecked = {5000}
    ((_, found),) = filter(None, SocketSource(as_real(crowd), as_real(crowd)).search(FLOWS[:1]))

    assert found.owner is not None
    assert SENDER.process == found.owner.process
    assert ([], 1) == (crowd.passes, crowd.walks)


def test_who_has_changed_hands_meanwhile_is_searched_for_again(crowd):
    crowd.holders = {5000: [SERVICE], 5100: [WORKER]}
    search = SocketSource(as_real(crowd), as_real(crowd)).search(FLOWS[:1])
    assert next(search) is None
    crowd.generation = 100

    ((_, found),) = filter(None, search)
    assert found.owner is not None
    assert WORKER.process == found.owner.process
    assert [{5000}, {5100}] == crowd.passes


def test_where_a_walk_is_dear_none_is_made_for_one_flow(crowd):
    source = SocketSource(as_real(crowd), as_real(crowd))
    crowd.rechecked = {5000}
    assert source.attribute(*FLOWS[0]) is not None
    crowd.walk_s = sources.DEAR_S * 2
    assert source.attribute(*FLOWS[0]) is None
    assert 1 == crowd.walks


# Servers

SERVED = ends("192.0.2.7:80 > 198.51.100.1:7").key


class FakeListener(FakeKernel):
    """A listener with these holders, and a connection to it in some `state`, held as `inode`."""

    def __init__(self):
        super().__init__()
        self.holders = [SERVICE]
        self.state, self.inode = SYN_RECV, 0
        self.is_there = True

    def find(self, *_):
        if not self.is_there:
            return None
        return Socket(self.inode, 1000, b"connects", self.state, 0)

    def find_listener(self, _):
        return Socket(20000, 1000, b"listens!", LISTEN, 0)

    def recheck(self, _):
        return None

    def newborn(self, _):
        return None

    def find_holders(self, inodes):
        return iter([dict.fromkeys(inodes, self.holders)])


def serving(listener):
    ((_, found),) = filter(None, SocketSource(as_real(listener), as_real(listener)).search([(TCP, SERVED)]))
    assert found.owner is not None
    return [process.pid for process in found.owner.holders], found.certainty


@pytest.mark.parametrize(
    ("holders", "pids"),
    [([MANAGER, SERVICE], [4712]), ([SERVICE, WORKER], [4712, 4713]), ([MANAGER], [1])],
    ids=["beside its service", "not there", "alone"],
)
def test_who_keeps_a_listener_for_its_service_accepts_nothing(holders, pids):
    """L38: pid 1 has the listeners of socket units open beside the services that it passed them to."""
    listener = FakeListener()
    listener.holders = holders

    assert (pids, Certainty.INHERITED) == serving(listener)


def test_of_a_connection_that_it_has_accepted_it_is_a_holder_like_others():
    listener = FakeListener()
    listener.holders, listener.state, listener.inode = [MANAGER, SERVICE], ESTABLISHED, 30000

    assert ([1, 4712], Certainty.SHARED) == serving(listener)


@pytest.mark.parametrize(
    ("state", "inode", "accepted"),
    [(SYN_RECV, 0, False), (ESTABLISHED, 0, False), (LISTEN, 20000, False), (ESTABLISHED, 30000, True)],
)
def test_whether_somebody_has_accepted(state, inode, accepted):
    listener = FakeListener()
    listener.state, listener.inode = state, inode
    source = SocketSource(as_real(listener), as_real(listener))

    assert accepted == source.is_accepted(SERVED)
    listener.is_there = False
    assert not source.is_accepted(SERVED)


@pytest.mark.parametrize(
    ("state", "inode", "cookie", "goes_on"),
    [
        (ESTABLISHED, 30000, b"cookie00", True),
        (ESTABLISHED, 30000, b"another0", False),
        (ESTABLISHED, 0, b"cookie00", False),
        (TIME_WAIT, 0, b"cookie00", False),
        (CLOSE, 30000, b"cookie00", False),
    ],
)
def test_whether_a_connection_goes_on_that_seems_to_be_over(monkeypatch, state, inode, cookie, goes_on):
    """L37: the socket that it was judged by tells, and only while somebody holds it."""
    kernel = FakeListener()
    source = SocketSource(as_real(kernel), as_real(kernel))
    monkeypatch.setattr(kernel, "find", lambda *_: Socket(inode, 1000, cookie, state, 0))

    assert goes_on == source.goes_on(Flow(TCP, SERVED, SERVED, "uplink", 0.0, None, "", "", b"cookie00"))


def test_what_nobody_can_tell_about_does_not_go_on(monkeypatch):
    kernel = FakeListener()
    source = SocketSource(as_real(kernel), as_real(kernel))

    assert not source.goes_on(Flow(TCP, SERVED, SERVED, "uplink", 0.0, None, "", "", None))
    assert not source.goes_on(Flow(UDP, SERVED, SERVED, "uplink", 0.0, None, "", "", b"cookie00"))

    def fail(*_):
        raise KernelError("no memory")

    monkeypatch.setattr(kernel, "find", fail)
    assert not source.goes_on(Flow(TCP, SERVED, SERVED, "uplink", 0.0, None, "", "", b"cookie00"))
