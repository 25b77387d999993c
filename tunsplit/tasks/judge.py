"""Judges owners of flows: the process tree kept current by events, and the policy over it.

Theory of operation. The kernel queues what a process becomes before the process can send (kernel/procevents.py), so
`prepare` empties that queue, without an await, before each first packet is judged: from then on the tree knows every
program that can have sent it. Between packets a task does the same, so that no queue overflows and no program that is
gone again was missed. After an overrun all processes are looked at anew before anything else is judged.

If the events fail, nothing is judged: a KernelError reaches whoever asks, and the packet is refused.
"""

import json
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tunsplit.engine import processstate
from tunsplit.engine.attribution import Owner
from tunsplit.engine.policy import Judgement, Policy
from tunsplit.engine.reasons import Image, Reasons
from tunsplit.engine.rules import keys_of
from tunsplit.errors import KernelError, TunsplitError
from tunsplit.kernel.procevents import BATCH, Event, Exec, Exit, Fork, Overrun, ProcessEvents, UidChanged
from tunsplit.kernel.procfs import Processes, Recalled
from tunsplit.kernel.procpid import pids
from tunsplit.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable

SAVE_S = 1.0  # how much of the tree a SIGKILL may cost; whoever was born since counts as missed
REST = 20  # times as long as saving took, before it is saved again
RETRY_S = 1.0
MOST_BATCHES = 256  # of events before one packet is judged: a fork bomb must not keep us for ever
MOST_ROUNDS = 8  # of programs that are read while others are started
UNTOLD = frozenset(("cmdline", "cgroup"))  # what may change without an event
KEPT_S = 7 * 86400.0  # for how long a tree that no daemon keeps is there for the next one
GAP_S = 60.0  # without us, after which who was born meanwhile is believed as at a first start

logger = logging.getLogger(__name__)


