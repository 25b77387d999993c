"""A verdict that was given is given again until something can have changed it; events are the test's."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tunsplit.engine.attribution import Certainty, Owner
from tunsplit.engine.matchers import CgroupRule, NameRule
from tunsplit.engine.policy import LOCAL_RESOLVER, Judgement, Mode, Policy, Verdict
from tunsplit.engine.reasons import Mark
from tunsplit.engine.rules import Rule
from tunsplit.kernel.procevents import Event, Exec, Exit, Fork, Overrun
from tunsplit.kernel.procfs import Processes
from tunsplit.process import Process
from tunsplit.tasks import judge as module
from tunsplit.tasks.judge import Judge

RULE = Rule(1, "sleep", (NameRule("sleep"),))
LISTED, OTHER = Judgement(Verdict.UPLINK, "rule 1: sleep"), Judgement(Verdict.TUNNEL, "default")


class World:
    """A judge over a program that sleeps, who counts how often the rules are asked."""

    def __init__(self, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        self.coming: list[list[Event]] = []
        self.asked = 0
        monkeypatch.setattr(module, "ProcessEvents", lambda: self)
        self.processes = Processes()
        self.judge = Judge(Policy((RULE,)), self.processes, None)
        process = self.processes.read(child.pid)
        assert process is not None
        self.process = process
        reasons = self.judge.reasons

        def counted(process: Process):
            self.asked += 1
            return reasons(process)

        monkeypatch.setattr(self.judge, "reasons", counted)

    def read(self) -> list[Event]:
        return self.coming.pop() if self.coming else []

    def close(self) -> None:
        pass

    def judged(self, certainty: Certainty = Certainty.EXACT) -> Judgement:
        self.judge.prepare()
        return self.judge.judge(Owner((self.process,), certainty))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with subprocess.Popen(["sleep", "60"]) as child:
        made = World(child, monkeypatch)
        yield made
        made.judge.close()
        made.processes.close()
        child.kill()


def test_the_rules_are_asked_once(world):
    assert [LISTED] * 3 == [world.judged() for _ in range(3)]
    assert 1 == world.asked


def test_they_are_asked_again_after_an_event_that_concerns_it(world):
    world.judged()
    world.coming = [[Exec(world.process.pid, world.process.pid, 2**40)]]

    assert LISTED == world.judged()
    assert 1 < world.asked


def test_what_is_said_holds_at_once(world):
    """L2, L3, L18: from the moment that a policy, or a mark, is another."""
    said = [world.judged()]
    world.judge.set_policy(Policy((RULE,), mode=Mode.INCLUDE))
    said.append(world.judged())
    world.judge.set_policy(Policy((RULE,), enabled=False))
    said.append(world.judged())
    world.judge.set_policy(Policy(()))
    said.append(world.judged())
    world.judge.tree.mark(world.process.pid, world.process.start_time, Mark.EXCLUDED)
    said.append(world.judged())
    world.judge.tree.clear_marks()
    said.append(world.judged())

    verdicts = [Verdict.UPLINK, Verdict.TUNNEL, Verdict.TUNNEL, Verdict.TUNNEL, Verdict.UPLINK, Verdict.TUNNEL]
    assert verdicts == [judgement.verdict for judgement in said]


def test_who_becomes_a_local_resolver_or_is_none_any_more_is_judged_as_such(world):
    """L32: no event tells."""
    said = []
    for is_resolver in (False, True, True, False):
        world.judge.is_resolver = lambda *_, answer=is_resolver, **__: answer
        said.append(world.judged())

    resolver = Judgement(Verdict.TUNNEL, LOCAL_RESOLVER)
    assert [LISTED, resolver, resolver, LISTED] == said


def test_whether_it_is_a_local_resolver_is_asked_with_what_it_asks_by(world):
    asked = []

    def is_resolver(process, sockets=()):
        asked.append((process.pid, sockets))
        return False

    world.judge.is_resolver = is_resolver
    world.judge.prepare()
    for certainty in (Certainty.EXACT, Certainty.EXACT, Certainty.SHARED):
        world.judge.judge(Owner((world.process,), certainty), (7, 8))
    assert [(world.process.pid, (7, 8))] * 3 == asked


def test_who_is_looked_at_again_is_with_its_ancestors(world, monkeypatch):
    read: list[int] = []
    real = world.processes.read

    def counted(pid):
        read.append(pid)
        return real(pid)

    monkeypatch.setattr(world.processes, "read", counted)
    found = world.judge.look_again(world.process.pid)
    assert world.process.pid == found.pid
    assert [world.process.pid, os.getpid()] == read[:2]
    assert 1 == read[-1]


def test_who_is_not_sure_is_never_remembered(world):
    world.judged()

    assert Verdict.BLOCK is world.judged(Certainty.AMBIGUOUS).verdict
    assert Verdict.BLOCK is world.judged(Certainty.GONE).verdict


@pytest.mark.parametrize(
    "policy",
    [
        Policy((Rule(1, "unit", (CgroupRule("/nowhere"),)),)),
        Policy((), clients=(Rule(1, "client", (NameRule("nobody"),), client=True),)),
    ],
)
def test_nothing_is_remembered_where_it_hangs_on_what_no_event_tells(world, policy):
    world.judge.set_policy(policy)

    assert [OTHER] * 3 == [world.judged() for _ in range(3)]
    assert 3 == world.asked


def test_a_reused_pid_is_a_stranger(world):
    world.judged()
    world.process = world.process._replace(start_time=world.process.start_time + 1)

    assert Verdict.BLOCK is world.judged().verdict


def test_what_is_remembered_is_bounded(world, monkeypatch):
    monkeypatch.setattr(module, "JUDGED", 1)
    world.judged()
    world.judged()

    assert 2 == world.asked


def test_ends_are_told_to_who_looks_for_holders(world, monkeypatch):
    """Of a process that opens no flow any more; and of one that has ended with all of its threads."""
    told: list[int] = []
    ended: list[int] = []
    monkeypatch.setattr(world.processes, "ended", told.append)
    monkeypatch.setattr(world.processes.newcomers, "ended", ended.append)
    pid, at = world.process.pid, 2**40
    world.coming = [[Fork(pid, pid, pid + 1, pid, at), Fork(pid, pid, pid + 2, pid, at), Exit(pid + 1, pid, at)]]
    world.judge.prepare()
    assert [] == told == ended
    world.coming = [[Exit(pid, pid, at)]]
    world.judge.prepare()
    assert ([pid], []) == (told, ended)
    world.coming = [[Exit(pid + 2, pid, at)]]
    world.judge.prepare()
    assert ([pid], [pid]) == (told, ended)


def test_births_are_told_to_who_looks_for_holders(world, monkeypatch):
    """And that some were lost; threads are no births, and of a line it can be asked."""
    told: list[int | str] = []
    monkeypatch.setattr(world.processes.newcomers, "note_birth", told.append)
    monkeypatch.setattr(world.processes.newcomers, "lose_births", lambda: told.append("lost"))
    pid, child = world.process.pid, 2**22 + 1
    world.coming = [[Fork(pid, pid, child, child, 2**40), Fork(pid, pid, child + 1, pid, 2**40)]]
    world.judge.prepare()
    assert [child] == told
    assert [child] == list(world.processes.heirs(pid))
    line = world.processes.newcomers.line
    assert {pid, child} == line(child, 2**62) != line(child, 0)
    world.coming = [[Overrun()]]
    world.judge.prepare()
    assert [child, "lost"] == told
