"""How much is kept of the dead, and that nothing of it gets lost."""

import pytest

from tests.engine.story import CURL, EXCLUDED, FIREFOX, INIT, SH, STEAM, Story, firefox, runs, steam
from tunsplit.engine import family
from tunsplit.engine.reasons import Birth, Image, Node


@pytest.fixture
def story():
    return Story(firefox, steam)


def test_the_dead_without_descendants_are_few(story, monkeypatch):
    monkeypatch.setattr(family, "RESTING", 3)
    for pid in range(10, 20):
        story.fork(1, pid)
        story.exit(pid)
    assert 3 == story.tree.statistics()["dead"]
    assert 4 == story.tree.statistics()["processes"]


def test_ancestors_live_as_long_as_their_line(story, monkeypatch):
    monkeypatch.setattr(family, "RESTING", 0)
    for pid in range(10, 20):
        story.fork(1 if pid == 10 else pid - 1, pid)
    for pid in range(10, 19):
        story.exit(pid)
    assert 9 == story.tree.statistics()["dead"]
    story.exit(19)
    assert {"processes": 1, "dead": 0, "missed": 0, "cut": 0} == story.tree.statistics()


def test_with_too_many_dead_the_oldest_line_is_cut_and_unknown(story, monkeypatch):
    monkeypatch.setattr(family, "ANCESTORS", 2)
    for parent, child, program in ((1, 10, FIREFOX), (10, 11, SH), (11, 12, CURL), (12, 13, CURL)):
        story.fork(parent, child)
        story.exec(child, program)
    story.words(13)
    story.exit(11)
    story.exit(12)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(13)
    story.fork(1, 14)
    story.fork(14, 15)
    story.exit(14)
    assert {(13, 13)} == story.tree.changed()
    assert story.words(13) is None
    assert [] == story.words(15)
    assert 1 == story.tree.statistics()["cut"]


def test_an_orphan_that_is_forgotten_waits_for_no_end(monkeypatch):
    monkeypatch.setattr(family, "RESTING", 0)
    forgotten: list[Node] = []
    lines = family.Family(forgotten.append)
    parent, *children = (Node(pid, Birth.SEEN, Image(), pid, pid) for pid in (10, 11, 12))
    for child in children:
        assert lines.bear(child, parent)
        lines.miss_parent(child)
    assert lines.bury(children[0])
    assert [children[0]] == forgotten

    assert not lines.bury(parent)
    assert [Birth.MISSED, Birth.SEEN] == [child.birth for child in children]


def test_a_server_that_restarts_itself_has_a_short_line(story, monkeypatch):
    monkeypatch.setattr(family, "LONG", 8)
    monkeypatch.setattr(family, "LONGEST", 16)
    story.fork(1, 10)
    story.exec(10, STEAM)
    for pid in range(11, 200):
        story.fork(pid - 1, pid)
        story.exec(pid, (CURL, SH)[pid % 2])
        story.exit(pid - 1)
    assert 16 > story.tree.statistics()["dead"]
    assert ["inherited from 10 (/usr/bin/steam), which has exited"] == story.words(199)


def test_a_line_without_end_is_unknown(story, monkeypatch):
    monkeypatch.setattr(family, "LONG", 8)
    monkeypatch.setattr(family, "LONGEST", 16)
    for pid in range(10, 40):
        story.fork(1 if pid == 10 else pid - 1, pid)
        story.exec(pid, f"/opt/{pid}")
        story.exit(pid - 1)
    assert story.words(39) is None


def test_who_is_forgotten_is_forgotten_everywhere(story, monkeypatch):
    monkeypatch.setattr(family, "RESTING", 0)
    story.fork(1, 10)
    story.tree.mark(10, 10, EXCLUDED)
    story.words(10)
    story.tree.exec(10, 10)
    story.exit(10)
    assert set() == story.tree.changed()
    story.tree.clear_marks()
    assert story.words(10) is None


def test_the_dead_do_not_take_the_living_with_them(story, monkeypatch):
    monkeypatch.setattr(family, "RESTING", 1)
    story.fork(1, 10)
    story.exit(10)
    story.tree.fork(1, 10, 20)
    story.fork(1, 11)
    story.exit(11)
    assert () == story.tree.reasons(10, 20)
    story.fork(10, 12)
    story.exit(12)
    story.tree.exit(1, 1, 10_000)
    assert 2 == story.tree.statistics()["dead"]


def test_the_last_of_a_line_goes_alone(monkeypatch):
    monkeypatch.setattr(family, "RESTING", 0)
    story = Story()
    story.exit(1)
    assert 0 == story.tree.statistics()["processes"]


