"""What is judged when events were lost, or a process is another than when it was read; events are the test's."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import trio
import trio.testing

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

    def waiting(self) -> bool:
        return bool(self.coming)

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


@pytest.fixture
def child_of_others() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts another one."""
    with ExitStack() as stack:

        def start() -> subprocess.Popen[bytes]:
            made = stack.enter_context(subprocess.Popen(["sleep", "60"]))
            stack.callback(made.kill)
            return made

        yield start


def become_sleep(world: World, child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    while "sleep 60" != world.read(child).cmdline:
        time.sleep(0.001)


def known(world: World, child: subprocess.Popen[bytes]) -> tuple[Process, list[set[tuple[int, int]]]]:
    """The child, excluded as all have heard; and whom they are told of later."""
    told: list[set[tuple[int, int]]] = []
    world.judge.on_change = told.append
    world.judge.tree.rescan([*world.judge._look_at_all()], birth=Birth.PICTURED)  # noqa: SLF001  as at a start
    process = world.read(child)
    assert world.is_listed(process)
    world.judge.tell()
    told.clear()
    return process, told


def test_what_a_process_was_when_its_flow_opened_is_not_believed_later(world, child):
    """A live flow knows its holder as of its opening: a switch must not take that for what the holder is now (L2)."""
    before, _ = known(world, child)
    become_sleep(world, child)
    world.events.coming = [[Exec(child.pid, child.pid, 2**40)]]

    assert [False, False, False] == [world.is_listed(one) for one in (before, world.read(child), before)]


async def test_what_was_taken_in_for_a_first_packet_is_told_as_well(world, child, nursery):
    """L1: others may hang on it, and the queue is empty when the watch comes to it."""
    before, told = known(world, child)
    world.judge.on_heard = lambda: told.append(set())
    nursery.start_soon(world.judge.tell_of_others)
    become_sleep(world, child)
    world.events.coming = [[Exec(child.pid, child.pid, 2**40)]]
    world.judge.prepare()
    await trio.testing.wait_all_tasks_blocked()

    assert [{(child.pid, before.start_time)}, set()] == told


def test_what_has_happened_is_told_before_packets_are_carried(world, child, caplog):
    """L27: those of a connection that is open are judged by nobody, and its holder may be another program by now."""
    before, told = known(world, child)
    world.judge.hear()
    assert [] == told
    become_sleep(world, child)
    world.events.coming = [[Exec(child.pid, child.pid, 2**40)]]
    world.judge.hear()
    assert [{(child.pid, before.start_time)}] == told

    world.events.coming = [KernelError("the socket failed"), []]
    world.judge.hear()
    assert "nothing is judged" in caplog.text
    world.judge.hear()  # whoever watches begins anew
    assert [[]] == world.events.coming


OVERRUN: list[Event] = [Overrun()]
STORM: list[Event] = [Exit(NOBODY, NOBODY, 1)] * BATCH


@pytest.mark.parametrize(
    "failure",
    [
        [OVERRUN + STORM[1:], *[STORM] * (MOST_BATCHES - 1)],
        [KernelError("the socket failed")],
        [ZeroDivisionError("by zero")],
    ],
    ids=["a storm after an overrun", "a failing socket", "a mistake of ours"],
)
def test_lost_events_are_made_good_before_anything_is_judged_again(world, child, failure):
    """L21, L29: whoever was born meanwhile was missed, and the exec that was lost is seen."""
    world.events.coming = failure
    with pytest.raises(KernelError):
        world.judge.prepare()
    world.events.coming = []
    world.judge.prepare()

    assert Birth.MISSED is world.judge.tree.birth(child.pid, world.read(child).start_time)


def test_who_was_born_or_became_another_unseen_may_have_inherited_sockets(world, child, child_of_others):
    """L27, L29: as after an exec that was seen; if it cannot be looked at then, it is before anything is judged."""
    known(world, child)
    become_sleep(world, child)
    stranger = child_of_others()
    heard: list[int] = []

    def on_exec(process: Process) -> None:
        heard.append(process.pid)
        if 1 == len(heard):
            raise KernelError("too many open files")

    world.judge.on_exec = on_exec
    world.events.coming = [OVERRUN]
    with pytest.raises(KernelError):
        world.judge.prepare()
    world.judge.prepare()
    assert heard[0] == heard[1]
    assert {child.pid, stranger.pid} <= set(heard)
    heard[1:] = []
    world.judge.prepare()
    assert 1 == len(heard)


def test_an_overrun_that_comes_while_somebody_is_judged_is_heard_of_before_the_next_batch(world, child):
    heard: list[Process] = []
    process, _ = known(world, child)
    world.judge.on_exec = heard.append
    lost: list[bool] = []
    world.judge.on_lost = lambda: lost.append(True)
    become_sleep(world, child)
    world.events.coming = [OVERRUN]
    assert [] == list(world.judge.reasons(process) or [])  # the rule is for command lines, which are read each time
    assert ([], [], [True]) == (heard, world.events.coming, lost)
    world.judge.hear()
    assert child.pid in {one.pid for one in heard}


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


async def test_between_two_subscriptions_births_are_missed(world, child, nursery, autojump_clock, monkeypatch):
    """L21, L29: a storm loses no event by itself, but what the old subscription still had is gone with it."""

    async def wait_readable(_: object) -> None:
        await trio.sleep(1)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    monkeypatch.setattr(Events, "fileno", lambda _: 0, raising=False)
    world.events.coming = [STORM] * MOST_BATCHES
    told: list[int] = []
    world.judge.on_subscribed = told.append
    nursery.start_soon(world.judge.watch)
    await trio.sleep(30)

    assert 2 == len(world.made)
    assert [world.judge.fileno()] == told
    assert world.judge.failure is None
    assert Birth.MISSED is world.judge.tree.birth(child.pid, world.read(child).start_time)


async def test_a_tree_that_takes_long_to_save_is_saved_more_rarely(world, nursery, autojump_clock, monkeypatch):
    """One user's 16,384 dead ancestors take a third of a second, in which nobody's packets are carried."""
    saved = []

    def save_now(*, anew: bool) -> None:
        saved.append(trio.current_time())
        autojump_clock.jump(0.3)

    monkeypatch.setattr(world.judge, "save_now", save_now)
    nursery.start_soon(world.judge.save)
    await trio.sleep(60)

    assert 11 >= len(saved) > 5
