"""Who was born of whom, and whose reasons that makes."""

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tunsplit.engine import family
from tunsplit.engine.processes import ProcessTree
from tunsplit.engine.processstate import dump, load
from tunsplit.engine.reasons import Birth, Mark, Standing
from tunsplit.engine.rules import Rule
from tunsplit.process import Executable, FileIdentity, Process

SH, FIREFOX, STEAM, CURL = "/bin/sh", "/usr/bin/firefox", "/usr/bin/steam", "/usr/bin/curl"
PROGRAMS = (SH, FIREFOX, STEAM, CURL)
USER = 1000

EXCLUDED, INCLUDED = Mark.EXCLUDED, Mark.INCLUDED


@dataclass(frozen=True)
class Runs:
    path: str

    def matches(self, process):
        return process.executable is not None and process.executable.path == self.path


def rule_for(path, number=1, *, inherit=True):
    return Rule(number, path, (Runs(path),), inherit)


firefox, steam = rule_for(FIREFOX), rule_for(STEAM, 2)


def runs(pid, path, parent=1, start_time=None, **traits):
    executable = (
        Executable(path, False, (identity := FileIdentity(1, hash(path) & 0xFFFF, 0)), identity) if path else None
    )
    return Process(pid, pid if start_time is None else start_time, parent, USER, executable, **traits)


INIT = runs(1, SH, parent=0)


class Story:
    """A tree with an init, told what happens line by line; time is the number of the line, pids are start times."""

    def __init__(self, *rules, others=()):
        self.tree = ProcessTree(rules)
        self.tree.picture([INIT, *others])
        self.parents = {}

    def fork(self, parent, child):
        self.tree.fork(parent, child, child)
        self.parents[child] = parent

    def exec(self, pid, path):
        self.tree.exec(pid, 10_000)
        self.look(pid, path)

    def look(self, pid, path, *, parent=None, **traits):
        self.tree.take_unread()
        shown = self.parents.get(pid, 1) if parent is None else parent
        return self.tree.look(runs(pid, path, shown, **traits), self.tree.image(pid))

    def exit(self, pid):
        self.tree.exit(pid, pid, 10_000)

    def words(self, pid):
        reasons = self.tree.reasons(pid, pid)
        return None if reasons is None else [reason.words for reason in reasons]


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
    story.fork(1, 10)
    story.tree.exec(10, 10)
    story.fork(10, 11)
    assert [10, 11] == [pid for pid, _ in story.tree.take_unread()]
    story.exec(11, CURL)
    story.exit(10)
    assert story.words(11) is None
    story.exec(11, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(11)


def test_a_child_read_before_exec_tells_what_its_parent_ran(story):
    story.fork(1, 10)
    story.tree.exec(10, 10)
    story.fork(10, 11)
    story.look(11, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)


def test_one_who_ended_unread_says_nothing_of_others_with_its_program(story):
    story.fork(1, 10)
    story.tree.exec(10, 10)
    story.fork(10, 11)
    story.look(11, None)
    story.look(10, FIREFOX)
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)
    assert ["inherited from 10 (/usr/bin/firefox)"] == story.words(11)


