"""What finding holders, and reading what may change, relies on from Linux."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.apps import inode
from tunsplit.kernel.procfs import Processes

THREAD = """
import ctypes, os, threading
ready = threading.Event()
def run():
    {code}
    ready.set()
    threading.Event().wait()
thread = threading.Thread(target=run, daemon=True)
thread.start()
ready.wait()
"""
UNSHARE = "assert 0 == ctypes.CDLL(None).unshare(0x400)  # CLONE_FILES"
FORK = "os.fork() or os._exit(0)"


def shown(directory):
    """Links in a directory of /proc."""
    return {str(path.readlink()) for path in Path(directory).iterdir()}


def threads(pid):
    return sorted(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())


def test_the_link_count_of_task_tells_the_number_of_threads(apps):
    alone, two = apps.start(), apps.python(THREAD.format(code="pass"))
    assert (3, 4) == (Path(f"/proc/{alone}/task").stat().st_nlink, Path(f"/proc/{two}/task").stat().st_nlink)


def test_a_thread_that_unshared_its_table_shows_it_alone(apps):
    with socket.socket() as sock:
        link = f"socket:[{inode(sock)}]"
        pid = apps.python(THREAD.format(code=UNSHARE) + f"os.close({sock.fileno()})", sock)
        _, thread = threads(pid)
        assert (False, True) == (link in shown(f"/proc/{pid}/fd"), link in shown(f"/proc/{pid}/task/{thread}/fd"))


def test_children_hang_on_the_thread_that_forked_them(apps):
    pid = apps.python(THREAD.format(code=FORK))
    counts = [len(Path(f"/proc/{pid}/task/{thread}/children").read_text().split()) for thread in threads(pid)]
    assert [0, 1] == counts


def test_a_descriptor_on_its_way_is_in_nobodys_table():
    ours, theirs = socket.socketpair()
    sock = socket.socket()
    number = inode(sock)
    with ours, theirs, Processes() as processes:
        socket.send_fds(ours, [b"x"], [sock.fileno()])
        sock.close()
        assert [] == [one for one in processes.scan_all({number}) if one is not None]
        _, (received,), _, _ = socket.recv_fds(theirs, 1, 1)
        with socket.socket(fileno=received):
            ((_, holders),) = [one for one in processes.scan_all({number}) if one is not None]
            assert {os.getpid()} == {pid for pid, _ in holders}


def test_a_process_can_change_its_command_line_without_exec(apps):
    write = (
        "import ctypes; fields = open('/proc/self/stat').read().rpartition(')')[2].split();"
        "ctypes.memmove(int(fields[45]), b'firefox' + bytes(1), 8)"  # arg_start, proc_pid_stat(5)
    )
    assert Path(f"/proc/{apps.python(write)}/cmdline").read_bytes().startswith(b"firefox\0")


def test_a_process_of_another_user_namespace_belongs_to_a_user_of_ours(apps):
    """So what `user` says is true there too."""
    pid = apps.launch(["unshare", "--user", "--map-root-user", "cat"], uid=65534)
    assert 65534 == Path(f"/proc/{pid}").stat().st_uid


@pytest.mark.netns
def test_a_cgroup_is_told_as_seen_from_the_readers_cgroup_namespace(apps, tmp_path):
    subprocess.run(["mount", "-t", "cgroup2", "none", tmp_path], check=True)
    inner, outer = tmp_path / f"ts{os.getpid()}a", tmp_path / f"ts{os.getpid()}b"
    try:
        inner.mkdir()
        outer.mkdir()
        pid = apps.start()
        (outer / "cgroup.procs").write_text(str(pid))
        read = f"echo 0 > {inner}/cgroup.procs; exec unshare --cgroup cat /proc/{pid}/cgroup"
        told = subprocess.run(["sh", "-c", read], capture_output=True, text=True, check=True).stdout
        assert f"0::/../{outer.name}" in told.splitlines()
        (tmp_path / "cgroup.procs").write_text(str(pid))
    finally:
        inner.rmdir()
        outer.rmdir()
        subprocess.run(["umount", tmp_path], check=True)
