"""Process events: what is believed, and what a subscription does when the kernel will not have it."""

import ctypes
import errno
import os
import struct
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.apps import own_network
from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel import procevents
from tunsplit.kernel.procevents import Exec, Exit, Fork, Overrun, ProcessEvents, UidChanged, parse_untrusted
from tunsplit.kernel.procpid import parse_stat

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
NONE, FORK, EXEC, UID, COMM, EXIT = 0, 1, 2, 4, 0x200, 0x80000000
FROM_KERNEL, FROM_SOMEBODY = (0, 1), (4711, 1)
READABLE = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # always, says poll(2)


def event(what, *numbers, kind=3, index=1, value=1, ack=0, at=5):
    """A datagram of the connector, as linux/netlink.h, connector.h and cn_proc.h lay it out."""
    body = struct.pack("=IIQ", what, 0, at * TICK_NS) + struct.pack(f"={len(numbers)}I", *numbers).ljust(24, b"\0")
    connector = struct.pack("=IIIIHH", index, value, 0, ack, len(body), 0)
    return struct.pack("=IHHII", 16 + len(connector) + len(body), kind, 0, 0, 0) + connector + body


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (event(FORK, 1, 1, 10, 10), Fork(1, 1, 10, 10, 5)),
        (event(FORK, 1, 1, 11, 10), Fork(1, 1, 11, 10, 5)),
        (event(EXEC, 10, 10), Exec(10, 10, 5)),
        (event(EXIT, 11, 10, 0, 17), Exit(11, 10, 5)),
        (event(UID, 10, 10, 0, 1000), UidChanged(10, 10, 1000, 5)),
        (event(UID, 10, 10, 0, 0xFFFFFFFE), UidChanged(10, 10, 0xFFFFFFFE, 5)),
        (event(COMM, 10, 10), None),
        (event(NONE), None),
        (event(FORK, 1, 1, 10, 10, kind=2), None),
        (event(FORK, 1, 1, 10, 10, index=2), None),
        (event(FORK, 1, 1, 10, 10, value=2), None),
        (event(FORK, 1, 1, 10, 10)[:-1], None),
        (b"", None),
    ],
)
def test_an_event_is_read_or_it_is_none(packet, expected):
    assert expected == parse_untrusted(packet.ljust(4096, b"\xff"), len(packet), 0)


def test_the_time_of_an_event_is_on_the_clock_of_start_times():
    assert Fork(1, 1, 10, 10, 7) == parse_untrusted(event(FORK, 1, 1, 10, 10), 76, 2 * TICK_NS)


@given(st.binary(max_size=200), st.integers(0, 2**63))
def test_any_bytes_are_an_event_or_nothing(packet, offset):
    assert isinstance(parse_untrusted(packet, len(packet), offset), Fork | Exec | Exit | UidChanged | None)


class FakeSocket:
    """Plays back what a kernel says: datagrams with their senders, and errors. Then nothing is there."""

    def __init__(self, *answers, refuse=None):
        self.answers = list(answers)
        self.refuse = refuse
        self.sent = []
        self.closed = False

    def fileno(self):
        return READABLE

    def setsockopt(self, *option):
        pass

    def bind(self, address):
        if self.refuse == "bind":
            raise PermissionError(errno.EPERM, "no")

    def getsockname(self):
        return (77, 1)

    def send(self, packet):
        if isinstance(self.refuse, OSError):
            raise self.refuse
        self.sent.append(packet)

    def recvfrom(self, size):
        if not self.answers:
            raise BlockingIOError
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    def recvfrom_into(self, buffer):
        packet, sender = self.recvfrom(len(buffer))
        buffer[: len(packet)] = packet
        return len(packet), sender

    def close(self):
        self.closed = True


ACCEPTED = (event(NONE, 0, ack=78), FROM_KERNEL)


@pytest.fixture
def kernel(monkeypatch):
    """Let the next subscription talk to this fake."""

    def play(*answers, refuse=None):
        fake = FakeSocket(*answers, refuse=refuse)
        monkeypatch.setattr("socket.socket", lambda *_: fake)
        return fake

    return play


def test_events_that_others_send_are_not_believed(kernel):
    kernel(ACCEPTED, (event(EXEC, 10, 10), FROM_SOMEBODY), (event(EXEC, 11, 11), FROM_KERNEL))
    with ProcessEvents() as events:
        assert [(11, 11)] == [one[:2] for one in events.read() if isinstance(one, Exec)]