def test_what_a_process_ran_is_known_still_when_it_has_ended(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.look(10, None)
    assert ["rule 1: /usr/bin/firefox"] == story.words(10)


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


# Births


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


# Bounds


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


# Surviving


def restart(tree, rules, picture, change=lambda _: None):
    records = json.loads(json.dumps(dump(tree)))
    change(records)
    return load(records, rules, picture)


@pytest.fixture
def orphaned(story):
    for parent, child, program in ((1, 10, FIREFOX), (10, 11, SH), (11, 12, CURL)):
        story.fork(parent, child)
        story.exec(child, program)
    story.exit(11)
    story.exit(10)
    return story.tree


def test_orphans_survive_a_restart(orphaned):
    orphaned.mark(12, 12, INCLUDED)
    tree = restart(orphaned, [firefox], [INIT, runs(12, CURL), runs(13, CURL)])
    assert ["by hand", "inherited from 10 (/usr/bin/firefox), which has exited"] == [
        reason.words for reason in tree.reasons(12, 12)
    ]
    assert tree.reasons(13, 13) is None
    assert dump(tree)[:4] == dump(orphaned)[:4]


def test_who_is_not_there_any_more_is_dead(orphaned):
    tree = restart(orphaned, [firefox], [INIT])
    assert [] == tree.listed()
    assert {"processes": 4, "dead": 3, "missed": 0, "cut": 0} == tree.statistics()


@pytest.mark.parametrize("data", [None, {}, [], [{}], [None], [{"pid": 1}], ["x"]])
def test_without_a_state_it_is_the_first_time(data):
    assert () == load(data, [firefox], [INIT, runs(10, CURL)]).reasons(10, 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pid", "10"),
        ("pid", True),
        ("start_time", 10**9),
        ("birth", "virgin"),
        ("mark", "holy"),
        ("process", [1]),
        ("process", "firefox"),
        ("process", [10, 10, 1, USER, [FIREFOX, 0, [1, 1, 0], None], False, True]),
        ("parent", []),
        ("alive", 1),
    ],
)
def test_a_record_that_is_wrong_is_dropped_and_its_children_are_unknown(orphaned, field, value):
    def change(records):
        [record] = [record for record in records if record["pid"] == 10]
        record[field] = value

    tree = restart(orphaned, [firefox], [INIT, runs(12, CURL)], change)
    assert tree.reasons(12, 12) is None


def test_records_that_contradict_each_other_are_dropped(orphaned):
    def change(records):
        records.append(dict(records[-1], process=None))  # one pid twice
        records.append({**records[0], "pid": 20, "start_time": 0, "born": 0, "parent": 0})  # older than its parent

    tree = restart(orphaned, [firefox], [INIT, runs(12, CURL), runs(20, CURL, start_time=0)], change)
    assert ["inherited from 10 (/usr/bin/firefox), which has exited"] == [r.words for r in tree.reasons(12, 12)]
    assert Birth.MISSED is tree.birth(20, 0)


