"""Holders of sockets and what they are, told by /proc."""

import os
import socket
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.apps import CAT, copy_of_cat, inode, running_apps
from tunsplit.errors import KernelError
from tunsplit.kernel import descriptors, procfs, procpid
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.procpid import Stat, identify, parse_cgroup, parse_cmdline, parse_stat, resolve

NOBODY = 65534
RETURNS_AT_ONCE = Path("/bin/true").resolve()


@pytest.fixture
def apps():
    with running_apps() as started:
        yield started


@pytest.fixture
def processes():
    with closing(Processes()) as found:
        yield found


def sockets():
    return socket.socket(type=socket.SOCK_DGRAM)


def holders(processes, number):
    """Search to the end: the pids."""
    return [found.process.pid for found in processes.find_holders(number) if found is not None]


# Holders


def test_the_holder_of_a_socket_is_found(processes, apps):
    sock = sockets()
    number = inode(sock)
    pid = apps.hold(sock)
    assert [pid] == holders(processes, number)


def test_a_socket_shared_by_fork_has_every_holder(processes, apps):
    with sockets() as sock:
        pids = {os.getpid(), apps.start(sock), apps.start(sock)}
        assert pids == set(holders(processes, inode(sock)))


def test_a_socket_sent_to_another_program_has_both_holders(processes, apps):
    ours, theirs = socket.socketpair()
    receive = f"import socket; s = socket.socket(fileno={theirs.fileno()}); held = socket.recv_fds(s, 1, 1)"
    with ours, theirs, sockets() as sock:
        socket.send_fds(ours, [b"x"], [sock.fileno()])
        assert {os.getpid(), apps.python(receive, theirs)} == set(holders(processes, inode(sock)))


def test_nobody_holds_a_closed_socket(processes):
    with sockets() as sock:
        number = inode(sock)
        assert [os.getpid()] == holders(processes, number)
    assert [] == holders(processes, number)
    assert processes.recheck(number) is None


def test_a_search_gives_way(processes, monkeypatch):
    monkeypatch.setattr(procfs, "PAUSE", 5)
    with sockets() as sock:
        steps = list(processes.find_holders(inode(sock)))
    assert steps.count(None) > 5


def test_a_process_born_during_the_search_is_looked_at(processes, apps, monkeypatch):
    monkeypatch.setattr(procfs, "PAUSE", 1)
    with sockets() as sock:
        search = processes.find_holders(inode(sock))
        assert next(found for found in search if found is not None).process.pid == os.getpid()
        child = apps.start(sock)
        assert [child] == [found.process.pid for found in search if found is not None]


# One pass for many sockets


def scanned(processes, *numbers):
    """What a pass finds: pids by inode."""
    passed = [one for one in processes.scan_all(set(numbers)) if one is not None]
    assert len(numbers) == len(passed)
    return {number: {pid for pid, _ in keys} for number, keys in passed}


def test_a_pass_finds_all_holders_of_all_sockets(processes, apps):
    with sockets() as shared, sockets() as ours, sockets() as closed:
        theirs = sockets()
        numbers = [inode(one) for one in (shared, ours, theirs, closed)]
        closed.close()
        first, second = apps.start(shared), apps.hold(theirs)
        expected = [{os.getpid(), first}, {os.getpid()}, {second}, set()]
        assert dict(zip(numbers, expected, strict=True)) == scanned(processes, *numbers)


def test_a_pass_names_processes_by_pid_and_start_time(processes):
    with sockets() as sock:
        key = (os.getpid(), processes.read(os.getpid()).start_time)
        assert (inode(sock), frozenset({key})) == list(processes.scan_all({inode(sock)}))[-1]


def test_a_pass_gives_way(processes, monkeypatch):
    monkeypatch.setattr(procfs, "PAUSE", 5)
    assert list(processes.scan_all(set())).count(None) > 5


def test_after_a_pass_nobody_takes_a_socket_for_its_first_holders_alone(processes, apps):
    """Received over a unix socket by nobody of the family, which a recheck cannot see."""
    ours, theirs = socket.socketpair()
    receive = (
        f"import os, socket; s = socket.socket(fileno={theirs.fileno()}); held = socket.recv_fds(s, 1, 1)[1][0];"
        "os.dup2(held, 200); os.close(held)"
    )
    with ours, theirs, sockets() as sock:
        number = inode(sock)
        holders(processes, number)
        assert processes.recheck(number) is not None
        socket.send_fds(ours, [b"x"], [sock.fileno()])
        other = apps.python(receive, theirs)
        assert processes.recheck(number) is not None
        assert {number: {os.getpid(), other}} == scanned(processes, number)
        assert processes.recheck(number) is None


