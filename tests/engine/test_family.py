"""How much is kept of the dead, and that nothing of it gets lost."""

import pytest

from tests.engine.story import CURL, EXCLUDED, FIREFOX, SH, STEAM, Story, firefox, steam
from tunsplit.engine import family


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