def test_one_that_nobody_had_looked_at_is_known_by_when_it_was_born(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.tree.fork(10, 11, 12)
    tree = restart(story.tree, [firefox], [INIT, runs(10, FIREFOX), runs(11, CURL, 10)])
    assert ["inherited from 10 (/usr/bin/firefox)"] == [reason.words for reason in tree.reasons(11, 11)]
    assert Birth.SEEN is tree.birth(11, 11)


# Against a naive oracle


@dataclass
class Ran:
    """A program, and whether the tree was told."""

    path: str
    read: bool


@dataclass(eq=False)
class Person:
    """A process as it really is: nothing is ever forgotten."""

    pid: int
    start_time: int
    parent: "Person | None"
    born_as: Ran | None
    ran: Ran
    mark: Mark | None = None
    alive: bool = True
    told: Standing | None = field(default=None)

    @property
    def shown_parent(self):
        return 0 if self.parent is None else self.parent.pid if self.parent.alive else 1


class Truth(RuleBasedStateMachine):
    """What the tree says is the truth or "unknown"; and while nothing was missed and all was read, the truth."""

    def __init__(self):
        super().__init__()
        self.now = 10
        self.entries: tuple[Rule, ...] = ()
        self.gap = False
        self.people = [Person(1, 10, None, None, Ran(SH, True))]
        self.tree = ProcessTree(())

    @initialize()
    def start(self):
        self.tree.picture(self.picture())

    def picture(self):
        return [self.shown(person) for person in self.living()]

    def shown(self, person):
        return runs(person.pid, person.ran.path, person.shown_parent, person.start_time)

    def living(self):
        return [person for person in self.people if person.alive]

    def somebody(self, data, *, but_init=False):
        return data.draw(st.sampled_from(self.living()[but_init:]))

    def free_pid(self, data):
        taken = {person.pid for person in self.living()}
        return data.draw(st.sampled_from([pid for pid in range(2, 14) if pid not in taken]))

    def bear(self, data):
        parent = self.somebody(data)
        self.now += 1
        child = Person(self.free_pid(data), self.now, parent, parent.ran, parent.ran)
        self.people.append(child)
        return child

    @precondition(lambda self: len(self.living()) < 10)
    @rule(data=st.data())
    def fork(self, data):
        child = self.bear(data)
        self.tree.fork(child.parent.pid, child.pid, self.now)

    @rule(data=st.data(), path=st.sampled_from(PROGRAMS), read=st.booleans())
    def exec(self, data, path, read):
        person = self.somebody(data)
        person.ran = Ran(path, False)
        self.tree.exec(person.pid, self.now)
        if read:
            self.read_all()

    @precondition(lambda self: len(self.living()) > 1)
    @rule(data=st.data())
    def exit(self, data):
        person = self.somebody(data, but_init=True)
        person.alive = False
        self.tree.exit(person.pid, person.pid, self.now)

    @rule()
    def read_all(self):
        people = {person.pid: person for person in self.living()}
        for pid, image in self.tree.take_unread():
            if self.tree.look(self.shown(people[pid]), image):
                people[pid].ran.read = True

    @rule(paths=st.sets(st.sampled_from(PROGRAMS)), inherit=st.booleans())
    def set_rules(self, paths, inherit):
        self.entries = tuple([rule_for(path, PROGRAMS.index(path), inherit=inherit) for path in sorted(paths)])
        self.tree.set_rules(self.entries)

    @rule(data=st.data(), mark=st.sampled_from([None, EXCLUDED, INCLUDED]))
    def mark(self, data, mark):
        person = self.somebody(data)
        assert (person.mark is not mark) == self.tree.mark(person.pid, person.start_time, mark)
        person.mark = mark

    @rule(data=st.data(), steps=st.lists(st.sampled_from(["fork", "exec", "exit"]), max_size=6), restart=st.booleans())
    def gap_(self, data, steps, restart):
        records = json.loads(json.dumps(dump(self.tree)))
        for step in steps:
            if step == "fork" and len(self.living()) < 10:
                self.bear(data)
            elif step == "exec":
                self.somebody(data).ran = Ran(data.draw(st.sampled_from(PROGRAMS)), False)
            elif len(self.living()) > 1:
                self.somebody(data, but_init=True).alive = False
        self.now += 1
        self.gap = True
        if restart:
            self.tree = load(records, self.entries, self.picture())
            for person in self.people:
                person.told = None
        else:
            self.tree.rescan(self.picture())

    def truth(self, person):
        matches = [entry for entry in self.entries if entry.label == person.ran.path]
        mark, unread, below = person.mark, not person.ran.read, person
        while (above := below.parent) is not None:
            mark = mark or above.mark
            paths = (below.born_as.path, above.ran.path)
            matches += [entry for entry in self.entries if entry.inherit and entry.label in paths]
            unread = unread or not below.born_as.read or not above.ran.read
            below = above
        standing = Standing(mark.value) if mark else Standing.LISTED if matches else Standing.OTHER
        return standing, unread

    @invariant()
    def the_tree_tells_the_truth_or_that_it_does_not_know(self):
        changed = self.tree.changed()
        for person in self.living():
            reasons = self.tree.reasons(person.pid, person.start_time)
            said = self.standing(reasons)
            truth, unread = self.truth(person)
            assert said in (truth, Standing.UNKNOWN)
            assert said is truth or unread or self.gap
            if person.told is not None:
                assert (said is not person.told) == ((person.pid, person.start_time) in changed)
            person.told = said

    @staticmethod
    def standing(reasons):
        if reasons is None:
            return Standing.UNKNOWN
        marks = [Standing(reason.mark.value) for reason in reasons if reason.mark]
        return marks[0] if marks else Standing.LISTED if reasons else Standing.OTHER


@pytest.mark.parametrize("long", [family.LONG, 2])
def test_the_tree_against_a_naive_oracle(monkeypatch, long):
    monkeypatch.setattr(family, "LONG", long)
    run_state_machine_as_test(
        Truth, settings=settings(max_examples=40, stateful_step_count=40, deadline=None, print_blob=True)
    )
