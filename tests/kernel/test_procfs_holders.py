"""Holders of sockets, told by /proc: found at once, found by a search, and never one too few."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps import copy_of_cat, inode
from tunsplit.kernel import descriptors, newcomers, procfs

RETURNS_AT_ONCE = Path("/bin/true").resolve()


def sockets():
    return socket.socket(type=socket.SOCK_DGRAM)


def holders(processes, number):
    """Search to the end: the pids."""
    return [found.process.pid for found in found_by(processes.find_holders({number})).get(number, [])]


def found_by(search):
    """What a search comes to."""
    *steps, found = search
    assert not any(steps)
    return found


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
        steps = list(processes.find_holders({inode(sock)}))
    assert steps.count(None) > 5


def test_a_process_born_during_the_search_is_looked_at(processes, apps, monkeypatch):
    monkeypatch.setattr(procfs, "PAUSE", 1)
    with sockets() as sock:
        search = processes.find_holders({inode(sock)})
        assert next(search) is None
        child = apps.start(sock)
        assert {os.getpid(), child} == {found.process.pid for found in found_by(search)[inode(sock)]}


# One pass for many sockets


def scanned(processes, *numbers):
    """What a pass finds: pids by inode, of those that somebody holds."""
    passed = [one for one in processes.scan_all(set(numbers)) if one is not None]
    assert len({number for number, _ in passed}) == len(passed)
    return {number: {pid for pid, _ in keys} for number, keys in passed}


def test_a_pass_finds_all_holders_of_all_sockets(processes, apps):
    with sockets() as shared, sockets() as ours, sockets() as closed:
        theirs = sockets()
        numbers = [inode(one) for one in (shared, ours, theirs, closed)]
        closed.close()
        first, second = apps.start(shared), apps.hold(theirs)
        expected = [{os.getpid(), first}, {os.getpid()}, {second}]
        assert dict(zip(numbers, expected, strict=False)) == scanned(processes, *numbers)


def test_all_sockets_of_one_process_are_told(processes, apps):
    sock, other = sockets(), sockets()
    numbers = {inode(sock), inode(other)}
    pid = apps.hold(sock, other)
    with sockets() as not_its_own:
        assert numbers <= processes.sockets_of(pid)
        assert inode(not_its_own) not in processes.sockets_of(pid)


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
        assert [] == list(descriptors.sockets(directory, "fd"))
    finally:
        os.close(directory)
    assert descriptors.children(process.pid) is None
    assert descriptors.search(f"/proc/{process.pid}/fd", "x") is None


# What is known from before


def test_a_holder_that_was_found_is_found_again_at_once(processes, apps):
    sock = sockets()
    number = inode(sock)
    pid = apps.hold(sock)
    assert processes.recheck(number) is None
    holders(processes, number)
    assert pid == processes.recheck(number).process.pid


@pytest.mark.parametrize("already_open", [0, 20, 200])
@pytest.mark.parametrize("newest_first", [True, False])
def test_the_next_socket_of_a_known_process_is_found_at_once(processes, already_open, newest_first):
    processes._newest_first = newest_first  # noqa: SLF001 -- whichever it was last
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
        processes.newcomers.note(os.getpid())
        processes.newcomers.note(apps.start())
        assert os.getpid() == processes.newcomer(number).process.pid
        assert processes.recheck(number) is None


def test_a_newcomer_of_another_user_is_not_looked_at(processes):
    """Who has created a socket, and is not root, has it still, unless it was passed."""
    with sockets() as sock:
        processes.newcomers.note(os.getpid())
        assert processes.newcomer(inode(sock), 65534) is None
        assert processes.newcomer(inode(sock), 0) is not None


def test_whoever_is_likely_to_have_the_next_socket_is_tried_first(processes, monkeypatch):
    """Of one who opens flow after flow, the newest; of several who take turns, the oldest."""
    tried: list[str] = []

    def read_link(path):
        tried.append(path)
        return f"socket:[{path.split('/')[2]}]"

    monkeypatch.setattr(procfs, "read_link", read_link)
    monkeypatch.setattr(processes, "_confirm_alone", lambda *_: None)
    processes._recent = dict.fromkeys(range(1, 9), "3")  # noqa: SLF001 -- as eight flows leave it, of 8 the last
    lengths = []
    for holder in (8, 8, 1, 1, 2, 8, 8):
        tried.clear()
        processes.recheck(holder)
        lengths.append(len(tried))
    assert [1, 1, 8, 1, 2, 8, 1] == lengths
    processes.ended(8)
    tried.clear()
    processes.recheck(8)
    assert 7 == len(tried)


def test_only_the_latest_newcomers_are_looked_at(processes, apps):
    with sockets() as sock:
        processes.newcomers.note(os.getpid())
        for pid in range(1, newcomers.LATEST + 1):
            processes.newcomers.note(2**22 + pid)
        assert processes.newcomer(inode(sock)) is None


def test_who_came_a_while_ago_is_no_newcomer(processes, monkeypatch):
    with sockets() as sock:
        processes.newcomers.note(os.getpid())
        monkeypatch.setattr(newcomers, "LATE_S", -1.0)
        assert processes.newcomer(inode(sock)) is None


def test_what_events_tell_of_a_process_is_not_read_again(processes, monkeypatch):
    with sockets() as one:
        holders(processes, inode(one))
        told = processes.recheck(inode(one)).process._replace(uid=12345, parent=0)
        processes.recall = lambda pid: told if pid == os.getpid() else None
        monkeypatch.setattr(procfs.Processes, "read", None)
        with sockets() as other:
            assert told == processes.recheck(inode(other)).process


def test_but_its_heirs_are_looked_at(processes, apps):
    """Whoever it is said to have, or that there is no telling."""
    with sockets() as one:
        holders(processes, inode(one))
        known = processes.recheck(inode(one)).process
        processes.recall = lambda _: known
        heirs: list[int] = []
        processes.heirs = lambda _: heirs
        with sockets() as other:
            assert processes.recheck(inode(other)) is not None
            heirs.append(apps.start(other))
            assert processes.recheck(inode(other)) is None
        processes.heirs = lambda _: None
        assert processes.recheck(inode(one)) is None


def test_a_process_that_has_shared_a_socket_is_always_searched_for(processes, apps):
    with sockets() as shared, sockets() as own:
        apps.start(shared)
        holders(processes, inode(shared))
        holders(processes, inode(own))
        assert processes.recheck(inode(own)) is None


def test_a_socket_that_a_child_holds_too_is_searched_for(processes, apps):
    with sockets() as sock:
        number = inode(sock)
        holders(processes, number)
        apps.start(sock)
        assert processes.recheck(number) is None
        assert 2 == len(holders(processes, number))


@pytest.mark.parametrize("who", ["parent", "sibling"])
def test_a_socket_that_a_process_may_have_by_birth_is_searched_for(processes, apps, who):
    """That it is known to be alone with another one tells nothing of those that it was born with."""
    with sockets() as sock, sockets() as other:
        number, other_number = inode(sock), inode(other)
        sharing = {apps.start(sock, other)} | ({apps.start(sock)} if who == "sibling" else {os.getpid()})
        other.close()
        if who == "sibling":
            sock.close()
        assert 1 == len(holders(processes, other_number))
        assert processes.recheck(other_number) is not None
        assert processes.recheck(number) is None
        assert sharing == set(holders(processes, number))


def test_what_is_known_of_a_process_is_not_believed_of_the_next_with_its_pid(processes, monkeypatch):
    with sockets() as sock:
        number = inode(sock)
        holders(processes, number)
        me = processes.recheck(number).process
        processes.recall = lambda _: me._replace(start_time=me.start_time + 1)
        assert processes.recheck(number) is None
        processes._alone[me.pid, me.start_time + 1] = True  # noqa: SLF001 -- as another search leaves it
        assert processes.recheck(number) is None
        with sockets() as other:  # the table that was read last is the other's
            assert processes.recheck(inode(other)) is None


def test_a_parent_of_too_many_is_searched_for(processes, apps, monkeypatch):
    monkeypatch.setattr(procfs, "HEIRS", 0)
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
