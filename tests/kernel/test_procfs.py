"""What a process is, told by /proc."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.apps import CAT, copy_of_cat
from tunsplit.errors import KernelError
from tunsplit.kernel import procpid
from tunsplit.kernel.procpid import Stat, identify, parse_cgroup, parse_cmdline, parse_stat, resolve, why_no_program

NOBODY = 65534
RETURNS_AT_ONCE = Path("/bin/true").resolve()


# What a process is


def test_a_process_is_read(processes, apps):
    pid = apps.start(uid=NOBODY)
    process = processes.read(pid)
    assert (pid, os.getpid(), NOBODY, str(CAT)) == (process.pid, process.parent, process.uid, process.executable.path)
    assert process.executable.identity == process.executable.path_identity == identify(str(CAT))
    assert (False, True) == (process.is_kernel, process.is_own_user_namespace)
    assert process.start_time >= processes.read(os.getpid()).start_time


def test_a_path_that_is_no_programs_says_why(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    closed = OSError(13, "Permission denied")
    assert why_no_program(str(CAT)) is None
    assert "does not exist" == why_no_program(f"{tmp_path}/none") == why_no_program(f"{CAT}/none")
    assert "is no file" == why_no_program(f"{tmp_path}/pipe")
    assert f"is a directory (for all that is in it: {tmp_path}/**)" == why_no_program(f"{tmp_path}/")
    monkeypatch.setattr("tunsplit.kernel.procpid.os.stat", Mock(side_effect=closed))
    assert "cannot be looked at (Permission denied)" == why_no_program("/root/x")


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


@pytest.mark.netns
def test_a_cgroup_is_read_if_it_is_asked_for_as_it_is_now(own_cgroup, processes, apps):
    directory, path = own_cgroup, f"/{own_cgroup.name}"
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


def test_a_symlink_that_is_replaced_while_it_is_followed_is_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("program")
    readlink = os.readlink

    def replaced(path):
        (tmp_path / "link").unlink()
        return readlink(path)

    monkeypatch.setattr(os, "readlink", replaced)
    assert str(tmp_path / "link") == resolve(str(tmp_path / "link"))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/etc/passwd/x", "with\0zero"])
def test_what_is_not_there_has_no_identity(path):
    assert identify(path) is None


def test_start_times_are_told_as_of_the_boot(processes, apps):
    before = procpid.tick_ago(1)
    started = processes.read(apps.start()).start_time
    assert before <= started <= procpid.tick_ago(0)
    assert 60 * procpid.TICKS_PER_S <= procpid.tick_ago(0) - procpid.tick_ago(60) <= 61 * procpid.TICKS_PER_S
