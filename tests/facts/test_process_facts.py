"""What process events promise: their order is what the launch race is decided by."""

import ctypes
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps import own_network
from tunsplit.kernel import procevents
from tunsplit.kernel.procevents import Exec, Exit, Fork, Overrun, ProcessEvents, UidChanged
from tunsplit.kernel.procpid import parse_stat

pytestmark = pytest.mark.netns

ROUNDS = 15
LOST = 300  # births, and as many deaths
NOBODY = 65534
CLONE_PARENT = 0x8000
SYS_CLONE = {"x86_64": 56, "aarch64": 220}[os.uname().machine]

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def events():
    with ProcessEvents() as subscribed:
        yield subscribed


def start_time(pid):
    return parse_stat(Path(f"/proc/{pid}/stat").read_bytes())


def forked(function):
    """The pid of a child that does this and ends."""
    pid = os.fork()
    if not pid:
        try:
            function()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # at os._exit, coverage would save what it has measured: 0.1 s
    return pid


def drained(events):
    """All that is queued now."""
    found = []
    while batch := events.read():
        found += batch
    return found


def awaited_exit(events, tgid, count=1):
    """All that is told until so many tasks of a process have ended."""
    found = drained(events)
    while sum(isinstance(one, Exit) and one.tgid == tgid for one in found) < count:
        assert select.select([events], [], [], 10)[0]
        found += drained(events)
    return found


def test_a_birth_is_queued_before_the_childs_first_packet(events):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        server.bind(("127.0.0.1", 0))
        client.connect(server.getsockname())
        for _ in range(ROUNDS):
            pid = forked(lambda: client.send(b"!"))
            server.recv(1)  # by now the packet is in hand
            assert pid in {one.child_pid for one in drained(events) if isinstance(one, Fork)}
            os.waitpid(pid, 0)


def test_a_program_is_queued_before_its_first_instruction(events):
    for _ in range(ROUNDS):
        with subprocess.Popen(["/bin/echo"], stdout=subprocess.PIPE) as echo:
            assert echo.stdout is not None
            echo.stdout.read(1)  # by now it has run
            assert echo.pid in {one.tgid for one in drained(events) if isinstance(one, Exec)}


def test_a_death_is_told_though_the_children_may_have_another_parent_before(events):
    reader, writer = os.pipe()

    def bear():
        parent = os.getpid()
        if not os.fork():
            while os.getppid() == parent:
                os.sched_yield()
            os.write(writer, b"!")

    pid = forked(bear)
    os.close(writer)
    assert b"!" == os.read(reader, 1)
    os.close(reader)
    awaited_exit(events, pid)
    os.waitpid(pid, 0)


def test_a_start_time_is_never_later_than_its_birth(events):
    reader, writer = os.pipe()
    pids = [forked(lambda: os.read(reader, 1)) for _ in range(ROUNDS)]
    births = {one.child_pid: one.at for one in drained(events) if isinstance(one, Fork)}
    late = [births[pid] - start_time(pid).start_time for pid in pids]
    os.write(writer, bytes(ROUNDS))
    for pid in pids:
        os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)
    assert min(late) >= 0


def test_a_change_of_the_user_is_told(events):
    pid = forked(lambda: os.seteuid(NOBODY))
    os.waitpid(pid, 0)
    assert [NOBODY] == [one.uid for one in drained(events) if isinstance(one, UidChanged) and one.pid == pid]


def test_exec_by_a_thread_is_no_death_of_its_process(events):
    """The leader's exit comes before the exec, or later under the number that the thread had until then."""
    code = "import os, threading; threading.Thread(target=os.execv, args=('/bin/true', ['true'])).start(); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as program:
        program.wait()
        # Two tasks: the leader, and the one that has taken its place.
        told = awaited_exit(events, program.pid, 2)
    mine = [one for one in told if isinstance(one, Exec | Exit) and one.tgid == program.pid]
    execs = [place for place, one in enumerate(mine) if isinstance(one, Exec)]
    assert (2, 4) == (len(execs), len(mine))
    assert 1 == sum(one.pid == program.pid for one in mine[execs[-1] + 1 :])


def test_clone_parent_names_the_callers_parent(events):
    """Event and /proc agree, and nothing names the caller."""
    reader, writer = os.pipe()
    caller = os.fork()
    if not caller:
        pid = _libc.syscall(SYS_CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
        if pid:
            os.write(writer, struct.pack("=i", pid))
        else:
            signal.pause()
        os._exit(0)
    (child,) = struct.unpack("=i", os.read(reader, 4))
    os.waitpid(caller, 0)
    [birth] = [one for one in drained(events) if isinstance(one, Fork) and one.child_pid == child]
    shown = start_time(child).parent
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert (os.getpid(), os.getpid()) == (birth.parent_tgid, shown)


def test_an_overrun_is_told_first_and_ends_when_the_queue_is_empty(monkeypatch):
    monkeypatch.setattr(procevents, "QUEUE", 64 << 10)  # bytes: two hundred events
    with ProcessEvents() as events:
        # A shell's children: in one of ours coverage begins anew, which takes more than all of these.
        subprocess.run(["sh", "-c", f"for _ in $(seq {LOST}); do (:); done"], check=True)
        lost = drained(events)
        # It overruns again if others on this machine are busy at this moment.
        for _ in range(ROUNDS):
            pid = forked(lambda: None)
            os.waitpid(pid, 0)
            after = drained(events)
            if Overrun not in {type(one) for one in after}:
                break
    assert Overrun is type(lost[0])
    assert pid in {one.child_pid for one in after if isinstance(one, Fork)}
    assert Overrun not in {type(one) for one in after}


def test_the_connector_is_refused_in_other_network_namespaces():
    with own_network(), pytest.raises(ConnectionRefusedError):
        procevents._subscribe()  # noqa: SLF001 -- the fact is about the way that the class does not take


def test_a_subscription_goes_on_in_another_network_namespace(events):
    with own_network():
        pid = forked(lambda: None)
        os.waitpid(pid, 0)
        assert pid in {one.child_pid for one in drained(events) if isinstance(one, Fork)}


def test_only_the_kinds_that_were_asked_for_come(events):
    pid = forked(lambda: Path("/proc/self/comm").write_text("renamed"))
    os.waitpid(pid, 0)
    mine = {type(one) for one in drained(events) if pid in one[:4]}
    assert {Fork, Exit} == mine
