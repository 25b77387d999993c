"""Judges owners of flows: the process tree kept current by events, and the policy over it.

Theory of operation. The kernel queues what a process becomes before the process can send (kernel/procevents.py), so
`prepare` empties that queue, without an await, before each first packet is judged: from then on the tree knows every
program that can have sent it. Between packets a task does the same, so that no queue overflows and no program that is
gone again was missed. After an overrun all processes are looked at anew before anything else is judged.

What comes of events for others than who is judged (the children of who runs another program, say) is told in a task:
`watch` does for what it takes in, `tell_of_others` for what a judgement has taken out of the queue before it.

If the events fail, or we do with one of them, nothing is judged: a KernelError reaches whoever asks, and the packet is
refused.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import trio

from tunsplit.engine import processstate
from tunsplit.engine.attribution import Certainty, Owner
from tunsplit.engine.policy import LOCAL_RESOLVER, UNATTRIBUTED, Judgement, Policy, Verdict
from tunsplit.engine.reasons import Image, Reasons
from tunsplit.engine.rules import keys_of
from tunsplit.errors import KernelError, TunsplitError
from tunsplit.kernel.procevents import BATCH, Event, Exec, Exit, Fork, Overrun, ProcessEvents, UidChanged
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.procpid import pids
from tunsplit.process import Process
from tunsplit.tasks.treefile import TreeFile

SAVE_S = 1.0  # how much of the tree a SIGKILL may cost; whoever was born since counts as missed
REST = 20  # times as long as saving took, before it is saved again
RETRY_S = 1.0
MOST_BATCHES = 256  # of events before one packet is judged: a fork bomb must not keep us for ever
MOST_ROUNDS = 8  # of programs that are read while others are started
HEIRS = 32  # of the holder of a socket who are looked at; of one with more, nothing is guessed
UNTOLD = frozenset(("cmdline", "cgroup"))  # what may change without an event

JUDGED = 4096  # processes whose verdict is remembered
FOR_NOW = frozenset((UNATTRIBUTED, LOCAL_RESOLVER))  # reasons that may go without an event
# For what runs once a flow: Python 3.11 takes 0.5 µs to find a member of an enumeration.
EXACT, UPLINK = Certainty.EXACT, Verdict.UPLINK

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
        self.on_lost: Callable[[], None] = lambda: None  # of events, before anything is judged
        self.on_heard: Callable[[], None] = lambda: None  # of events, a moment later
        self.on_subscribed: Callable[[int], None] = lambda _: None  # anew: with this descriptor
        self.is_resolver: Callable[..., bool] = lambda *_, **__: False  # see tasks/localresolvers.py
        self.tunnel_up: Callable[[], bool] = lambda: True
        self.carries_tunnel: Callable[[int], bool] = lambda _: False  # whether this pid does
        self.counters: Counter[str] = Counter()
        self._events = ProcessEvents()
        self._processes = processes
        self._file = None if state_file is None else TreeFile(state_file)
        self._lost = False  # events, since the last look at all processes
        self._others: deque[Process] = deque()  # who is new or another, and `on_exec` has not heard of
        self._untold = False  # what came of the last events
        self._unsaved = True  # what the tree on disk does not have, perhaps
        self._heard = trio.Event()  # of an event
        self._judged: dict[tuple[int, int], Judgement] = {}  # by pid and start time …
        self._judged_as_of: tuple[Policy, int] = policy, 0  # … by this policy, and this state of the tree
        processes.keys = keys_of(policy.all_rules)
        processes.recall = self.recall
        processes.heirs = lambda pid: self.tree.heirs(pid, HEIRS)
        processes.newcomers.line = lambda pid, since: self.tree.line(pid, since)
        saved, recent = (None, False) if self._file is None else self._file.load()
        self.tree = processstate.load(saved, policy.all_rules, self._look_at_all(), recent=recent)

    # Judging

    def prepare(self) -> None:
        """Take in all that has happened to processes.

        Raises:
            KernelError: that cannot be known; nothing may be judged.
        """
        try:
            for _ in range(MOST_ROUNDS):
                self._drain()
                if unread := self.tree.take_unread():
                    self._others.extend(self._read(unread))
                if not self._others:
                    break
                while self._others:
                    self._tell_of_exec(self._others.popleft())
        except KernelError as error:
            self.failure = str(error)
            raise
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
            logger.exception("a mistake of ours: nothing is judged until all processes have been looked at anew")
            raise KernelError(f"processes cannot be followed: {self.failure}") from error
        self.failure = None

    def fail(self, why: str) -> None:
        """Judge nothing until all processes have been looked at anew: what has been taken in cannot be trusted."""
        self.failure = why
        self._lost = True

    def judge(self, owner: Owner | None, sockets: Collection[int] = ()) -> Judgement:
        """The verdict over a flow of this owner; None: nobody was found. Call `prepare` before.

        `sockets`: what it is sent by, as inodes, if its source port is not 53.
        """
        if owner is None or len(owner.holders) != 1 or owner.certainty is not EXACT or not self._by_events_alone():
            return self._judge_anew(owner, sockets)
        # Mostly it is a process that has just been judged, and nothing has happened since that could change that.
        as_of = self.policy, self.tree.changes
        if self._judged_as_of[0] is not as_of[0] or self._judged_as_of[1] != as_of[1] or len(self._judged) >= JUDGED:
            self._judged.clear()
            self._judged_as_of = as_of
        process = owner.holders[0]
        known = self._judged.get((process.pid, process.start_time))
        if known is not None and not (known.verdict is UPLINK and self.is_resolver(process, sockets)):
            return known
        judgement = self._judge_anew(owner, sockets)
        if judgement.reason not in FOR_NOW and self.tree.changes == as_of[1]:
            self._judged[process.pid, process.start_time] = judgement
        return judgement

    def _judge_anew(self, owner: Owner | None, sockets: Collection[int]) -> Judgement:
        is_resolver = partial(self.is_resolver, sockets=sockets)
        return self.policy.judge(owner, self.reasons, is_resolver, self._stranded)

    def _by_events_alone(self) -> bool:
        """Whether events tell of all that judgements over single processes depend on, but for who is a resolver."""
        return not self.policy.clients and not self.goes_by_untold

    @property
    def goes_by_untold(self) -> bool:
        """Whether a rule goes by what may change without an event."""
        return bool(self._processes.keys & UNTOLD)

    def _stranded(self, process: Process) -> str | None:
        client = self._client(process)
        if client is None or (self.tunnel_up() and not self.carries_tunnel(process.pid)):
            return None
        return client

    def is_client(self, owner: Owner | None) -> bool:
        """Whether it is the VPN's client that sends a flow of this owner, and in its own name. As for `judge`.

        Raises:
            KernelError: that cannot be known.
        """
        if owner is None or not self.policy.clients or owner.certainty in (Certainty.GONE, Certainty.AMBIGUOUS):
            return False
        for process in owner.holders:
            self.reasons(process)  # reads what is to be read of it
            if self._client(process) is None or self.is_resolver(process):
                return False
        return True

    def _client(self, process: Process) -> str | None:
        """Why this process is the VPN's client, in a few words; None: it is not. Call `reasons` before."""
        if not self.policy.clients:
            return None
        reason = self.tree.client(process.pid, process.start_time)
        return None if reason is None else reason.words

    def reasons(self, process: Process) -> Reasons | None:
        """Why this process is on its side; None: nobody can tell."""
        if unproved := self.tree.take_unproved(process.pid, process.start_time):
            self._read(unproved)
        reasons = self.tree.reasons(process.pid, process.start_time)
        if reasons is None:
            # Not read yet, or changed in what no event tells: its arguments, its control group.
            self.look_again(process.pid)
            reasons = self.tree.reasons(process.pid, process.start_time)
        elif self.goes_by_untold:
            # Not by `process`, which may be what it was long ago: when its flow opened.
            self.read_again(process.pid)
            reasons = self.tree.reasons(process.pid, process.start_time)
        return reasons

    def recall(self, pid: int) -> Process | None:
        """What a process is as far as events tell; None where it has to be read."""
        if self.goes_by_untold:
            return None
        return self.tree.recall(pid)

    def read_again(self, pid: int) -> None:
        """Read a process anew, of which something may have changed without an event."""
        if (image := self.tree.image(pid)) is not None:
            self._read([(pid, image)])

    def look_again(self, pid: int) -> Process | None:
        """Read a process and its ancestors anew."""
        found = self._look_at(pid)
        for process in [] if found is None else self.tree.lineage(pid, found.start_time)[1:]:
            self._look_at(process.pid)
        return found

    def set_policy(self, policy: Policy) -> None:
        """Judge by another policy from now on."""
        self.policy = policy
        if keys_of(policy.all_rules) - self._processes.keys:
            self._processes.keys = keys_of(policy.all_rules)
            for pid in pids():
                self._look_at(pid)
        self._processes.keys = keys_of(policy.all_rules)
        self.tree.set_rules(policy.all_rules)
        self._unsaved = True  # it may tell more than /proc now

    # Tasks

    async def watch(self) -> None:
        """Take events in as they come, until cancelled; and tell who has changed."""
        while True:
            if self.failure is None:
                await trio.lowlevel.wait_readable(self._events.fileno())
            self._hear()
            if self.failure is not None:
                await trio.sleep(RETRY_S)
                self._begin_anew()

    def hear(self) -> None:
        """Take in what has happened to processes, if anything has; never blocks.

        Called before packets are carried: those of a flow that is open are judged by nobody, and their sender may have
        become another since.
        """
        if self.failure is None and (self._others or self._events.waiting()):
            self._hear()

    def _hear(self) -> None:
        known = self.failure
        try:
            self.prepare()
            self.tell()
        except KernelError as error:
            if known is None:
                logger.error("process events failed: nothing is judged", extra={"error": str(error)})

    async def tell_of_others(self) -> None:
        """Tell who has changed by events that a judgement has taken in, and so not `watch`; until cancelled."""
        while True:
            await self._heard.wait()
            self._heard = trio.Event()
            if self._untold and self.failure is None:  # else `watch` has told, or will when it has begun anew
                self.tell()
            self.on_heard()

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
        self.on_subscribed(events.fileno())

    def fileno(self) -> int:
        """What becomes readable when something has happened to processes."""
        return self._events.fileno()

    def close(self) -> None:
        """End the subscription."""
        self._events.close()

    def tell(self) -> None:
        """Tell who stands elsewhere than when last asked for."""
        self._untold = False
        if changed := self.tree.changed():
            self.on_change(changed)

    async def save(self) -> None:
        """Keep the tree on disk as it changes, until cancelled."""
        pause = SAVE_S
        while True:
            await trio.sleep(pause)
            began = trio.current_time()
            self.save_now(anew=self._unsaved)
            # Nothing is carried meanwhile, and who has many children is to cost the others little.
            pause = max(SAVE_S, REST * (trio.current_time() - began))

    def save_now(self, *, anew: bool = True) -> None:
        """Have the tree on disk, if it tells more than /proc; not `anew`: nothing has happened since it was written."""
        if self._file is None:
            return
        try:
            if anew:
                self._file.save(processstate.dump(self.tree) if processstate.tells_more_than_proc(self.tree) else None)
            else:
                self._file.touch()
            self._unsaved = False
        except OSError as error:
            self._unsaved = True
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
            self._look(process, image)
        return [process for process, _ in read]

    def _tell_of_exec(self, process: Process) -> None:
        try:
            self.on_exec(process)
        except KernelError:  # what it has inherited is still to be found out
            self._others.appendleft(process)
            raise

    def _look_at(self, pid: int) -> Process | None:
        image = self.tree.image(pid)
        process = self._processes.read(pid)
        if process is not None and image is not None:
            self._look(process, image)
        return process

    def _look(self, process: Process, image: Image) -> None:
        self.tree.look(process, image)
        self._unsaved = True

    def _drain(self) -> None:
        for _ in range(MOST_BATCHES):
            try:
                events = self._events.read()
            except KernelError:
                self._lost = True
                raise
            if events:
                self._untold = self._unsaved = True
                self._heard.set()
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
            self._processes.newcomers.lose_births()
            # Who was born unseen may have inherited what it has from anybody, and run exec since.
            self._others.extend(self.tree.rescan(self._look_at_all()))
            self.on_lost()
            self._lost, self._unsaved = False, True

    def _apply(self, event: Event) -> None:
        tree = self.tree
        match event:
            case Fork(_, parent, child, child_tgid, at):
                if child == child_tgid:
                    tree.fork(parent, child, at)
                    self._processes.newcomers.note_birth(child)
                else:
                    tree.thread(child_tgid)
            case Exec(_, tgid, at):
                tree.exec(tgid, at)
                self._processes.newcomers.note(tgid)
            case Exit(pid, tgid, at):
                if tree.exit(pid, tgid, at):
                    self._processes.newcomers.ended(tgid)
                if pid == tgid:
                    self._processes.ended(pid)
            case UidChanged(pid, tgid, _, at) if pid == tgid:
                tree.uid_changed(tgid, at)

    def _look_at_all(self) -> list[Process]:
        return [process for pid in pids() if (process := self._processes.read(pid)) is not None]
