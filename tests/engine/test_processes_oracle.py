"""The process tree against one that forgets nothing."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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

from tests.engine.story import EXCLUDED, INCLUDED, PROGRAMS, SH, rule_for, runs
from tunsplit.engine import family
from tunsplit.engine.processes import ProcessTree
from tunsplit.engine.processstate import dump, load
from tunsplit.engine.reasons import Mark, Standing

if TYPE_CHECKING:
    from tunsplit.engine.reasons import Reasons
    from tunsplit.engine.rules import Rule


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
    before: Ran | None = None  # what it ran before that
    mark: Mark | None = None
    alive: bool = True
    told: Standing | None = field(default=None)
    answered: "tuple[int, Reasons | None] | None" = field(default=None)

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
        # What was read of it may be in doubt for good: whether the exec was under way then, cannot be told.
        # And if it runs again what it ran before, what is read now may have been read late, too.
        again = person.before is not None and person.before.path == path
        self.gap = self.gap or again or person.ran.path == path or not person.ran.read
        person.before, person.ran = person.ran, Ran(path, False)
        self.tree.exec(person.pid, self.now)
        if read:
            self.read_all()

    @rule(data=st.data(), path=st.sampled_from(PROGRAMS), read=st.booleans())
    def exec_read_early(self, data, path, read):
        """What /proc shows of somebody is ahead of the events for a moment."""
        person = self.somebody(data)
        before, person.ran = person.ran, Ran(path, False)
        look = self.tree.image(person.pid)
        self.tree.look(self.shown(person), look)
        self.read_all()
        before.read = person.ran.read = False
        self.gap = True  # that a reading was early may be found out too late to read anew
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
                person.told = person.answered = None
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
            # Who remembers an answer may go by it as long as nothing is counted.
            if person.answered is not None and person.answered[0] == self.tree.changes:
                assert person.answered[1] == reasons
            person.answered = self.tree.changes, reasons
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
