"""The tree is written when something has happened to processes, and else said to be of now; events are the test's."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tunsplit.engine import processstate
from tunsplit.engine.policy import Policy
from tunsplit.engine.reasons import Mark
from tunsplit.kernel.procevents import Event, Fork
from tunsplit.kernel.procfs import Processes
from tunsplit.tasks import judge as module
from tunsplit.tasks.judge import SAVE_S, Judge

LATER = 1 << 40  # clock ticks
NOBODY = 2**22 + 1  # above every pid


class World:
    """A judge over a program that was listed by hand; `written` counts how often the tree was put into words."""

    def __init__(self, child: Any, processes: Processes, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.coming: list[Event] = []
        self.written = 0
        self.file = file
        self.pid = child.pid
        monkeypatch.setattr(module, "ProcessEvents", lambda: self)
        monkeypatch.setattr(processstate, "dump", self.dump)
        self.judge = Judge(Policy(()), processes, file)
        process = self.judge.look_again(child.pid)
        assert process is not None
        assert self.judge.tree.mark(child.pid, process.start_time, Mark.EXCLUDED)
        self.judge.save_now()

    def dump(self, tree: Any, real: Any = processstate.dump) -> Any:
        self.written += 1
        return real(tree)

    def read(self) -> list[Event]:
        found, self.coming = self.coming, []
        return found

    def close(self) -> None:
        pass

    def saved(self) -> set[int]:
        return {record["pid"] for record in json.loads(self.file.read_text())["tree"]["nodes"]}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with subprocess.Popen(["sleep", "60"]) as child, Processes() as processes:
        yield World(child, processes, tmp_path / "processes-1.json", monkeypatch)
        child.kill()


async def test_it_is_written_again_when_something_has_happened(world, nursery, autojump_clock):
    nursery.start_soon(world.judge.save)
    os.utime(world.file, (1, 1))
    await trio.sleep(3.5 * SAVE_S)
    assert (1, True) == (world.written, world.file.stat().st_mtime > 1)
    assert NOBODY not in world.saved()

    world.coming = [Fork(world.pid, world.pid, NOBODY, NOBODY, LATER)]
    world.judge.prepare()
    await trio.sleep(3 * SAVE_S)
    assert 2 == world.written
    assert {world.pid, NOBODY} <= world.saved()


@pytest.mark.parametrize(
    "happens",
    [
        lambda judge, pid: judge.look_again(pid),
        lambda judge, _: judge.set_policy(Policy(())),
        lambda judge, _: (judge.fail("a mistake"), judge.prepare()),
    ],
    ids=["a look", "other rules", "a look at all"],
)
async def test_so_it_is_after_whatever_else_may_change_it(world, nursery, autojump_clock, happens):
    nursery.start_soon(world.judge.save)
    happens(world.judge, world.pid)
    await trio.sleep(2.5 * SAVE_S)
    assert 2 == world.written


async def test_a_tree_that_somebody_has_removed_is_written_again(world, nursery, autojump_clock, caplog):
    nursery.start_soon(world.judge.save)
    world.file.unlink()
    await trio.sleep(2.5 * SAVE_S)
    assert world.pid in world.saved()
    assert ["the process tree cannot be saved"] == caplog.messages
