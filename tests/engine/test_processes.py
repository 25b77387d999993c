"""Whose reasons a process has, and what is not known of it."""

import pytest

from tests.engine.story import CURL, EXCLUDED, FIREFOX, INCLUDED, SH, STEAM, Story, firefox, rule_for, runs, steam
from tunsplit.engine import family
from tunsplit.engine.processes import ProcessTree
from tunsplit.engine.reasons import Birth, Standing, count_descendants


@pytest.fixture
def story():
    return Story(firefox, steam)


def test_a_child_is_what_its_parent_is_from_birth(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.fork(10, 11)
    assert ["rule 1: /usr/bin/firefox"] == story.words(11)
    story.exec(11, CURL)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)
    assert [] == story.words(1)


def test_an_orphan_stays_its_dead_parents_child(story):
    for parent, child in ((1, 10), (10, 11), (11, 12)):
        story.fork(parent, child)
        story.exec(child, STEAM if child == 10 else CURL)
    story.exit(11)
    story.exit(10)
    assert ["inherited from 10 (/usr/bin/steam), which has exited"] == story.words(12)
    assert [12, 11, 10, 1] == [process.pid for process in story.tree.lineage(12, 12)]


def test_whoever_runs_its_parents_program_bears_its_own_name_in_a_lineage(story):
    """As a shell's children do that it has no program for: `( ( exec updater & ) )`."""
    for parent, child in ((1, 10), (10, 11), (11, 12)):
        story.fork(parent, child)
    story.exec(12, CURL)
    story.exit(11)
    assert [] == story.words(12)
    lineage = story.tree.lineage(12, 12)
    assert [12, 11, 10, 1] == [process.pid for process in lineage]
    assert [12, -1, -1, 1] == [process.start_time for process in lineage]


def test_what_events_tell_of_a_process_need_not_be_read(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    assert story.tree.recall(99) is None
    story.words(10)
    process = story.tree.recall(10)
    assert (10, 10, 1, "/usr/bin/firefox") == (*process[:3], process.executable.path)
    story.fork(10, 11)
    assert process is story.tree.recall(10)
    assert story.tree.recall(11) is None  # nobody has looked at it yet
    story.words(11)
    story.exit(10)
    assert story.tree.recall(10) is None
    story.fork(11, 12)
    story.words(12)
    story.tree.exec(12, 10_000)
    assert story.tree.recall(12) is None  # what it runs now was not read yet
    assert 12 not in [one.pid for one in story.tree.lineage(12, 12)]
    assert (11, 11, 0) == story.tree.recall(11)[:3]


def test_descendants_are_the_living_in_any_generation_and_no_kernel_threads(story):
    for parent, child in ((1, 10), (10, 11), (11, 12), (10, 13), (1, 20)):
        story.fork(parent, child)
    story.look(20, "", is_kernel=True)
    story.exit(11)

    counted = {pid: count_descendants(pid, story.tree.nodes()) for pid in (1, 10, 11, 12, 99)}
    assert {1: (3, 4), 10: (2, 4), 11: (0, 4), 12: (0, 4), 99: (0, 4)} == counted


def test_a_child_keeps_what_its_parent_was_at_its_birth(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.fork(10, 11)
    story.exec(11, SH)
    story.exec(10, CURL)
    assert [] == story.words(10)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)


def test_children_that_run_follow_their_parent_into_a_rule_and_out_of_it(story):
    story.fork(1, 10)
    story.fork(10, 11)
    assert [] == story.words(11)
    story.exec(10, FIREFOX)
    assert {(11, 11)} == story.tree.changed()
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)
    story.exec(10, CURL)
    assert {(11, 11)} == story.tree.changed()
    assert [] == story.words(11)


def test_removing_a_rule_takes_just_what_it_alone_caused(story):
    story.fork(1, 10)
    story.exec(10, STEAM)
    story.fork(10, 11)
    story.exec(11, FIREFOX)
    assert ["rule 1: /usr/bin/firefox", "inherited from 10 (/usr/bin/steam)"] == story.words(11)
    assert ["rule 2: /usr/bin/steam"] == story.words(10)
    story.tree.set_rules([firefox])
    assert {(10, 10)} == story.tree.changed()
    assert ["rule 1: /usr/bin/firefox"] == story.words(11)


def test_a_new_rule_reaches_the_orphans_of_a_launcher(story):
    story.tree.set_rules([])
    for parent, child in ((1, 10), (10, 11)):
        story.fork(parent, child)
        story.exec(child, STEAM if child == 10 else CURL)
    story.exit(10)
    story.tree.set_rules([steam])
    assert ["inherited from 10 (/usr/bin/steam), which has exited"] == story.words(11)


def test_without_inherit_children_get_nothing():
    story = Story(rule_for(FIREFOX, inherit=False))
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.fork(10, 11)
    assert ["rule 1: /usr/bin/firefox"] == story.words(11)  # it runs the same program still
    story.exec(11, CURL)
    assert [] == story.words(11)