def test_what_was_lost_is_told_in_its_place(kernel):
    kernel(ACCEPTED, (event(EXEC, 11, 11), FROM_KERNEL), OSError(errno.ENOBUFS, ""), (event(EXIT, 11, 11), FROM_KERNEL))
    with ProcessEvents() as events:
        assert [Exec, Overrun, Exit] == [type(one) for one in events.read()]
        assert {"process_events": 3, "process_overruns": 1} == events.statistics()


def test_after_a_suspend_everything_is_looked_at_anew(kernel, monkeypatch):
    """What was queued before it has a date that means something else now; once is enough."""
    ahead_s = iter([100, 100.5, 3700, 3700])
    monkeypatch.setattr(procevents, "_boot_offset_ns", lambda: int(next(ahead_s) * 1e9))
    monkeypatch.setattr(procevents, "BATCH", 1)
    kernel(ACCEPTED, *[(event(EXEC, 11, 11), FROM_KERNEL)] * 3)
    with ProcessEvents() as events:
        kinds = [[type(one) for one in events.read()] for _ in range(4)]

    assert [[Exec], [Overrun, Exec], [Exec], []] == kinds


def test_one_read_has_an_end(kernel, monkeypatch):
    monkeypatch.setattr(procevents, "BATCH", 2)
    kernel(ACCEPTED, *[(event(EXEC, 11, 11), FROM_KERNEL)] * 3)
    with ProcessEvents() as events:
        assert [2, 1, 0] == [len(events.read()) for _ in range(3)]


def test_with_fewer_events_the_queue_was_empty_whatever_lay_between_them(kernel, monkeypatch):
    """Before Linux 6.6, who gives his threads names puts as many datagrams between a birth and its exec."""
    monkeypatch.setattr(procevents, "BATCH", 2)
    renamed = [(event(COMM, 10, 10), FROM_KERNEL)] * 3
    kernel(ACCEPTED, *renamed, (event(FORK, 1, 1, 10, 10), FROM_KERNEL), *renamed, (event(EXEC, 10, 10), FROM_KERNEL))
    with ProcessEvents() as events:
        assert [Fork, Exec] == [type(one) for one in events.read()]


def test_who_renames_his_threads_for_ever_does_not_keep_us_and_hides_nothing(kernel, monkeypatch):
    monkeypatch.setattr(procevents, "MOST_READ", 5)
    kernel(ACCEPTED, *[(event(COMM, 10, 10), FROM_KERNEL)] * 5, (event(EXEC, 10, 10), FROM_KERNEL))
    with ProcessEvents() as events, pytest.raises(KernelError, match="faster"):
        events.read()


def test_a_socket_that_fails_says_so(kernel):
    kernel(ACCEPTED, OSError(errno.EIO, "broken"))
    with ProcessEvents() as events, pytest.raises(KernelError, match="broken"):
        events.read()


def test_the_answers_to_others_are_not_ours(kernel):
    fake = kernel(
        (event(NONE, errno.EPERM, ack=1), FROM_KERNEL),
        (event(NONE, 0, ack=78), FROM_SOMEBODY),
        (b"short", FROM_KERNEL),
        (event(FORK, 1, 1, 10, 10, ack=78), FROM_KERNEL),
        ACCEPTED,
    )
    with ProcessEvents():
        listen, wanted = fake.sent
        assert 4 == len(wanted) - len(listen)
    assert fake.closed


@pytest.mark.parametrize(
    ("answers", "refuse", "error"),
    [
        ([], None, KernelError),
        ([(event(NONE, errno.EPERM, ack=78), FROM_KERNEL)], None, PermissionMissing),
        ([(event(NONE, errno.ENOMEM, ack=78), FROM_KERNEL)], None, KernelError),
        ([], "bind", PermissionMissing),
        ([], OSError(errno.ENOBUFS, "no room"), KernelError),
    ],
)
def test_a_subscription_that_is_refused_leaves_nothing_open(kernel, answers, refuse, error):
    fake = kernel(*answers, refuse=refuse)
    with pytest.raises(error):
        ProcessEvents()
    assert fake.closed


