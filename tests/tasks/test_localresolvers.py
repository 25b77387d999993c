"""Who is a local resolver: by sockets on port 53, in a network namespace of the test's own."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.apps import own_network
from tests.fakes.judges import Named
from tunsplit.engine.policy import Mode, Policy, Verdict
from tunsplit.engine.rules import Rule
from tunsplit.errors import ConfigError, KernelError
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.process import Executable, FileIdentity
from tunsplit.tasks import localresolvers
from tunsplit.tasks.localresolvers import LocalResolvers

pytestmark = pytest.mark.netns

BINDS = """
import os, socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((sys.argv[1], int(sys.argv[2])))
tcp = socket.create_server(("::1", int(sys.argv[2])), family=socket.AF_INET6)
child = os.fork()
if not child:
    udp.close(), tcp.close()
    print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def resolvers():
    with own_network(), SockDiag() as diag, Processes() as processes:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield LocalResolvers(diag, processes)


@contextmanager
def binding(address="127.0.0.53", port=53):
    """A process that takes questions there, and its fork that has closed the sockets; gives both pids."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", BINDS, address, str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        assert program.stdout is not None
        yield program.pid, int(program.stdout.readline())


def read(pid):
    with Processes() as processes:
        return processes.read(pid)


def sockets_of(pid):
    with Processes() as processes:
        return processes.sockets_of(pid)


def test_who_holds_port_53_is_one_and_its_fork_is(resolvers):
    with binding() as (pid, fork), binding("127.0.0.1", 54) as (other, _):
        assert resolvers.is_resolver(read(pid))
        assert resolvers.is_resolver(read(fork))
        assert not resolvers.is_resolver(read(other))
        (one,) = resolvers.listed()
        name = os.path.basename(os.path.realpath(sys.executable))  # noqa: PTH119  as text
        assert f"{name} (pid {pid}, 127.0.0.53, ::1)" == one.words
    assert () == resolvers.listed()


def test_who_has_no_sockets_but_those_that_it_asks_by_is_none(resolvers, monkeypatch):
    """Nor does that cost a dump, the first time. With one more it may be a resolver already."""
    dumps: list[int] = []
    find_bound = SockDiag.find_bound

    def counted(diag, port):
        dumps.append(port)
        return find_bound(diag, port)

    monkeypatch.setattr(SockDiag, "find_bound", counted)
    with binding("127.0.0.1", 54) as (pid, _), binding() as (other, _):
        process, held = read(pid), sockets_of(pid)
        assert 2 == len(held)
        assert not resolvers.is_resolver(process, held)
        assert [] == dumps
        assert not resolvers.is_resolver(process, held)
        assert [53] == dumps
        assert resolvers.is_resolver(read(other), list(sockets_of(other))[:1])
        assert [53] * 2 == dumps
        monkeypatch.setattr(resolvers._processes, "sockets_of", None)  # noqa: SLF001  its answer is known now
        assert not resolvers.is_resolver(process, held)


def test_who_becomes_one_later_is_seen_by_the_next_dump(resolvers):
    with binding() as (pid, _):
        process = read(pid)
        assert not resolvers.is_resolver(process, sockets_of(pid))  # as before it bound the port
        assert resolvers.is_resolver(process, {1})


def test_a_fork_of_a_resolver_has_no_other_sockets_either(resolvers):
    """And its parent may have bound the port since anybody looked."""
    with binding("127.0.0.1", 54) as (other, _):
        assert not resolvers.is_resolver(read(other))
    with binding() as (_, fork):
        assert resolvers.is_resolver(read(fork), {1})


def test_our_own_stub_is_none(resolvers):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 53))
        assert not resolvers.is_resolver(read(os.getpid()))
        assert () == resolvers.listed()


@pytest.mark.parametrize(
    ("took_s", "believed_s"), [(0.0005, localresolvers.FRESH_S), (0.004, 0.2), (1.0, localresolvers.STALE_S)]
)
def test_a_dump_is_believed_the_longer_the_dearer_it_is(resolvers, monkeypatch, took_s, believed_s):
    """L32: of who was none a moment ago. It costs a fiftieth of the time, unless there are very many sockets."""
    clock, dumps = [100.0], []

    def find_bound(_diag, _port):
        clock[0] += took_s
        dumps.append(clock[0])
        return []

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(SockDiag, "find_bound", find_bound)
    me = read(os.getpid())._replace(pid=os.getppid())
    for passed_s in (0.0, believed_s * 0.9, believed_s * 0.2):
        clock[0] += passed_s
        assert not resolvers.is_resolver(me)
    assert 2 == len(dumps)


def test_a_new_process_is_never_judged_by_an_old_dump(resolvers):
    resolvers.listed()
    with binding() as (pid, _):
        assert resolvers.is_resolver(read(pid))


def test_services_without_the_port_are_known_by_name_if_they_are_root_s_and_managers_never(resolvers):
    def called(path, owner=0):
        file = FileIdentity(1, 1, owner)
        return read(os.getpid())._replace(pid=1 << 22, executable=Executable(path, False, file, file))

    assert resolvers.is_resolver(called("/usr/sbin/nscd"))
    assert resolvers.is_resolver(called("/usr/lib/systemd/systemd-resolved"))
    assert not resolvers.is_resolver(called("/tmp/nscd", owner=1000))
    assert not resolvers.is_resolver(called("/usr/lib/systemd/systemd"))
    assert not resolvers.is_resolver(called("/x")._replace(executable=None))


def test_a_rule_is_refused_for_what_it_covers_by_inheritance_too(resolvers):
    with binding() as (pid, _):
        own, path = (read(one).executable.path for one in (os.getpid(), pid))
        for rule in (Rule(1, path, (Named(path),)), Rule(1, own, (Named(own),))):
            with pytest.raises(ConfigError, match=rf"#1 .*: found a rule that covers .*\(pid {pid}, 127\.0\.0\.53"):
                resolvers.refuse_covering(Policy((rule,)))
        assert [pid] == [one.process.pid for one, _ in resolvers.covered(Policy((rule,)), lambda *_: [])]
        resolvers.refuse_covering(Policy((Rule(1, path, (Named(path),), force=True),)))
        resolvers.refuse_covering(Policy((Rule(1, "x", (Named("/nowhere"),)),)))
        resolvers.refuse_covering(Policy((rule,), Mode.INCLUDE))
        resolvers.refuse_covering(Policy(()))


def test_users_are_told_on_which_side_names_are_resolved(resolvers):
    with binding() as (pid, _):
        resolvers.listed()
        for mode, verdict, words in (
            (Mode.EXCLUDE, Verdict.TUNNEL, "in the name of excluded apps too: their names are resolved in the tunnel"),
            (Mode.INCLUDE, Verdict.TUNNEL, "in the name of apps that are not listed too"),
            (Mode.EXCLUDE, Verdict.UPLINK, "in the name of included apps too, whose names are so resolved outside"),
        ):
            (hint,) = resolvers.hints(mode, lambda _, verdict=verdict: verdict)
            assert words in hint
            assert f"pid {pid}" in hint


def look(resolvers):
    """Look once, as tasks/holders.py does; who has been told to have changed."""
    told: set[tuple[int, int]] = set()
    resolvers.on_change = told.update
    with Processes() as processes:
        inodes = resolvers.wanted_sockets()
        held = dict(filter(None, processes.scan_all(inodes))) if inodes else {}
    for _ in resolvers.take_holders(held):
        pass
    return {pid for pid, _ in told}


def test_who_becomes_one_or_ends_is_told(resolvers):
    assert set() == look(resolvers)
    with binding() as (pid, _):
        assert {pid} == look(resolvers)
        assert set() == look(resolvers)
    assert {pid} == look(resolvers)


def test_who_was_listed_for_somebody_else_first_is_told_all_the_same(resolvers):
    """What `status` or a switch has looked up is no news to the list, but live flows are to be judged by it."""
    with binding() as (pid, _):
        assert [pid] == [one.process.pid for one in resolvers.listed()]
        assert {pid} == look(resolvers)


def test_who_binds_the_port_during_a_look_is_not_taken_for_looked_at(resolvers):
    resolvers.wanted_sockets()
    with binding() as (pid, _):
        assert resolvers.is_resolver(read(pid))
        for _ in resolvers.take_holders({}):
            pass
        assert [pid] == [one.process.pid for one in resolvers.listed()]


def test_nobody_is_judged_where_nobody_can_look(resolvers, monkeypatch):
    """L21: whoever is asked about then is not guessed at."""
    resolvers.holders_unknown()
    monkeypatch.setattr(SockDiag, "find_bound", lambda *_: (_ for _ in ()).throw(KernelError("no sock_diag")))
    with pytest.raises(KernelError):
        resolvers.is_resolver(read(os.getpid())._replace(pid=1 << 22))
