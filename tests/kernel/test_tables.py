"""Tables of descriptors are remembered as long as nobody can have changed them, and no longer."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps import inode
from tests.sleepers import IN_A_CHILD, IN_ANOTHER_THREAD, IN_ITS_FIRST_THREAD, receiver, threads, unix_pair, wait_asleep
from tunsplit.kernel import descriptors, tables
from tunsplit.kernel.tables import Tables

BUSY = "import os; os.write(1, b'\\n')\nwhile True: pass"


@pytest.fixture
def known():
    with Tables() as found:
        yield found


def read(known, pid, inodes=()):
    """A table as it is now."""
    *_, (_, table) = known.read(pid, inodes)
    return table


def test_who_sleeps_is_remembered(known, apps):
    with socket.socket() as sock:
        pid = apps.start(sock)
        assert known.unchanged(pid) is None
        wait_asleep(pid)
        table = read(known, pid)

        assert {inode(sock): str(sock.fileno())} == table.sockets
        assert table is known.unchanged(pid)
        assert {"tables": 1, "table_sockets": 1, "table_files": 1} == known.statistics()


@pytest.mark.parametrize("start", [IN_ITS_FIRST_THREAD, IN_ANOTHER_THREAD], ids=["first thread", "another"])
def test_whoever_has_received_a_descriptor_is_read_again(known, apps, start):
    ours, theirs = unix_pair()
    with ours, theirs:
        pid = receiver(apps, theirs, start)
        for _ in range(10):
            wait_asleep(pid)
            before = read(known, pid)
            assert before is known.unchanged(pid)
            with socket.socket() as sock:
                number = inode(sock)
                socket.send_fds(ours, [b"x"], [sock.fileno()])
            ours.recv(1)

            assert known.unchanged(pid) is None
            assert {number} == read(known, pid).sockets.keys() - before.sockets.keys()


def test_a_new_thread_does_not_go_unnoticed(known, apps):
    start = "os.write(1, b'\\n'); own.recv(1); threading.Thread(target=receive).start(); own.send(b'!')"
    ours, theirs = unix_pair()
    with ours, theirs, socket.socket() as sock:
        pid = receiver(apps, theirs, start)
        wait_asleep(pid)
        assert read(known, pid) is known.unchanged(pid)
        ours.send(b"x")
        ours.recv(1)
        wait_asleep(pid)
        read(known, pid)
        socket.send_fds(ours, [b"x"], [sock.fileno()])
        ours.recv(1)

        assert 2 == len(threads(pid))
        assert known.unchanged(pid) is None
        assert inode(sock) in read(known, pid).sockets


def test_who_runs_is_never_remembered(known, apps):
    pid = apps.launch([sys.executable, "-c", BUSY])
    for _ in range(20):
        assert isinstance(read(known, pid), tables.Table)
        assert known.unchanged(pid) is None


def test_a_parent_whose_child_changes_its_table_is_read_with_it(processes, apps):
    """clone(2) with CLONE_FILES: the parent sleeps, and has a socket more."""
    ours, theirs = unix_pair()
    with ours, theirs, socket.socket() as sock:
        pid = receiver(apps, theirs, IN_A_CHILD)
        (child,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        wait_asleep(pid)
        list(processes.find_holders({inode(sock)}))
        socket.send_fds(ours, [b"x"], [sock.fileno()])
        ours.recv(1)
        *_, found = processes.find_holders({inode(sock)})
        os.kill(child, 9)

        assert {os.getpid(), pid, child} == {holder.process.pid for holder in found[inode(sock)]}


def test_who_has_ended_is_forgotten(known):
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    wait_asleep(process.pid)
    read(known, process.pid)
    process.communicate()

    assert known.unchanged(process.pid) is None
    assert [] == list(known.read(process.pid, ()))
    assert {"tables": 0, "table_sockets": 0, "table_files": 0} == known.statistics()


def test_who_is_not_there_any_more_is_forgotten(known, apps):
    pids = [apps.start() for _ in range(2)]
    for pid in pids:
        wait_asleep(pid)
        read(known, pid)
    known.retain(pids[:1])

    assert (True, None) == (known.unchanged(pids[0]) is not None, known.unchanged(pids[1]))
    assert 1 == known.statistics()["table_files"]


def test_a_large_table_is_known_well_enough_for_a_while(known, apps, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 4)
    with socket.socket() as sock, sock.dup() as again:
        small, large = apps.start(), apps.launch([sys.executable, "-c", BUSY], sock, again)
        read(known, small)
        table = read(known, large)

        assert (None, None) == (known.unchanged(large), known.lately(small))
        assert table is known.lately(large)
        monkeypatch.setattr(tables, "LATELY_S", -1.0)
        assert known.lately(large) is None


def test_a_large_table_of_one_who_has_ended_is_nobodys(known, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 0)
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    read(known, process.pid)
    assert known.lately(process.pid) is not None
    process.communicate()

    assert known.lately(process.pid) is None


def test_a_socket_that_only_a_large_table_has_is_found_there(processes, apps, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 0)
    ours, theirs = unix_pair()
    with ours, theirs:
        pid = receiver(apps, theirs)
        for _ in range(2):
            with socket.socket() as sock:
                number = inode(sock)
                list(processes.find_holders({number}))  # everybody is known lately
                socket.send_fds(ours, [b"x"], [sock.fileno()])
            ours.recv(1)
            *_, found = processes.find_holders({number})

            assert [pid] == [holder.process.pid for holder in found[number]]


def test_a_pass_for_live_flows_reads_large_tables_too(processes, apps, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 0)
    ours, theirs = unix_pair()
    with ours, theirs, socket.socket() as sock:
        pid = receiver(apps, theirs)
        list(processes.find_holders({inode(sock)}))
        socket.send_fds(ours, [b"x"], [sock.fileno()])
        ours.recv(1)
        (held,) = filter(None, processes.scan_all({inode(sock)}))

        assert {os.getpid(), pid} == {one for one, _ in held[1]}


# Bounds, and kernels that tell less


@pytest.mark.parametrize(
    ("bound", "most"), [("MOST_FILES", 0), ("MOST_THREADS", 0), ("MOST_SOCKETS", 1), ("MOST_SOCKETS_OF_ONE", 1)]
)
def test_what_is_remembered_is_bounded(apps, monkeypatch, bound, most):
    monkeypatch.setattr(tables, bound, most)
    with Tables() as known, socket.socket() as one, socket.socket() as other:
        pid = apps.start(one, other)
        wait_asleep(pid)

        assert {inode(one), inode(other)} == read(known, pid, {inode(one), inode(other)}).sockets.keys()
        assert known.unchanged(pid) is None
        assert 0 == known.statistics()["table_sockets"]


@pytest.mark.parametrize("kind", ["does not count", "has no schedstat", "has no kcmp"])
def test_without_help_of_the_kernel_everybody_is_read(known, apps, monkeypatch, kind):
    if kind == "does not count":
        monkeypatch.setattr(os, "pread", lambda *_: b"0 0 0\n")
    elif kind == "has no schedstat":
        monkeypatch.setattr(tables, "SCHEDSTAT", "none")
    else:
        monkeypatch.setattr(descriptors, "NUMBER", None)
    with socket.socket() as sock:
        pid = apps.start(sock)
        wait_asleep(pid)

        assert {inode(sock)} == read(known, pid).sockets.keys()
        assert known.unchanged(pid) is None


# What is new


def test_a_socket_is_new_that_nobody_showed_when_he_was_last_read(known, apps):
    with socket.socket() as older:
        pid = apps.start(older)
        read(known, pid)
        with socket.socket() as newer:
            assert (False, True) == (known.is_new(inode(older)), known.is_new(inode(newer)))


@pytest.mark.parametrize("why", ["no room", "too many sockets", "too many threads", "shared"])
def test_nothing_is_new_while_somebody_is_not_remembered(known, apps, monkeypatch, why):
    with socket.socket() as sock:
        pid = apps.start(sock)
        read(known, pid)
        assert known.is_new(1)
        with monkeypatch.context() as patch:
            match why:
                case "no room":
                    patch.setattr(tables, "MOST_SOCKETS", 0)
                case "too many sockets":
                    patch.setattr(tables, "MOST_SOCKETS_OF_ONE", 1)
                case "too many threads":
                    patch.setattr(tables, "MOST_THREADS", 0)
                case "shared":
                    patch.setattr(descriptors, "share_table", lambda *_: None)
            read(known, pid)
            assert not known.is_new(1)
        read(known, pid)
        if why == "shared":  # the parent's has not been read since, either
            assert not known.is_new(1)
            read(known, os.getpid())
        assert known.is_new(1)


def test_who_is_gone_need_not_be_remembered(known, apps, monkeypatch):
    """Told by the list of all who are there, or found when he is read."""
    pid = apps.start()
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(tables, "MOST_THREADS", 0)
            read(known, pid)
        assert not known.is_new(1)
        known.retain([pid])
        assert not known.is_new(1)
        known.retain([])
        assert known.is_new(1)

    def read_file(*_):
        raise ProcessLookupError(errno.ESRCH, "")

    monkeypatch.setattr(tables, "MOST_THREADS", 0)
    read(known, pid)
    monkeypatch.setattr(tables, "read_file", read_file)
    assert [] == list(known.read(pid, ()))
    assert known.is_new(1)


def test_who_has_ended_is_nobody_who_is_not_remembered(known):
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    wait_asleep(process.pid)
    read(known, process.pid)
    process.communicate()

    assert known.unchanged(process.pid) is None
    assert not known.is_new(1)  # that nobody knows yet
    assert [] == list(known.read(process.pid, ()))
    assert known.is_new(1)