@pytest.mark.parametrize("unread", ["never read", "ended before it was read"])
def test_who_was_not_read_is_like_nobody_else(story, monkeypatch, unread):
    """A line of unread ones is not shortened by taking them for one: who shares an image may be read yet."""
    monkeypatch.setattr(family, "LONG", 2)
    story.bear_unread(10, 11)
    story.fork(11, 12)
    story.tree.exec(12, 12)
    story.fork(12, 13)
    story.fork(12, 14)
    for pid in (10, 11, 12):
        if unread == "ended before it was read":
            story.look(pid, None)
        story.exit(pid)
    story.exec(13, CURL)
    story.fork(13, 15)
    story.fork(15, 16)
    assert story.words(16) is None
    story.look(14, FIREFOX)
    assert ["inherited from 12 (/usr/bin/firefox), which has exited"] == story.words(16)


def test_what_an_ancestor_runs_now_stands_in_for_nobody(story, monkeypatch):
    """It may become another program, and who was left out for its sake would be lost with that."""
    monkeypatch.setattr(family, "LONG", 2)
    story.fork(1, 10)
    story.fork(10, 11)
    story.exec(10, FIREFOX)
    story.exec(11, FIREFOX)
    story.fork(11, 12)
    story.exec(12, CURL)
    story.exit(11)
    story.fork(12, 13)
    story.exec(10, CURL)
    assert ["inherited from 11 (/usr/bin/firefox), which has exited"] == story.words(13)


def heirs(story, pid, most=32):
    found = story.tree.heirs(pid, most)
    return None if found is None else sorted(found)


def test_who_may_have_inherited_a_descriptor_is_known_also_beyond_the_dead(story):
    for parent, child in ((1, 10), (10, 11), (11, 12), (12, 13), (10, 14), (1, 20), (20, 21)):
        story.fork(parent, child)
    assert [11, 12, 13, 14] == heirs(story, 10)
    story.exit(12)
    story.exit(14)  # nobody has anything of his
    assert [11, 13] == heirs(story, 10)
    story.exit(10)
    assert [] == heirs(story, 13)
    assert heirs(story, 99) is None


def test_too_many_heirs_are_nobodys_to_look_at(story):
    for parent, child in ((1, 10), (10, 11), (1, 20), (20, 21)):
        story.fork(parent, child)
    assert [11] == heirs(story, 10, most=1)
    story.fork(11, 12)
    assert heirs(story, 10, most=1) is None


def test_who_was_born_unseen_may_be_anybodys_heir_until_he_is_gone(story):
    """Alive, or dead with descendants; also one whose line was cut, or who comes back as another thread's exec."""
    story.fork(1, 10)
    story.fork(99, 11)
    story.fork(11, 12)
    assert [11, 12] == heirs(story, 10)
    story.exit(11)
    assert [12] == heirs(story, 10)
    story.exit(12)
    assert [] == heirs(story, 10)
    story.fork(98, 13)
    story.exit(13)
    assert [] == heirs(story, 10)
    story.exec(13, CURL)  # its leader had ended, not the process
    assert [13] == heirs(story, 10)
    story.exit(13)
    story.fork(13, 14)  # by a thread that was left
    assert [14] == heirs(story, 10)


def test_who_is_adopted_anew_stays_a_child(story, monkeypatch):
    story.fork(1, 10)
    story.tree.rescan([INIT, runs(10, SH), runs(11, CURL, 10)], birth=Birth.PICTURED)
    story.tree.fork(10, 11, 11)  # the event was queued when we looked
    assert Birth.SEEN is story.tree.birth(11, 11)
    assert [11] == heirs(story, 10)


def test_of_a_line_that_was_cut_everybody_may_be_heirs(story, monkeypatch):
    monkeypatch.setattr(family, "ANCESTORS", 0)
    for parent, child in ((1, 10), (10, 11), (1, 20)):
        story.fork(parent, child)
    story.exit(10)
    assert [11] == heirs(story, 20)


def line(story, pid, since=99):
    found = story.tree.line(pid, since)
    return None if found is None else sorted(found)


def test_what_a_process_was_born_with_only_those_may_have_whom_it_came_by(story):
    """Up to the first who is older, and their children, of whom one may be made to look like a sibling."""
    for parent, child in ((1, 10), (1, 20), (10, 11), (10, 12), (11, 13), (13, 14), (14, 15)):
        story.fork(parent, child)
    assert [13, 14] == line(story, 14)
    assert [11, 13, 14] == line(story, 14, 13)
    assert [10, 11, 12, 13, 14] == line(story, 14, 11)
    story.exit(13)
    story.exit(12)
    assert [10, 11, 14] == line(story, 14, 11)


def test_whose_birth_was_missed_has_no_line(story):
    story.fork(99, 10)
    story.fork(10, 11)
    assert [10, 11] == line(story, 11)
    assert line(story, 11, 10) is None
    assert line(story, 10) is None
    assert line(story, 1) is None
    story.tree.rescan(
        [INIT, runs(20, SH), runs(21, CURL, 20)]
    )  # /proc tells of a parent, and not whether it is the true one
    assert line(story, 21) is None
    assert line(story, 99) is None