def test_a_pass_corrects_who_is_remembered(processes, apps):
    sock = sockets()
    number = inode(sock)
    holders(processes, number)
    other = apps.hold(sock)
    assert {number: {other}} == scanned(processes, number)
    assert 0 == processes.statistics()["owners"]


# Tables that threads have for themselves

OWN_TABLE = """
import ctypes, os, threading
unshared, done = threading.Event(), threading.Event()
def alone():
    assert 0 == ctypes.CDLL(None).unshare(0x400)  # CLONE_FILES
    unshared.set()
    done.wait()
threading.Thread(target=alone, daemon=True).start()
unshared.wait()
"""


@pytest.fixture(params=[True, False], ids=["kcmp", "no kcmp"])
def kcmp(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(descriptors, "NUMBER", None)


def test_a_socket_that_only_a_thread_holds_is_found(processes, apps, kcmp):
    sock = sockets()
    number = inode(sock)
    pid = apps.python(f"{OWN_TABLE}\nos.close({sock.fileno()})", sock)
    sock.close()
    assert [pid] == holders(processes, number)
    assert pid == processes.recheck(number).process.pid
    assert {number: {pid}} == scanned(processes, number)


def test_a_thread_and_another_process_both_hold_it(processes, apps, kcmp):
    with sockets() as sock:
        pid = apps.python(f"{OWN_TABLE}\nos.close({sock.fileno()})", sock)
        assert {inode(sock): {os.getpid(), pid}} == scanned(processes, inode(sock))


def test_threads_that_share_their_table_are_not_looked_at(processes, apps):
    pid = apps.python("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()")
    directory = os.open(f"/proc/{pid}", os.O_PATH)
    try:
        assert [] == descriptors.tables_of_threads(directory, pid)
    finally:
        os.close(directory)


def test_a_process_whose_first_thread_has_ended_still_holds_its_sockets(processes, apps):
    code = """
import ctypes, os, platform, threading, time
def last():
    while open(f"/proc/{os.getpid()}/stat").read().split()[2] != "Z":
        time.sleep(0.001)
    os.write(1, b"\\n")
    os.read(0, 1)
    os.read(0, 1)
    os._exit(0)
threading.Thread(target=last).start()
ctypes.CDLL(None).syscall({"x86_64": 60}.get(platform.machine(), 93), 0)  # exit, of this thread alone
"""
    sock = sockets()
    number = inode(sock)
    pid = apps.launch([sys.executable, "-c", code.replace("\\\\", "\\")], sock)
    sock.close()
    assert {number: {pid}} == scanned(processes, number)
    assert [pid] == holders(processes, number)


def test_a_socket_that_a_child_of_another_thread_holds_too_is_searched_for(processes, apps):
    sock = sockets()
    number = inode(sock)
    fork = """
import os, threading
forked = threading.Event()
ended, lives = os.pipe()
def fork():
    if not (child := os.fork()):
        os.close(lives)
        os.read(ended, 1)
        os._exit(0)
    forked.set()
    os.waitpid(child, 0)
threading.Thread(target=fork, daemon=True).start()
forked.wait()
"""
    pid = apps.python(fork, sock)
    sock.close()
    processes._remember(number, [procfs.Holder(processes.read(pid), str(sock_number(pid, number)))])  # noqa: SLF001 -- as a search leaves it
    assert processes.recheck(number) is None
    assert 2 == len(holders(processes, number))


def sock_number(pid, number):
    return next(path.name for path in Path(f"/proc/{pid}/fd").iterdir() if f"socket:[{number}]" == str(path.readlink()))


def test_nothing_is_told_of_a_process_that_is_gone(processes):
    process = subprocess.Popen([RETURNS_AT_ONCE], stdin=subprocess.PIPE)
    directory = os.open(f"/proc/{process.pid}", os.O_PATH)
    try:
        process.communicate()
        assert [] == descriptors.tables_of_threads(directory, process.pid)
        assert [] == list(descriptors.held(directory, "fd", {1}))
    finally:
        os.close(directory)
    assert descriptors.children(process.pid) is None
    assert (None, 0) == descriptors.search(f"/proc/{process.pid}/fd", "x")


# What is known from before


def test_a_holder_that_was_found_is_found_again_at_once(processes, apps):
    sock = sockets()
    number = inode(sock)
    pid = apps.hold(sock)
    assert processes.recheck(number) is None
    holders(processes, number)
    assert pid == processes.recheck(number).process.pid


@pytest.mark.parametrize("already_open", [0, 20, 200])
def test_the_next_socket_of_a_known_process_is_found_at_once(processes, already_open):
    others = [sockets() for _ in range(already_open)]
    with sockets() as first:
        holders(processes, inode(first))
    with sockets() as second, sockets() as third:
        assert os.getpid() == processes.recheck(inode(second)).process.pid
        assert os.getpid() == processes.recheck(inode(third)).process.pid
    for one in others:
        one.close()


def test_many_known_processes_take_turns(processes, apps):
    each = {}
    for _ in range(procfs.RECENT):
        sock = sockets()
        number = inode(sock)
        each[number] = apps.hold(sock)
        holders(processes, number)
    assert each == {number: processes.recheck(number).process.pid for number in each}


def test_a_newcomer_is_found_without_a_search(processes, apps):
    """It may be gone before a search has come to it. Who else holds the socket, the search has to find."""
    with sockets() as sock:
        number = inode(sock)
        assert processes.newcomer(number) is None
        processes.expect(os.getpid())
        processes.expect(apps.start())
        assert os.getpid() == processes.newcomer(number).process.pid
        assert processes.recheck(number) is None


def test_only_the_latest_newcomers_are_looked_at(processes, apps):
    with sockets() as sock:
        processes.expect(os.getpid())
        for pid in range(1, procfs.NEWCOMERS + 1):
            processes.expect(2**22 + pid)
        assert processes.newcomer(inode(sock)) is None


def test_a_process_that_has_shared_a_socket_is_always_searched_for(processes, apps):
    with sockets() as shared, sockets() as own:
        apps.start(shared)
        holders(processes, inode(shared))
        holders(processes, inode(own))
        assert processes.recheck(inode(own)) is None


@pytest.mark.parametrize("who", ["child", "parent"])
def test_a_socket_that_a_relative_holds_too_is_searched_for(processes, apps, who):
    with sockets() as sock:
        number = inode(sock)
        if who == "child":
            holders(processes, number)
            apps.start(sock)
        else:
            other = sockets()
            child = apps.start(sock, other)
            other_number = inode(other)
            other.close()
            assert [child] == holders(processes, other_number)  # known to be alone with that one
            assert processes.recheck(other_number) is not None
        assert processes.recheck(number) is None
        assert 2 == len(holders(processes, number))


def test_a_parent_of_too_many_is_searched_for(processes, apps, monkeypatch):
    monkeypatch.setattr(procfs, "RELATIVES", 0)
    apps.start()
    with sockets() as sock:
        holders(processes, inode(sock))
        assert processes.recheck(inode(sock)) is None


def test_a_holder_that_runs_another_program_now_is_shown_with_it(processes, apps, tmp_path):
    sock = sockets()
    number = inode(sock)
    other = copy_of_cat(tmp_path / "other")
    switch = tmp_path / "switch"
    os.mkfifo(switch)
    pid = apps.launch(["sh", "-c", f"echo; read line < {switch}; exec {other}"], sock)
    sock.close()
    assert [pid] == holders(processes, number)
    switch.write_text("\n")
    while processes.read(pid).executable.path != str(other):
        os.sched_yield()
    assert str(other) == processes.recheck(number).process.executable.path


def test_caches_are_bounded(processes, monkeypatch):
    monkeypatch.setattr(procfs, "CACHED", 3)
    for _ in range(5):
        with sockets() as sock:
            holders(processes, inode(sock))
    statistics = processes.statistics()
    assert (5, 3) == (statistics["scanned"], statistics["owners"])


# What a process is


def test_a_process_is_read(processes, apps):
    pid = apps.start(uid=NOBODY)
    process = processes.read(pid)
    assert (pid, os.getpid(), NOBODY, str(CAT)) == (process.pid, process.parent, process.uid, process.executable.path)
    assert process.executable.identity == process.executable.path_identity == identify(str(CAT))
    assert (False, True) == (process.is_kernel, process.is_own_user_namespace)
    assert process.start_time >= processes.read(os.getpid()).start_time


# What is read only if rules ask for it


def test_a_command_line_is_read_if_it_is_asked_for(processes, apps):
    pid = apps.python("'a b'")
    assert processes.read(pid).cmdline is None
    processes.keys = frozenset({"cmdline"})
    assert f"{sys.executable} -c 'a b'\n" in processes.read(pid).cmdline


def test_a_long_command_line_is_cut(processes, apps):
    processes.keys = frozenset({"cmdline"})
    pid = apps.python("#" * 10000)
    assert procpid.CMDLINE == len(processes.read(pid).cmdline)


def test_who_has_no_program_has_no_command_line(processes):
    processes.keys = frozenset({"cmdline"})
    assert processes.read(2).cmdline is None


@pytest.fixture
def cgroup(tmp_path):
    """A new cgroup of v2, wherever this host has them mounted, and its path in there."""
    subprocess.run(["mount", "-t", "cgroup2", "none", tmp_path], check=True)
    directory = tmp_path / f"ts{os.getpid()}"
    try:
        directory.mkdir()
        yield directory, f"/{directory.name}"  # to be asked for before `apps`, who live in it
        directory.rmdir()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.netns
def test_a_cgroup_is_read_if_it_is_asked_for_as_it_is_now(cgroup, processes, apps):
    directory, path = cgroup
    pid = apps.start()
    (directory / "cgroup.procs").write_text(str(pid))
    assert processes.read(pid).cgroup is None
    processes.keys = frozenset({"cgroup"})
    assert path == processes.read(pid).cgroup


def test_a_kernel_without_cgroups_has_none(processes, monkeypatch):
    read = procpid.read_file

    def without(path, *others):
        if path == "cgroup":
            raise FileNotFoundError
        return read(path, *others)

    monkeypatch.setattr(procpid, "read_file", without)
    processes.keys = frozenset({"cgroup"})
    assert processes.read(os.getpid()).cgroup is None


def test_there_is_no_such_process(processes):
    process = subprocess.Popen([RETURNS_AT_ONCE])
    process.wait()
    assert processes.read(process.pid) is None


def test_a_zombie_has_no_program(processes):
    process = subprocess.Popen([RETURNS_AT_ONCE])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert processes.read(process.pid).executable is None
    process.wait()


def test_a_kernel_thread_has_no_program_and_says_so(processes):
    kthreadd = processes.read(2)
    assert (True, None) == (kthreadd.is_kernel, kthreadd.executable)


def test_a_copy_is_another_file(processes, apps, tmp_path):
    copy = copy_of_cat(tmp_path / "cat")
    executable = processes.read(apps.start(program=copy)).executable
    assert (str(copy), identify(str(copy)), False) == (executable.path, executable.identity, executable.deleted)
    assert identify(str(CAT)) != executable.identity


@pytest.mark.parametrize("replaced", [False, True])
def test_a_program_that_was_deleted_or_upgraded_keeps_its_path(processes, apps, tmp_path, replaced):
    program = copy_of_cat(tmp_path / "program")
    before = identify(str(program))
    pid = apps.start(program=program)
    if replaced:
        copy_of_cat(tmp_path / "new").rename(program)
    else:
        program.unlink()
    executable = processes.read(pid).executable
    assert (str(program), True, before) == executable[:3]
    assert identify(str(program)) == executable.path_identity
    assert replaced is (executable.path_identity is not None)


def test_a_program_may_be_called_deleted(processes, apps, tmp_path):
    program = copy_of_cat(tmp_path / "program (deleted)")
    executable = processes.read(apps.start(program=program)).executable
    assert (str(program), False) == executable[:2]
    assert executable.identity == executable.path_identity


@pytest.mark.netns
def test_a_path_of_another_mount_namespace_is_seen_through(processes, apps, tmp_path):
    shown = copy_of_cat(tmp_path / "shown")
    pid = apps.launch(["unshare", "--mount", "sh", "-c", f"mount --bind {CAT} {shown} && exec {shown}"])
    executable = processes.read(pid).executable
    assert (str(shown), False, identify(str(CAT)), identify(str(shown))) == executable


@pytest.mark.netns
def test_another_user_namespace_is_noticed(processes, apps):
    pid = apps.launch(["unshare", "--user", "--map-root-user", str(CAT)])
    assert not processes.read(pid).is_own_user_namespace


def test_what_a_thread_calls_itself_changes_nothing(processes, apps):
    code = "from pathlib import Path; Path('/proc/self/comm').write_text('firefox')"
    assert "python" in processes.read(apps.python(code)).executable.path


# Parsers

comms = st.binary(max_size=64).filter(lambda comm: b"\0" not in comm)


@given(st.integers(1, 2**22), comms, st.integers(0, 2**22), st.booleans(), st.integers(0, 2**63))
def test_any_name_may_stand_in_a_stat_line(pid, comm, parent, is_kernel, start_time):
    flags = 0x00400140 | (0x00200000 if is_kernel else 0)
    tail = f" S {parent} 1 1 0 -1 {flags} 0 0 0 0 0 0 0 0 20 0 1 0 {start_time} 0 0 18446744073709551615 0\n"
    assert Stat(parent, is_kernel, start_time) == parse_stat(b"%d (%b)" % (pid, comm) + tail.encode())


@pytest.mark.parametrize(
    ("text", "cmdline"),
    [
        (b"python3\0/srv/x.py\0", "python3 /srv/x.py"),
        (b"a\0\0b\0", "a  b"),
        (b"a b\0", "a b"),
        (b"nginx: worker process\0\0\0\0", "nginx: worker process"),
        (b"no end", "no end"),
        (b"\xff\0", "\udcff"),
        (b"", ""),
    ],
)
def test_a_command_line_is_its_arguments_joined_by_spaces(text, cmdline):
    assert cmdline == parse_cmdline(text)


@given(st.binary())
def test_any_bytes_are_a_command_line(text):
    assert "\0" not in parse_cmdline(text)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (b"0::/user.slice/x.scope\n", "/user.slice/x.scope"),
        (b"0::/\n", "/"),
        (b"1:name=systemd:/system.slice/x.service\n0::/system.slice/x.service\n", "/system.slice/x.service"),
        (b"9:name=systemd:/system.slice/x.service\n2:cpu,cpuacct:/other\n0::/\n", "/system.slice/x.service"),
        (b"9:name=systemd:/system.slice/x.service\n2:cpu:/other\n", "/system.slice/x.service"),
        (b"9:name=systemd:/a\n0::/b\n", "/b"),
        (b"2:cpu:/other\n0::/\n", "/"),
        (b"2:cpu:/other\n", None),
        (b"0::/a:b::c\n", "/a:b::c"),
        (b"0::/../x.service\n", "/../x.service"),
        (b"", None),
    ],
)
def test_a_cgroup_is_the_path_in_v2_or_systemds(text, path):
    assert path == parse_cgroup(text)


