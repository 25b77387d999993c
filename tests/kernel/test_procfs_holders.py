"""Holders of sockets, told by /proc: found at once, found by a search, and never one too few."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps import inode
from tests.kernel.searches import found_by, holders, sockets
from tunsplit.kernel import descriptors, procfs

RETURNS_AT_ONCE = Path("/bin/true").resolve()


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