def test_a_mark_overrides_rules_is_inherited_and_the_nearest_counts(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.fork(10, 11)
    story.fork(11, 12)
    assert story.tree.mark(10, 10, INCLUDED)
    assert not story.tree.mark(10, 10, INCLUDED)
    assert not story.tree.mark(10, 11, INCLUDED)
    assert ["by hand", "rule 1: /usr/bin/firefox"] == story.words(10)
    assert "inherited from 10 (/usr/bin/firefox)" == story.words(12)[0]
    story.tree.mark(11, 11, EXCLUDED)
    assert [(10, Standing.INCLUDED), (11, Standing.EXCLUDED), (12, Standing.EXCLUDED)] == [
        (one.pid, one.standing) for one in story.tree.listed()
    ]
    story.tree.mark(11, 11, None)
    assert INCLUDED is story.tree.reasons(12, 12)[0].mark
    story.tree.clear_marks()
    assert Standing.LISTED is story.tree.listed()[0].standing


def test_a_reused_pid_is_a_stranger(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)
    story.exit(10)
    story.tree.fork(1, 10, 20)
    assert story.tree.reasons(10, 10) is None  # whoever asks for the dead does not get the living
    assert () == story.tree.reasons(10, 20)
    story.tree.exit(10, 10, 15)  # late word of the dead
    story.tree.exec(10, 15)
    story.tree.uid_changed(10, 15)
    story.tree.fork(99, 10, 15)
    assert () == story.tree.reasons(10, 20)


def test_a_process_nobody_heard_of_is_unknown(story):
    assert story.tree.reasons(10, 10) is None
    assert [] == story.tree.lineage(10, 10)
    assert story.tree.birth(10, 10) is None
    assert story.tree.image(10) is None
    assert not story.tree.look(runs(10, SH), story.tree.image(1))
    story.tree.thread(10)
    story.tree.exec(10, 10)
    story.tree.uid_changed(10, 10)
    story.tree.exit(10, 10, 10)
    assert 1 == story.tree.statistics()["processes"]


# What has not been read


def test_an_unread_program_is_unknown_and_named_once(story):
    story.fork(1, 10)
    story.tree.exec(10, 10)
    [(pid, image)] = story.tree.take_unread()
    assert [] == story.tree.take_unread()
    assert story.words(10) is None
    story.tree.exec(10, 10)
    assert not story.tree.look(runs(pid, FIREFOX), image)  # of a program that it does not run any more
    assert story.look(10, SH)
    assert [] == story.words(10)


def test_who_dies_unread_leaves_children_that_nobody_can_judge(story):
    story.bear_unread(10, 11)
    assert [10, 11] == [pid for pid, _ in story.tree.take_unread()]
    story.exec(11, CURL)
    story.exit(10)
    assert story.words(11) is None
    story.exec(11, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(11)


def test_a_child_read_before_exec_tells_what_its_parent_ran(story):
    story.bear_unread(10, 11)
    story.look(11, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)


def test_whoever_runs_the_same_since_a_fork_stands_elsewhere_when_one_of_them_is_read(story):
    story.bear_unread(10, 11)
    story.fork(11, 12)
    for pid in (10, 11, 12):
        assert story.words(pid) is None
    story.look(12, FIREFOX)

    assert {(10, 10), (11, 11), (12, 12)} == story.tree.changed()


def test_a_parent_stands_elsewhere_when_what_its_child_showed_is_in_doubt_or_believed_again(story):
    story.bear_unread(10, 11)
    story.look(11, FIREFOX)
    story.words(10)

    story.tree.exec(11, 11)
    assert {(10, 10)} == story.tree.changed()
    story.look(11, CURL)
    assert {(10, 10)} == story.tree.changed()
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)


def test_so_does_a_child_for_which_the_line_had_no_room(story, monkeypatch):
    monkeypatch.setattr(family, "LONGEST", 1)
    story.bear_unread(10, 11)
    assert Birth.MISSED is story.tree.birth(11, 11)
    assert story.words(11) is None
    story.look(10, FIREFOX)

    assert {(11, 11)} == story.tree.changed()


def test_a_stranger_s_program_leaves_alone_what_was_told_of_others(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.words(10)
    told = story.tree.changes
    story.fork(1, 20)
    for path in (SH, CURL):
        story.exec(20, path)
    story.exit(20)

    assert told == story.tree.changes
    assert set() == story.tree.changed()


def test_one_who_ended_unread_says_nothing_of_others_with_its_program(story):
    story.bear_unread(10, 11)
    story.look(11, None)
    story.look(10, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)


def test_what_a_process_ran_is_known_still_when_it_has_ended(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.look(10, None)
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)


@pytest.mark.parametrize("programs", [(SH, CURL), (SH, SH)])
def test_what_a_child_runs_is_read_anew_when_its_parent_has_run_two_others_at_once(story, programs):
    """What the first one showed may have been the second, and then said nothing of the one before."""
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.fork(10, 11)
    for path in programs:
        story.tree.exec(10, 10_000)
        assert story.words(11) is None
        unread = [pid for pid, _ in story.tree.take_unread()]
        story.look(10, path)

    assert {10, 11} == set(unread)
    assert story.words(11) is None
    story.look(11, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(11)


def test_another_user_is_another_image(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.words(10)
    story.tree.uid_changed(10, 20)
    assert {(10, 10)} == story.tree.changed()
    assert story.words(10) is None


def test_who_moved_is_judged_as_what_it_is_now(story):
    story.fork(1, 10)
    story.fork(10, 11)
    story.look(11, SH, is_own_user_namespace=False)
    assert story.tree.image(11) is not story.tree.image(10)
    assert Birth.SEEN is story.tree.birth(11, 11)


@pytest.mark.parametrize(
    ("shown", "expected"), [({"is_kernel": True}, []), ({"is_own_user_namespace": False}, None), ({}, None)]
)
def test_a_program_that_is_not_ours_to_know(shown, expected):
    story = Story(firefox, others=[runs(2, None, 0, **shown)])
    assert expected == story.words(2)


def test_an_init_that_is_closed_to_us_hides_no_rule():
    tree = ProcessTree([firefox])
    tree.picture([runs(1, None, 0, is_own_user_namespace=False), runs(10, SH)])
    assert () == tree.reasons(10, 10)
