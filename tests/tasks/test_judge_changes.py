"""What is judged when events were lost, or a process is another than when it was read; events are the test's."""

import subprocess
import time
from collections.abc import Iterator

import pytest
import trio

from tunsplit.engine.matchers import CmdlineRule
from tunsplit.engine.policy import Policy
from tunsplit.engine.reasons import Birth
from tunsplit.engine.rules import Rule
from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel.procevents import BATCH, Event, Exec, Exit, Overrun
from tunsplit.kernel.procfs import Processes
from tunsplit.process import Process
from tunsplit.tasks import judge as module
from tunsplit.tasks.judge import MOST_BATCHES, Judge

NOBODY = 2**22 + 1  # above every pid


class Events:
    """A subscription: what `coming` holds, batch by batch, an error in its turn."""

    def __init__(self) -> None:
        self.coming: list[list[Event] | Exception] = []
        self.closed = False

    def read(self) -> list[Event]:
        batch = self.coming.pop(0) if self.coming else []
        if isinstance(batch, Exception):
            raise batch
        return batch

    def close(self) -> None:
        self.closed = True


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Events] = []
        self.error: Exception | None = None
        monkeypatch.setattr(module, "ProcessEvents", self.subscribe)
        self.processes = Processes()
        rule = Rule(1, "read", (CmdlineRule("excluded"),))
        self.judge = Judge(Policy((rule,)), self.processes, None)

    def subscribe(self) -> Events:
        if self.error:
            raise self.error
        self.made.append(Events())
        return self.made[-1]

    @property
    def events(self) -> Events:
        return self.made[-1]

    def read(self, child: subprocess.Popen[bytes]) -> Process:
        process = self.processes.read(child.pid)
        assert process is not None
        return process

    def is_listed(self, process: Process) -> bool | None:
        self.judge.prepare()
        reasons = self.judge.reasons(process)
        return None if reasons is None else bool(reasons)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch)
    yield made
    made.processes.close()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A shell whose command line says "excluded", until a line leads it to become `sleep`."""
    with subprocess.Popen(["sh", "-c", ": excluded; read line; exec sleep 60"], stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


def become_sleep(world: World, child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    while "sleep 60" != world.read(child).cmdline:
        time.sleep(0.001)


def test_what_a_process_was_when_its_flow_opened_is_not_believed_later(world, child):
    """A live flow knows its holder as of its opening: a switch must not take that for what the holder is now (L2)."""
    world.judge.tree.rescan([*world.judge._look_at_all()], birth=Birth.PICTURED)  # noqa: SLF001  as at a start
    before = world.read(child)
    assert world.is_listed(before)
    become_sleep(world, child)
    world.events.coming = [[Exec(child.pid, child.pid, 2**40)]]

    assert [False, False, False] == [world.is_listed(one) for one in (before, world.read(child), before)]


OVERRUN: list[Event] = [Overrun()]
STORM: list[Event] = [Exit(NOBODY, NOBODY, 1)] * BATCH


@pytest.mark.parametrize(
    "failure",
    [[OVERRUN + STORM[1:], *[STORM] * (MOST_BATCHES - 1)], [KernelError("the socket failed")]],
    ids=["a storm after an overrun", "a failing socket"],
)
def test_lost_events_are_made_good_before_anything_is_judged_again(world, child, failure):
    """L21, L29: whoever was born meanwhile was missed, and the exec that was lost is seen."""
    world.events.coming = failure
    with pytest.raises(KernelError):
        world.judge.prepare()
    world.events.coming = []
    world.judge.prepare()

    assert Birth.MISSED is world.judge.tree.birth(child.pid, world.read(child).start_time)


def test_after_a_look_that_failed_events_are_lost_still(world, child, monkeypatch):
    world.events.coming = [OVERRUN]
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "read", lambda *_: (_ for _ in ()).throw(KernelError("too many open files")))
        with pytest.raises(KernelError):
            world.judge.prepare()
    world.judge.prepare()

    assert Birth.MISSED is world.judge.tree.birth(child.pid, world.read(child).start_time)


@pytest.mark.parametrize("error", [None, KernelError("no memory"), PermissionMissing("CAP_NET_ADMIN is needed")])
async def test_the_watch_outlives_whatever_fails(world, child, error, nursery, autojump_clock, monkeypatch):
    """If it ended, so would the daemon, and with it all that keeps included apps off the uplink."""
    failures = [KernelError("/proc is full")] * 3
    real = Processes.read

    def read(processes: Processes, pid: int) -> Process | None:
        if failures:
            raise failures.pop()
        return real(processes, pid)

    async def wait_readable(_: object) -> None:
        await trio.sleep(1)

    monkeypatch.setattr(Processes, "read", read)
    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    monkeypatch.setattr(Events, "fileno", lambda _: 0, raising=False)
    world.events.coming = [KernelError("the socket failed")]
    world.error = error
    nursery.start_soon(world.judge.watch)
    await trio.sleep(30)

    assert [] == failures
    assert world.judge.failure is None
    assert (1 if error else 5) >= len(world.made)
    assert Birth.MISSED is world.judge.tree.birth(child.pid, world.read(child).start_time)


async def test_a_tree_that_takes_long_to_save_is_saved_more_rarely(world, nursery, autojump_clock, monkeypatch):
    """One user's 16,384 dead ancestors take a third of a second, in which nobody's packets are carried."""
    saved = []

    def save_now() -> None:
        saved.append(trio.current_time())
        autojump_clock.jump(0.3)

    monkeypatch.setattr(world.judge, "save_now", save_now)
    nursery.start_soon(world.judge.save)
    await trio.sleep(60)

    assert 11 >= len(saved) > 5
