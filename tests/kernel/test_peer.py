"""Who is at the other end of a unix socket: real processes that connect, hand over, exec and die."""

import array
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.control_server import NOBODY, as_user
from tunsplit.errors import PermissionMissing
from tunsplit.kernel import peer
from tunsplit.kernel.peer import Peer, look, peer_of, prove, prove_by_start_time


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        Path(directory).chmod(0o755)
        listener.bind(f"{directory}/s")
        Path(directory, "s").chmod(0o666)
        listener.listen()
        yield listener


class Child:
    """A process that connects, and then does some work; until it is told to end."""

    def __init__(self, listener: socket.socket, work: Callable[[socket.socket], object] = lambda _: None) -> None:
        down, self._hold = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(self._hold)
                connection = socket.socket(socket.AF_UNIX)
                connection.connect(listener.getsockname())
                work(connection)
                os.read(down, 1)
            finally:
                os._exit(0)
        os.close(down)
        self.accepted, _ = listener.accept()
        self.peer = peer_of(self.accepted)

    def end(self, *, reap: bool = True) -> None:
        """Let it end; without `reap` it stays a zombie."""
        os.close(self._hold)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        if reap:
            os.waitpid(self.pid, 0)

    def close(self) -> None:
        self.accepted.close()


@pytest.fixture
def child(listener) -> Iterator[Child]:
    child = Child(listener)
    yield child
    child.close()


PROOFS = {
    "SO_PEERPIDFD": lambda child: prove(child.accepted, child.peer),
    "start time": lambda child: prove_by_start_time(child.peer),
}


@pytest.fixture(params=PROOFS)
def proof(request) -> Callable[[Child], peer.Subject]:
    return PROOFS[request.param]


def start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_the_kernel_notes_who_connects(child):
    assert (child.pid, os.geteuid(), os.getegid(), frozenset(os.getgroups())) == child.peer[:4]
    child.end()


def test_a_living_process_is_proved(child, proof):
    assert (child.pid, start_time(child.pid), child.pid) == proof(child)[:3]
    child.end()


@pytest.mark.parametrize("reap", [False, True])
def test_a_dead_process_is_not(child, proof, reap):
    child.end(reap=reap)
    with pytest.raises(PermissionMissing, match="the one that connected has ended"):
        proof(child)
    if not reap:
        os.waitpid(child.pid, 0)


def test_a_process_that_was_dead_before_it_was_accepted_is_not(listener, proof):
    pid = os.fork()
    if not pid:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(listener.getsockname())
        os._exit(0)
    os.waitpid(pid, 0)
    dead = Child.__new__(Child)
    dead.accepted, _ = listener.accept()
    dead.peer = peer_of(dead.accepted)

    assert (pid, None) == (dead.peer.pid, dead.peer.start_time)
    with pytest.raises(PermissionMissing):
        proof(dead)
    dead.close()


def reuse(pid: int) -> subprocess.Popen[bytes]:
    """Start a process that gets this very pid."""
    while True:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        stranger = subprocess.Popen(["sleep", "60"])
        if stranger.pid == pid:
            return stranger
        stranger.kill()
        stranger.wait()


@pytest.mark.netns
def test_a_stranger_with_the_same_pid_is_not_taken_for_it(child, proof):
    child.end()
    with reuse(child.pid) as stranger:
        with pytest.raises(PermissionMissing):
            proof(child)
        stranger.kill()


def test_another_program_in_the_same_process_is_still_the_process(listener, proof):
    def become(connection: socket.socket) -> None:
        connection.set_inheritable(True)
        os.execv("/bin/sleep", ["sleep", "60"])

    child = Child(listener, become)

    assert child.pid == proof(child).pid
    os.kill(child.pid, signal.SIGKILL)
    child.end()
    child.close()


def test_a_connection_handed_on_still_names_who_connected(listener, proof):
    """Whoever holds it now can do no more with it than name the one that connected, while that one lives."""
    ours, theirs = socket.socketpair()
    child = Child(
        listener,
        lambda connection: theirs.sendmsg(
            [b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [connection.fileno()]))]
        ),
    )
    _, (received,), _, _ = socket.recv_fds(ours, 1, 1)
    assert child.pid == proof(child).pid
    child.end()
    with pytest.raises(PermissionMissing):  # though the connection is open, and can be written on
        proof(child)
    os.close(received)
    for one in (ours, theirs, child):
        one.close()


def test_a_process_outside_our_pid_namespace_is_nobody(child, monkeypatch):
    nobody = child.peer._replace(pid=0, start_time=None)
    with pytest.raises(PermissionMissing, match="another pid namespace"):
        prove(child.accepted, nobody)
    with pytest.raises(PermissionMissing):
        prove_by_start_time(nobody)
    child.end()


@pytest.mark.parametrize("code", ["ENOPROTOOPT", "ESRCH"])
def test_an_older_kernel_is_answered_by_the_start_time(child, code, monkeypatch):
    class Older:
        def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
            raise OSError(getattr(errno, code), code)

    if code == "ENOPROTOOPT":
        assert child.pid == prove(Older(), child.peer).pid
    else:
        with pytest.raises(PermissionMissing, match="has ended"):
            prove(Older(), child.peer)
    child.end()


def test_one_that_ends_while_we_look_is_not_proved(child, monkeypatch):
    def look_late(pid: int) -> peer.Subject | None:
        found = look(pid)
        child.end()
        return found

    monkeypatch.setattr(peer, "look", look_late)
    with pytest.raises(PermissionMissing, match="has ended"):
        prove(child.accepted, child.peer)


def test_by_the_start_time_alone_the_user_must_be_the_same(child):
    with pytest.raises(PermissionMissing, match="has become another user"):
        prove_by_start_time(child.peer._replace(uid=12345))
    child.end()


@pytest.mark.netns
def test_who_connected_as_another_user_is_that_user(listener):
    def connect() -> Peer:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(listener.getsockname())
            with listener.accept()[0] as accepted:
                return peer_of(accepted)

    found = as_user(NOBODY, [1, 2], connect)
    assert isinstance(found, Peer)
    assert (os.getpid(), NOBODY, NOBODY, frozenset({1, 2})) == found[:4]


def test_more_groups_than_can_be_asked_for_count_as_none():
    class Many:
        def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
            if optname == socket.SO_PEERCRED:
                return bytes(12)
            raise OSError

    assert frozenset() == peer_of(Many()).groups


def test_no_process_no_subject():
    assert look(0) is None
    assert look(1 << 22) is None


def test_a_process_that_ends_while_it_is_read_is_none(monkeypatch):
    with subprocess.Popen(["sleep", "60"]) as process:
        real = peer._read  # noqa: SLF001  between two reads is where it matters

        def read(name: str, directory: int) -> bytes:
            process.kill()
            process.wait()
            return real(name, directory)

        monkeypatch.setattr(peer, "_read", read)
        assert look(process.pid) is None


def test_a_thread_names_its_process():
    ready, end = threading.Event(), threading.Event()
    ids: list[int] = []

    def body() -> None:
        ids.append(threading.get_native_id())
        ready.set()
        end.wait()

    thread = threading.Thread(target=body)
    thread.start()
    ready.wait()
    found = look(ids[0])
    end.set()
    thread.join()

    assert found is not None
    assert (ids[0], os.getpid()) == (found.pid, found.leader)


def test_a_program_may_be_called_anything():
    code = (
        "import sys, pathlib\n"
        "pathlib.Path('/proc/self/comm').write_text(')\\nUid: 1 1')\n"
        "print(flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = look(process.pid)
        process.communicate()

    assert found is not None
    assert {os.geteuid()} == found.uids
