"""Births, threads, and what was born or died while nobody looked."""

import pytest

from tests.engine.story import CURL, EXCLUDED, FIREFOX, INCLUDED, INIT, SH, STEAM, Story, firefox, runs, steam
from tunsplit.engine.processes import ProcessTree
from tunsplit.engine.reasons import EXEC_TICKS, Birth


@pytest.fixture
def story():
    return Story(firefox, steam)


def test_the_first_picture_believes_what_proc_shows():
    story = Story(firefox, others=[runs(10, FIREFOX), runs(11, CURL, 10)])
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)
    assert Birth.PICTURED is story.tree.birth(11, 11)


def test_a_parent_that_died_while_we_looked_is_missing():
    story = Story(firefox, others=[runs(11, CURL, 10), runs(12, CURL, 13), runs(13, CURL)])
    assert story.words(11) is None
    assert story.words(12) is None  # a parent younger than its child is a stranger
    assert [] == story.words(13)


def test_of_two_who_claim_one_pid_the_last_is_pictured():
    tree = ProcessTree([firefox])
    tree.picture([INIT, runs(10, FIREFOX, start_time=5), runs(10, SH)])
    assert () == tree.reasons(10, 10)


def test_a_pid_that_was_given_again_before_the_picture_is_a_stranger(story):
    story.fork(1, 10)
    story.tree.picture([INIT, runs(10, FIREFOX, start_time=20)])
    assert Birth.PICTURED is story.tree.birth(10, 20)


def test_parents_never_go_in_a_circle():
    tree = ProcessTree([firefox])
    tree.picture([runs(10, SH, 11, 5), runs(11, SH, 10, 5), runs(12, SH, 12, 5)])
    assert {Birth.MISSED, Birth.PICTURED} == {tree.birth(10, 5), tree.birth(11, 5)}
    assert Birth.MISSED is tree.birth(12, 5)


def test_an_event_older_than_the_picture_names_the_true_parent():
    story = Story(firefox, others=[runs(10, FIREFOX), runs(11, CURL)])  # 11's parent died, or so it looks
    story.tree.fork(10, 11, 11)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)
    assert Birth.SEEN is story.tree.birth(11, 11)
    story.tree.fork(99, 10, 10)
    assert Birth.PICTURED is story.tree.birth(10, 10)


def test_a_child_of_nobody_we_know_was_missed(story):
    story.tree.fork(99, 10, 10)
    story.look(10, CURL)
    assert story.words(10) is None
    story.fork(10, 11)
    assert story.words(11) is None
    story.exec(11, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(11)


def test_a_mark_may_be_missing_where_a_birth_was_missed(story):
    story.fork(1, 9)
    story.tree.mark(9, 9, INCLUDED)
    story.tree.fork(99, 10, 10)
    story.look(10, FIREFOX)
    assert story.words(10) is None
    story.tree.mark(10, 10, INCLUDED)
    assert "by hand" == story.words(10)[0]


def test_a_mark_beyond_a_missed_birth_may_have_been_overridden(story):
    story.fork(1, 10)
    story.tree.mark(10, 10, EXCLUDED)
    story.tree.rescan([INIT, runs(10, SH), runs(11, CURL, 10)])
    assert story.words(11) is None


def test_a_child_with_another_program_is_somebody_elses(story):
    story.fork(1, 10)
    story.look(10, FIREFOX)  # by CLONE_PARENT, of a firefox that init started
    assert Birth.MISSED is story.tree.birth(10, 10)
    story.exec(10, CURL)
    assert story.words(10) is None


def test_what_was_read_in_the_midst_of_an_exec_is_not_what_the_parent_ran(story):
    """`firefox -c 'curl &'`: /proc shows curl before the event is queued, in a child that shares firefox's image."""
    story.bear_unread(10, 11)
    story.exit(10)
    story.look(11, CURL)
    story.tree.exec(11, 12)
    story.look(11, CURL)
    assert story.words(11) is None


def test_what_was_read_before_an_exec_holds_when_that_led_to_another_program(story):
    story.bear_unread(10, 11)
    story.exit(10)
    story.look(11, FIREFOX)
    story.tree.exec(11, 12)
    story.look(11, CURL)
    assert ["inherited from 10 (/usr/bin/firefox), which has exited"] == story.words(11)


def test_whoever_shares_what_is_in_doubt_is_read_again(story):
    story.bear_unread(10, 11)
    story.fork(10, 12)
    story.look(11, CURL)
    story.tree.exec(11, 11)
    assert [11] == [pid for pid, _ in story.tree.take_unread()]
    assert story.tree.look(runs(11, CURL, 10), story.tree.image(11))
    assert [10, 12] == sorted(pid for pid, _ in story.tree.take_unread())
    story.look(12, FIREFOX)
    story.tree.exec(11, 11)
    story.look(11, SH)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)