class Judge:
    """The organ of judgement."""

    def __init__(self, policy: Policy, processes: Processes, state_file: Path | None) -> None:
        """Subscribe to events, and take the first look at all processes.

        Args:
            policy: what applies from the start.
            processes: reads /proc.
            state_file: where the tree survives us; None: nowhere.

        Raises:
            KernelError: there are no process events to be had.
        """
        self.policy = policy
        self.failure: str | None = None
        self.on_change: Callable[[set[tuple[int, int]]], None] = lambda _: None
        self.on_exec: Callable[[Process], None] = lambda _: None
        self.is_resolver: Callable[[Process], bool] = lambda _: False
        self.counters: Counter[str] = Counter()
        self._events = ProcessEvents()
        self._processes = processes
        self._state_file = state_file
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._saved: bytes | None = None
        self._lost = False  # events, since the last look at all processes
        processes.keys = keys_of(policy.rules)
        processes.recall = self.recall
        saved, recent = self._load()
        if state_file is not None:
            sweep(state_file.parent)
        self.tree = processstate.load(saved, policy.rules, self._look_at_all(), recent=recent)

    # Judging

    def prepare(self) -> None:
        """Take in all that has happened to processes.

        Raises:
            KernelError: that cannot be known; nothing may be judged.
        """
        try:
            for _ in range(MOST_ROUNDS):
                self._drain()
                if not (unread := self.tree.take_unread()):
                    break
                for process in self._read(unread):
                    self.on_exec(process)
        except KernelError as error:
            self.failure = str(error)
            raise
        self.failure = None

    def judge(self, owner: Owner | None) -> Judgement:
        """The verdict over a flow of this owner; None: nobody was found. Call `prepare` before."""
        return self.policy.judge(owner, self.reasons, self.is_resolver)

    def reasons(self, process: Process) -> Reasons | None:
        """Why this process is on its side; None: nobody can tell."""
        if unproved := self.tree.take_unproved(process.pid, process.start_time):
            self._read(unproved)
        reasons = self.tree.reasons(process.pid, process.start_time)
        if reasons is None:
            # Not read yet, or changed in what no event tells: its arguments, its control group.
            self.look_again(process.pid)
            reasons = self.tree.reasons(process.pid, process.start_time)
        elif self._processes.keys & UNTOLD and (image := self.tree.image(process.pid)) is not None:
            # Not by `process`, which may be what it was long ago: when its flow opened.
            self._read([(process.pid, image)])
            reasons = self.tree.reasons(process.pid, process.start_time)
        return reasons

    def recall(self, pid: int) -> Recalled | None:
        """What a process is as far as events tell; None where it has to be read."""
        if self._processes.keys & UNTOLD:
            return None
        recalled = self.tree.recall(pid)
        return None if recalled is None else Recalled(*recalled)

    def look_again(self, pid: int) -> Process | None:
        """Read a process and its ancestors anew."""
        found = None
        for one in (pid, *(process.pid for process in self._line(pid))):
            image = self.tree.image(one)
            process = self._processes.read(one)
            if process is not None and image is not None:
                self.tree.look(process, image)
            found = found or process
        return found

    def set_policy(self, policy: Policy) -> None:
        """Judge by another policy from now on."""
        self.policy = policy
        if keys_of(policy.rules) - self._processes.keys:
            self._processes.keys = keys_of(policy.rules)
            for pid in pids():
                image = self.tree.image(pid)
                process = self._processes.read(pid)
                if process is not None and image is not None:
                    self.tree.look(process, image)
        self._processes.keys = keys_of(policy.rules)
        self.tree.set_rules(policy.rules)

    # Tasks

    async def watch(self) -> None:
        """Take events in as they come, until cancelled; and tell who has changed."""
        while True:
            known = self.failure
            try:
                if known is None:
                    await trio.lowlevel.wait_readable(self._events.fileno())
                self.prepare()
                self.tell()
            except KernelError as error:
                if known is None:
                    logger.error("process events failed: nothing is judged", extra={"error": str(error)})
                await trio.sleep(RETRY_S)
                self._begin_anew()

    def _begin_anew(self) -> None:
        """Subscribe anew; what happened meanwhile nobody has heard."""
        self._lost = True
        try:
            events = ProcessEvents()
        except TunsplitError as error:
            logger.debug("process events do not come back", extra={"error": str(error)})
            return
        self._events.close()
        self._events = events

    def close(self) -> None:
        """End the subscription."""
        self._events.close()

    def tell(self) -> None:
        """Tell who stands elsewhere than when last asked for."""
        if changed := self.tree.changed():
            self.on_change(changed)

    async def save(self) -> None:
        """Keep the tree on disk as it changes, until cancelled."""
        pause = SAVE_S
        while True:
            await trio.sleep(pause)
            began = trio.current_time()
            self.save_now()
            # Nothing is carried meanwhile, and who has many children is to cost the others little.
            pause = max(SAVE_S, REST * (trio.current_time() - began))

    def save_now(self) -> None:
        """Write the tree, if it tells more than /proc and has changed."""
        if self._state_file is None:
            return
        data = None
        if self.tree.tells_more_than_proc():
            data = json.dumps({"boot": self._boot, "tree": processstate.dump(self.tree)}).encode()
        try:
            if data is None:
                self._state_file.unlink(missing_ok=True)
            elif data != self._saved:
                self._state_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                new = self._state_file.with_suffix(".new")
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
                    file.write(data)
                new.replace(self._state_file)
            if data is not None:  # the time is that of the last look, in seconds since boot
                os.utime(self._state_file, (_now(), _now()))
            self._saved = data
        except OSError as error:
            self.counters["process_tree_not_saved"] += 1
            logger.warning("the process tree cannot be saved", extra={"error": str(error)})

    def statistics(self) -> dict[str, int]:
        """How many processes are known, and how."""
        return {**{f"tree_{name}": count for name, count in self.tree.statistics().items()}, **self.counters}

    # How it is done

    def _read(self, named: list[tuple[int, Image]]) -> list[Process]:
        """Look at those whom the tree named."""
        read = [(process, image) for pid, image in named if (process := self._processes.read(pid)) is not None]
        # What was read may be what an event says that came meanwhile: then the tree does not take it.
        self._drain()
        for process, image in read:
            self.tree.look(process, image)
        return [process for process, _ in read]

    def _drain(self) -> None:
        for _ in range(MOST_BATCHES):
            try:
                events = self._events.read()
            except KernelError:
                self._lost = True
                raise
            for event in events:
                if isinstance(event, Overrun):
                    self._lost = True
                else:
                    self._apply(event)
            if len(events) < BATCH:
                break
        else:
            raise KernelError("processes are born faster than they can be taken in")
        if self._lost:  # the queue has been emptied, and goes on from here
            self.counters["process_events_overrun"] += 1
            self.tree.rescan(self._look_at_all())
            self._lost = False

    def _apply(self, event: Event) -> None:
        tree = self.tree
        match event:
            case Fork(_, parent, child, child_tgid, at):
                if child == child_tgid:
                    tree.fork(parent, child, at)
                    self._processes.expect(child)
                else:
                    tree.thread(child_tgid)
            case Exec(_, tgid, at):
                tree.exec(tgid, at)
                self._processes.expect(tgid)
            case Exit(pid, tgid, at):
                tree.exit(pid, tgid, at)
            case UidChanged(pid, tgid, _, at) if pid == tgid:
                tree.uid_changed(tgid, at)

    def _look_at_all(self) -> list[Process]:
        return [process for pid in pids() if (process := self._processes.read(pid)) is not None]

    def _line(self, pid: int) -> list[Process]:
        node = self._processes.read(pid)
        return [] if node is None else self.tree.lineage(pid, node.start_time)[1:]

    def _load(self) -> tuple[object, bool]:
        """What was saved, and whether that was so lately that who was born since was missed."""
        if self._state_file is None:
            return None, False
        try:
            with os.fdopen(os.open(self._state_file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                status = os.fstat(file.fileno())
                saved = json.load(file) if status.st_uid == os.geteuid() else None
        except FileNotFoundError:
            return None, False
        except (OSError, ValueError) as error:
            logger.warning("the saved process tree cannot be read", extra={"error": str(error)})
            return None, False
        if not isinstance(saved, dict) or saved.get("boot") != self._boot:
            return None, False
        return saved.get("tree"), _now() - status.st_mtime < GAP_S


def sweep(directory: Path) -> None:
    """Forget the trees of network namespaces that are gone, or have been without a daemon for days."""
    for file in directory.glob("processes-*"):
        try:
            touched = file.lstat().st_mtime
            # While it is written, a file has the time of day (`save_now`), which is later than any since boot.
            if (_now() if touched <= _now() else time.time()) - touched > KEPT_S:
                file.unlink()
        except FileNotFoundError:
            continue  # its daemon has put it in its place meanwhile, or has swept too
        except OSError as error:
            logger.warning("an old process tree cannot be removed", extra={"error": str(error)})


def _now() -> float:
    """Seconds since boot, suspended ones too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
