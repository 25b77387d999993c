"""What it relies on that a process which has not run shows the same descriptors."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sleepers import IN_A_CHILD, IN_ANOTHER_THREAD, receiver, runs, threads, unix_pair, wait_asleep, wchan
from tunsplit.kernel.descriptors import share_table

BUSY = "import os; os.write(1, b'\\n')\nwhile True: pass"


def test_who_sleeps_is_not_counted_and_shows_what_he_waits_in(apps):
    pid = apps.start()
    wait_asleep(pid)
    before = runs(pid)
    assert 0 < before
    assert wchan(pid) not in ("", "0")
    assert before == runs(pid)


def test_who_runs_shows_no_place_to_wait_in(apps):
    pid = apps.launch([sys.executable, "-c", BUSY])
    assert {"0"} == {wchan(pid) for _ in range(100)}


def test_who_has_received_a_descriptor_has_been_counted(apps):
    ours, theirs = unix_pair()
    with ours, theirs, socket.socket() as sock:
        pid = receiver(apps, theirs)
        for _ in range(20):
            wait_asleep(pid)
            before = runs(pid)
            socket.send_fds(ours, [b"x"], [sock.fileno()])
            ours.recv(1)
            assert before < runs(pid)


def test_each_thread_is_counted_for_itself(apps):
    ours, theirs = unix_pair()
    with ours, theirs, socket.socket() as sock:
        pid = receiver(apps, theirs, IN_ANOTHER_THREAD)
        wait_asleep(pid)
        first, other = threads(pid)
        before = runs(pid, first), runs(pid, other)
        socket.send_fds(ours, [b"x"], [sock.fileno()])
        ours.recv(1)
        assert before[0] == runs(pid, first)
        assert before[1] < runs(pid, other)


def test_what_is_open_on_schedstat_cannot_be_read_when_the_thread_has_ended():
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    file = os.open(f"/proc/{process.pid}/task/{process.pid}/schedstat", os.O_RDONLY)
    try:
        assert os.pread(file, 64, 0)
        process.communicate()
        with pytest.raises(ProcessLookupError):
            os.pread(file, 64, 0)
    finally:
        os.close(file)


def test_a_child_may_share_its_parents_table(apps):
    ours, theirs = unix_pair()
    with ours, theirs:
        pid = receiver(apps, theirs, IN_A_CHILD)
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert (True, False) == (share_table(int(child), pid), share_table(pid, os.getpid()))
        os.kill(int(child), 9)


def test_the_last_pid_of_loadavg_is_another_with_every_birth():
    for _ in range(20):
        before = Path("/proc/loadavg").read_text().split()[-1]
        subprocess.run(["true"], check=True)
        assert before != Path("/proc/loadavg").read_text().split()[-1]