def test_whoever_ends_in_the_midst_of_it_leaves_it_in_doubt(story):
    story.bear_unread(10, 11)
    story.fork(10, 12)
    story.look(11, SH)
    story.tree.exec(11, 12)
    story.look(11, None)
    assert story.words(11) is None
    assert story.words(12) is None


def test_what_is_in_doubt_may_be_read_by_another_meanwhile(story):
    story.bear_unread(10, 11)
    story.look(11, CURL)
    story.tree.exec(11, 11)
    story.look(10, FIREFOX)
    story.look(11, CURL)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)


def test_two_execs_that_were_read_in_their_midst_settle_nothing(story):
    story.bear_unread(10, 11)
    story.exit(10)
    story.look(11, CURL)
    story.tree.exec(11, 12)
    story.look(11, SH)
    story.tree.exec(11, 13)
    story.look(11, SH)
    assert story.words(11) is None


def test_a_server_that_starts_itself_again_is_believed_what_it_ran_before(story):
    """An exec is under way for some moments, not for hours."""
    story.fork(1, 10)
    story.tree.exec(10, 10)
    story.look(10, FIREFOX)
    story.fork(10, 11)
    story.exec(11, CURL)
    story.tree.exec(10, 12 + EXEC_TICKS)
    story.look(10, FIREFOX)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)
    story.exec(10, CURL)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)


def test_who_was_never_looked_at_is_named_with_its_line_before_it_is_judged(story):
    """By CLONE_PARENT, of a curl that init started; and a child of it that is another program by now."""
    assert [] == story.tree.take_unproved(10, 10)
    story.fork(1, 10)
    story.fork(10, 11)
    story.exec(11, SH)
    image = story.tree.image(10)
    assert [(10, image)] == story.tree.take_unproved(11, 11)
    assert [] == story.tree.take_unproved(10, 10)
    assert story.tree.look(runs(10, CURL), image)
    assert story.words(10) is None
    assert story.words(11) is None
    story.fork(1, 12)
    story.look(12, SH)
    assert [] == story.tree.take_unproved(12, 12)
    assert [] == story.words(12)


def test_an_exec_whose_event_is_on_its_way_looks_the_same_for_a_moment(story):
    story.fork(1, 10)
    story.look(10, CURL)
    assert story.words(10) is None
    story.exec(10, CURL)
    assert [] == story.words(10)


def test_a_child_whose_living_parent_proc_does_not_know_was_missed(story):
    story.fork(1, 10)
    story.fork(10, 11)
    story.look(11, SH, parent=1)
    assert story.words(11) is None
    story.fork(10, 12)
    story.exit(10)
    story.look(12, SH, parent=1)
    assert [] == story.words(12)


def test_an_orphan_that_proc_shows_before_its_parents_end_is_told_is_believed_then(story):
    """kernel/exit.c, do_exit: the children have another parent before the event is sent."""
    story.fork(1, 10)
    for parent, child in ((10, 11), (10, 12), (11, 13)):
        story.fork(parent, child)
    story.look(11, SH, parent=1)
    assert [None, None] == [story.words(11), story.words(13)]
    story.exit(12)
    assert story.words(11) is None
    story.exit(10)
    assert {(11, 11), (13, 13)} == story.tree.changed()
    assert [[], []] == [story.words(11), story.words(13)]


def test_a_parents_end_does_not_explain_another_program_than_its_own(story):
    """By CLONE_PARENT, of a curl that init started: whose child it is, the end of its supposed parent does not tell."""
    story.fork(1, 10)
    story.fork(10, 11)
    story.look(11, CURL, parent=1)
    story.exit(10)
    assert story.words(11) is None
    story.exec(11, CURL)
    assert [] == story.words(11)


