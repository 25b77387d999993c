"""The processes of a cgroup are found by its id, wherever cgroups are mounted, and nowhere."""

import ctypes
import os
import subprocess
from contextlib import closing

import pytest

from tests.apps import running_apps
from tunsplit.kernel import cgroup
from tunsplit.kernel.cgroup import Cgroups

pytestmark = pytest.mark.netns


@pytest.fixture
def own_cgroup(tmp_path):
    """A new cgroup of v2, wherever this host has them mounted."""
    subprocess.run(["mount", "-t", "cgroup2", "none", tmp_path], check=True)
    directory = tmp_path / f"ts{os.getpid()}"
    try:
        directory.mkdir()
        yield directory  # to be asked for before `apps`, who live in it
        directory.rmdir()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def apps():
    with running_apps() as started:
        yield started


@pytest.fixture(params=["mounted", "detached"])
def cgroups(request, monkeypatch):
    """As on any host, and as under `ip netns exec`, where /sys has no cgroups."""
    if request.param == "detached":
        monkeypatch.setattr(cgroup, "_open_mounted", lambda: None)
    with closing(Cgroups()) as found:
        yield found


def test_the_members_of_a_cgroup_are_found_by_its_id(own_cgroup, cgroups, apps):
    pids = {apps.start(), apps.start()}
    for pid in pids:
        (own_cgroup / "cgroup.procs").write_text(str(pid))
    assert pids == set(cgroups.members(own_cgroup.stat().st_ino))


def test_an_empty_cgroup_and_one_that_is_gone_have_no_members(own_cgroup, cgroups):
    child = own_cgroup / "child"
    child.mkdir()
    number = child.stat().st_ino
    assert [] == cgroups.members(number)
    child.rmdir()
    assert [] == cgroups.members(number)


def test_the_root_is_nobodys_in_particular(own_cgroup, cgroups):
    assert [] == cgroups.members(own_cgroup.parent.stat().st_ino)


def test_more_members_than_are_read_are_cut_between_two(own_cgroup, cgroups, apps, monkeypatch):
    pid = apps.start()
    for one in (pid, apps.start()):
        (own_cgroup / "cgroup.procs").write_text(str(one))
    monkeypatch.setattr(cgroup, "MOST_BYTES", len((own_cgroup / "cgroup.procs").read_text()) - 2)
    assert 1 == len(cgroups.members(own_cgroup.stat().st_ino))


def test_a_threaded_cgroup_tells_nothing(own_cgroup, cgroups):
    child = own_cgroup / "child"
    child.mkdir()
    (child / "cgroup.type").write_text("threaded")
    assert [] == cgroups.members(child.stat().st_ino)
    child.rmdir()


def test_without_the_right_to_cgroups_nothing_is_known(monkeypatch):
    class Refusing:
        def syscall(self, *_):
            ctypes.set_errno(1)
            return -1

    monkeypatch.setattr(cgroup, "_open_mounted", lambda: None)
    monkeypatch.setattr(cgroup, "libc", Refusing())
    with closing(Cgroups()) as found:
        assert [] == found.members(42)
        assert [] == found.members(None)
