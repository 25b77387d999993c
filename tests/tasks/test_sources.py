"""The socket behind a packet, and who holds it: a program that is gone in the next moment."""

import pytest

from tests.craft import ends
from tests.fakes.judges import as_real
from tunsplit.kernel import procnet
from tunsplit.kernel.procfs import Holder
from tunsplit.kernel.sockdiag import CLOSE, Socket
from tunsplit.process import Process
from tunsplit.tasks import sources
from tunsplit.tasks.sources import SocketSource

TCP, UDP = 6, 17
KEY = ends("10.128.0.1:5000 > 198.51.100.1:7").key
SENDER = Holder(Process(4711, 100, 1, 1000, None), "3")


class FakeKernel:
    """A socket, while it is `open`, and the newcomer who holds it."""

    def __init__(self):
        self.open = self.is_newcomer = True
        self.known = False

    def find(self, *_):
        return Socket(20000, 1000, b"cookie00", CLOSE, None, 0) if self.open else None

    def find_all(self, *_):
        return [self.find()] if self.open else []

    def recheck(self, _):
        return SENDER if self.known else None

    def newcomer(self, _):
        return SENDER if self.is_newcomer and self.open else None

    def find_holders(self, *_):
        return iter([SENDER] if self.open else [])


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(procnet, "find_raw", lambda *_: [])
    return FakeKernel()


@pytest.fixture
def source(kernel):
    return SocketSource(as_real(kernel), as_real(kernel))


def searched(source):
    return [answer for answer in source.search(UDP, KEY) if answer is not None][-1]


def test_who_sends_and_ends_is_known_if_it_was_noted_in_time(source, kernel):
    source.note_newcomer(UDP, KEY)
    kernel.open = False
    assert source.attribute(UDP, KEY) is None
    assert SENDER.process == searched(source).owner.process


def test_else_there_is_no_socket(source, kernel):
    kernel.is_newcomer = False
    source.note_newcomer(UDP, KEY)
    kernel.open = False
    assert sources.NO_SOCKET == source.attribute(UDP, KEY)


def test_a_note_is_for_one_packet_alone(source, kernel):
    """Whoever has the port next, and is gone too, is somebody else."""
    for known in (True, False):
        kernel.open, kernel.known = True, known
        source.note_newcomer(UDP, KEY)
        assert known == (source.attribute(UDP, KEY) is not None)
        kernel.open = False
        if not known:
            source.note_newcomer(UDP, KEY)
        assert sources.NO_SOCKET == source.attribute(UDP, KEY)


def test_a_connection_outlives_its_first_packet_and_is_not_noted(source, kernel):
    source.note_newcomer(TCP, KEY)
    kernel.open = False
    assert sources.NO_SOCKET == source.attribute(UDP, KEY)


def test_notes_are_bounded(source, monkeypatch):
    monkeypatch.setattr(sources, "MOST_EARLY", 2)
    keys = [ends(f"10.128.0.1:{port} > 198.51.100.1:7").key for port in range(5000, 5005)]
    for key in keys:
        source.note_newcomer(UDP, key)
    assert len(source._early) <= 2  # noqa: SLF001 -- what is bounded is not shown