def test_a_parents_end_that_was_lost_explains_nothing(story):
    story.fork(1, 10)
    story.fork(10, 11)
    story.look(11, SH, parent=1)
    story.tree.rescan([INIT, runs(10, SH), runs(11, SH)])
    story.exit(10)
    assert story.words(11) is None


def test_a_second_birth_without_a_death_between_is_another_process(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.tree.fork(1, 10, 20)
    assert () == story.tree.reasons(10, 20)


# Threads


def test_a_process_lives_as_long_as_one_of_its_threads(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.tree.thread(10)
    story.exit(10)
    assert [10] == [one.pid for one in story.tree.listed()]
    story.tree.exit(12, 10, 10_000)
    story.tree.exit(13, 10, 10_000)
    assert [] == story.tree.listed()
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)  # its last packets are still its own


def test_a_thread_that_was_not_seen_to_be_born_ends_nothing(story):
    story.tree.exit(5, 1, 10_000)
    story.tree.thread(1)
    story.tree.exit(1, 1, 10_000)
    story.tree.exit(5, 1, 10_000)
    assert 1 == story.tree.statistics()["dead"]


def test_exec_by_a_thread_comes_after_its_leaders_end(story):
    story.fork(1, 10)
    story.fork(10, 11)
    story.exit(10)
    story.exec(10, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)
    assert 0 == story.tree.statistics()["dead"]


def test_the_dead_have_no_other_user(story):
    story.fork(1, 10)
    story.exit(10)
    story.exit(10)
    story.tree.uid_changed(10, 10_000)
    assert [] == story.tree.take_unread()


# After a gap


def test_after_a_gap_what_we_knew_holds_and_what_was_born_is_unknown(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.fork(10, 11)
    story.exec(11, CURL)
    story.fork(1, 12)
    story.tree.exec(12, 12)
    story.tree.rescan([INIT, runs(11, CURL), runs(12, STEAM), runs(13, CURL), runs(14, CURL, 12)])
    assert ["inherited from 10 (/usr/bin/firefox), which has exited"] == story.words(11)
    assert ["rule 2: /usr/bin/steam"] == story.words(12)
    assert story.words(13) is None
    assert ["inherited from 12 (/usr/bin/steam)"] == story.words(14)
    assert [] == story.tree.take_unread()


@pytest.mark.parametrize(
    ("program", "expected"), [(FIREFOX, ["inherited from 10 (/usr/bin/firefox), which has exited"]), (SH, None)]
)
def test_who_died_in_the_gap_may_have_become_another_program_before(story, program, expected):
    """Its child would have followed it into a rule, or out of one; what it was born of stays."""
    story.fork(1, 10)
    story.exec(10, program)
    story.fork(10, 11)
    story.exec(11, CURL)
    story.tree.rescan([INIT, runs(11, CURL, 1)])
    assert expected == story.words(11)


def test_who_was_born_and_orphaned_in_two_gaps_is_nobodys(story):
    """What was last seen of its parent was neither what it was born as, nor what it was in the end."""
    story.fork(1, 10)
    story.tree.rescan([INIT, runs(10, FIREFOX), runs(11, CURL, 10)])
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)
    story.tree.rescan([INIT, runs(11, CURL, 1)])
    assert story.words(11) is None


def test_whoever_marked_died_in_the_gap_is_still_called_by_what_it_was(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.fork(10, 11)
    story.tree.mark(10, 10, INCLUDED)
    story.tree.rescan([INIT, runs(11, FIREFOX, 1)])
    assert "inherited from 10 (/usr/bin/firefox), which has exited" == story.words(11)[0]


def test_an_exec_in_the_gap_is_no_misfit(story):
    story.fork(1, 10)
    story.look(10, SH)
    story.tree.rescan([INIT, runs(10, CURL)])
    assert [] == story.words(10)


def test_a_pid_given_again_in_the_gap_is_a_stranger(story):
    story.fork(1, 10)
    story.words(10)
    story.tree.rescan([INIT, runs(10, SH, start_time=20)])
    assert story.tree.reasons(10, 20) is None
    assert Birth.MISSED is story.tree.birth(10, 20)