@given(st.binary())
def test_any_bytes_name_a_cgroup_or_none(text):
    path = parse_cgroup(text)
    assert path is None or "\n" not in path


@pytest.mark.parametrize("comm", [b"a) R 1", b"((", b") S 1 (", b"a\nb", b""])
def test_a_name_cannot_forge_its_parent(comm):
    tail = b" S 77 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0\n"
    assert Stat(77, False, 4711) == parse_stat(b"5 (" + comm + b")" + tail)


@given(st.binary())
def test_what_is_no_stat_line_raises_one_error_only(text):
    with suppress(ValueError):
        parse_stat(text)


def test_a_stat_line_that_is_none_is_a_kernel_error(processes, monkeypatch):
    monkeypatch.setattr(procpid, "read_file", lambda *_: b"nonsense")
    with pytest.raises(KernelError, match=f"/proc/{os.getpid()}/stat"):
        processes.read(os.getpid())


# Paths


def test_a_symlink_is_followed(tmp_path):
    program = copy_of_cat(tmp_path / "program")
    (tmp_path / "link").symlink_to(program)
    assert identify(str(program)) == identify(str(tmp_path / "link"))
    assert str(program) == resolve(str(tmp_path / "link"))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/etc/passwd/x", "with\0zero"])
def test_what_is_not_there_has_no_identity(path):
    assert identify(path) is None
