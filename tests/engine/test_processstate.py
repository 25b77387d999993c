"""What survives a restart."""

import json

import pytest

from tests.engine.story import (
    CURL,
    EXCLUDED,
    FIREFOX,
    INCLUDED,
    INIT,
    SH,
    STEAM,
    USER,
    Story,
    firefox,
    rule_for,
    runs,
    steam,
)
from tunsplit.engine.processstate import dump, load, tells_more_than_proc
from tunsplit.engine.reasons import Birth


@pytest.fixture
def story():
    return Story(firefox, steam)


def restart(tree, rules, picture, change=lambda _: None):
    data = json.loads(json.dumps(dump(tree)))
    change(data["nodes"])
    return load(data, rules, picture)


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
    assert dump(tree)["nodes"][:4] == dump(orphaned)["nodes"][:4]


def test_who_is_not_there_any_more_is_dead(orphaned):
    tree = restart(orphaned, [firefox], [INIT])
    assert [] == tree.listed()
    assert {"processes": 4, "dead": 3, "missed": 0, "cut": 0} == tree.statistics()


@pytest.mark.parametrize("data", [None, {}, [], [{}], [None], [{"pid": 1}], ["x"]])
def test_without_a_state_it_is_the_first_time(data):
    for given in (data, {"nodes": data}):
        assert () == load(given, [firefox], [INIT, runs(10, CURL)]).reasons(10, 10)


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


def test_who_was_marked_and_is_forgotten_may_be_missing_in_a_line_all_the_same(story):
    """Its child was born while nobody looked, and it died before anybody knew."""
    story.fork(1, 10)
    story.tree.mark(10, 10, EXCLUDED)
    picture = [INIT, runs(11, FIREFOX, 1)]
    story.tree.rescan(picture)
    assert story.words(11) is None
    tree = restart(restart(story.tree, [firefox], picture), [firefox], picture)
    assert tree.reasons(11, 11) is None


def test_a_record_that_is_dropped_may_have_been_of_somebody_marked(orphaned):
    picture = [INIT, runs(12, CURL), runs(13, FIREFOX)]
    assert ["rule 1: /usr/bin/firefox"] == [one.words for one in restart(orphaned, [firefox], picture).reasons(13, 13)]
    for change in (lambda records: records[-1].update(mark="holy"), lambda records: records.append(records[-1])):
        assert restart(orphaned, [firefox], picture, change).reasons(13, 13) is None


def test_what_proc_does_not_tell_is_worth_keeping(story):
    story.fork(1, 10)
    story.look(10, SH)
    assert not tells_more_than_proc(story.tree)
    story.exec(10, FIREFOX)
    assert tells_more_than_proc(story.tree)
    story.exec(10, SH)
    assert not tells_more_than_proc(story.tree)
    story.tree.rescan([INIT, runs(10, SH), runs(11, CURL), runs(12, CURL, 11)])
    assert tells_more_than_proc(story.tree)


def test_who_was_listed_and_has_left_nothing_of_it_is_not_worth_keeping(story):
    story.tree.set_rules([rule_for(FIREFOX, inherit=False)])
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.fork(10, 11)
    story.exec(11, CURL)
    assert tells_more_than_proc(story.tree)
    story.exit(10)
    assert not tells_more_than_proc(story.tree)


def test_after_a_long_time_who_is_gone_is_believed_to_have_been_what_it_was(story):
    story.fork(1, 10)
    story.fork(10, 11)
    story.exec(11, CURL)
    picture = [INIT, runs(11, CURL)]
    data = json.loads(json.dumps(dump(story.tree)))
    assert () == load(data, [firefox], picture, recent=False).reasons(11, 11)
    assert load(data, [firefox], picture).reasons(11, 11) is None


def test_who_has_the_pid_of_a_dead_ancestor_stays_known(story):
    story.fork(1, 10)
    story.exec(10, FIREFOX)
    story.fork(10, 11)
    story.exit(10)
    story.tree.fork(1, 10, 20)
    story.tree.exec(10, 10_000)
    story.look(10, STEAM, start_time=20)
    story.fork(11, 12)
    story.exit(11)  # only 12's line names the first 10 now, and is recorded after the second
    second = runs(10, STEAM, start_time=20)
    tree = restart(story.tree, [firefox, steam], [INIT, second, runs(12, FIREFOX)])
    assert [10, 12] == [one.pid for one in tree.listed()]
    assert tree.birth(10, 20) is Birth.SEEN