def test_a_kernel_without_the_connector(monkeypatch):
    def refuse(*kind):
        raise OSError(errno.EPROTONOSUPPORT, "unknown protocol")

    monkeypatch.setattr("socket.socket", refuse)
    with pytest.raises(KernelError, match="CONFIG_CONNECTOR"):
        ProcessEvents()


def test_a_farewell_that_fails_does_not_matter(kernel):
    fake = kernel(ACCEPTED)
    events = ProcessEvents()
    fake.refuse = OSError(errno.ENOBUFS, "")
    events.close()
    assert fake.closed


# The real connector


@pytest.mark.netns
def test_the_life_of_a_process():
    with ProcessEvents() as events:
        assert os.get_inheritable(events.fileno()) is False
        assert os.get_blocking(events.fileno()) is False
        child = subprocess.Popen(["/bin/true"])
        child.wait()
        mine = [one for one in events.read() if getattr(one, "child_pid", getattr(one, "pid", None)) == child.pid]
    assert [Fork, Exec, Exit] == [type(one) for one in mine]
    assert (os.getpid(), child.pid) == mine[0][1:3]


@pytest.mark.netns
def test_a_thread_differs_from_its_process():
    with ProcessEvents() as events:
        thread = threading.Thread(target=list)
        thread.start()
        tid = thread.native_id
        thread.join()
        births = [one for one in events.read() if isinstance(one, Fork) and one.child_pid == tid]
    assert [os.getpid()] == [one.child_tgid for one in births]


@pytest.mark.netns
def test_another_network_namespace_is_no_hindrance():
    with own_network(), ProcessEvents() as events:
        before = Path("/proc/thread-self/ns/net").stat().st_ino
        child = subprocess.Popen(["/bin/true"])
        child.wait()
        assert child.pid in {one.child_pid for one in events.read() if isinstance(one, Fork)}
        assert before == Path("/proc/thread-self/ns/net").stat().st_ino


@pytest.fixture
def closed(monkeypatch):
    """Let these paths be closed to us, others open."""

    def close(*paths, stat=None):
        def opened(path, flags, _open=os.open):
            if path in paths:
                raise PermissionError(errno.EACCES, "Permission denied")
            return _open("/proc/self/ns/net" if path.startswith("/proc/") else path, flags)

        monkeypatch.setattr("os.open", opened)
        if stat is not None:
            monkeypatch.setattr("tunsplit.kernel.procevents.parse_stat", lambda _: stat)

    return close


def test_pid_one_may_be_open(closed):
    closed("/proc/2/ns/net")
    os.close(procevents.initial_network())


@pytest.mark.parametrize("paths", [["/proc/1/ns/net"], ["/proc/1/ns/net", "/proc/2/ns/net"]])
def test_pid_two_counts_only_as_a_kernel_thread_and_if_it_is_open(closed, paths):
    closed(*paths, stat=parse_stat(b"2 (kthreadd) " + b"0 " * 20) if len(paths) == 1 else None)
    with pytest.raises(KernelError, match="initial network namespace"):
        procevents.initial_network()


@pytest.mark.parametrize(("number", "error"), [(errno.EPERM, PermissionMissing), (errno.EINVAL, KernelError)])
def test_a_namespace_that_cannot_be_entered(monkeypatch, kernel, number, error):
    class Libc:
        def setns(self, *arguments):
            ctypes.set_errno(number)
            return -1

    kernel(refuse=ConnectionRefusedError(errno.ECONNREFUSED, "refused"))
    monkeypatch.setattr(procevents, "initial_network", lambda: os.open("/proc/self/ns/net", os.O_RDONLY))
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Libc())
    with pytest.raises(error):
        ProcessEvents()


@pytest.mark.netns
def test_a_connector_that_refuses_everywhere(kernel):
    kernel(refuse=ConnectionRefusedError(errno.ECONNREFUSED, "refused"))
    with pytest.raises(KernelError, match="connector refuses"):
        ProcessEvents()


@pytest.mark.netns
def test_where_events_are_is_known():
    own = Path("/proc/self/ns/net").readlink()
    assert (own == Path("/proc/2/ns/net").readlink()) is procevents.is_initial_network()
    with own_network():
        assert not procevents.is_initial_network()


def test_what_cannot_be_reached_is_elsewhere(monkeypatch):
    def unreachable() -> int:
        raise KernelError("closed")

    monkeypatch.setattr(procevents, "initial_network", unreachable)
    assert not procevents.is_initial_network()
