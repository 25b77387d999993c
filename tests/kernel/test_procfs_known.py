"""Holders of sockets that are told without a search: by what is known from before, and as far as that goes."""

import os

import pytest

from tests.apps import copy_of_cat, inode
from tests.kernel.searches import holders, sockets
from tunsplit.kernel import newcomers, procfs


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


@pytest.mark.parametrize("ended", [True, False])
def test_only_the_latest_newcomers_that_live_are_looked_at(processes, ended):
    with sockets() as sock:
        processes.newcomers.note(os.getpid())
        for pid in range(1, newcomers.LATEST + 1):
            processes.newcomers.note(2**22 + pid)
            if ended:
                processes.newcomers.ended(2**22 + pid)
        assert (processes.newcomer(inode(sock)) is not None) == ended


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
