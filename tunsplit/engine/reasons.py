"""Why a process is on the side that it is on: rules and marks by hand, its own and its ancestors'.

Reasons are found by walking up the line; `tunsplit.engine.processes` says what counts, and keeps the lines.
"""

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum, StrEnum
from typing import NamedTuple

from tunsplit.engine.rules import Rule
from tunsplit.process import Executable, Process

EXEC_TICKS = 1000  # 10 s: an exec takes far less from its new program to its event, whatever the load
WHO = Process._fields.index("uid")  # the fields before it: who it is; from it on: what a rule may look at


class Mark(Enum):
    """What was said by hand about a process: `pid add` and `exec`, or `exec --include`. The same in both modes."""

    EXCLUDED = "excluded"
    INCLUDED = "included"


class Reason(NamedTuple):
    """One reason. `rule` and `mark`: at most one is set; neither: the VPN's client. `ancestor`: who it comes from."""

    rule: int | None
    label: str  # the rule's
    mark: Mark | None = None
    ancestor: int | None = None  # pid
    path: str = ""  # the ancestor's program, as it was
    exited: bool = False  # the ancestor

    @property
    def words(self) -> str:
        """As users read it."""
        if self.ancestor is not None:
            gone = ", which has exited" if self.exited else ""
            return f"inherited from {self.ancestor} ({self.path or 'unknown'}){gone}"
        if self.mark is not None:
            return "by hand"
        return f"tunnel client: {self.label}" if self.rule is None else f"rule {self.rule}: {self.label}"


Reasons = tuple[Reason, ...]


class Standing(StrEnum):
    """What a process's reasons come to."""

    LISTED = "listed"  # by a rule: the mode says which side that is
    EXCLUDED = "excluded"  # by hand, whatever the mode
    INCLUDED = "included"
    OTHER = "other"  # not listed, and nothing is missing that could tell otherwise
    UNKNOWN = "unknown"


LISTED, OTHER, UNKNOWN = Standing.LISTED, Standing.OTHER, Standing.UNKNOWN


class Listed(NamedTuple):
    """A living process that has reasons, or is the VPN's client, which is the last of them then."""

    pid: int
    start_time: int | None
    path: str
    standing: Standing
    reasons: Reasons


def standing_of(reasons: Reasons | None) -> Standing:
    """A mark by hand overrides every rule, and comes first if there is one."""
    if reasons is None:
        return UNKNOWN
    if not reasons:
        return OTHER
    mark = reasons[0].mark
    return LISTED if mark is None else Standing(mark.value)


class Stand(NamedTuple):
    """All of a process that verdicts depend on."""

    standing: Standing
    is_client: bool  # the VPN's


class Birth(Enum):
    """How we know of a process."""

    SEEN = "seen"
    PICTURED = "pictured"
    MISSED = "missed"


class Image:
    """A program with its credentials, shared by all who run it since a fork. `process` is None until it was read.

    `is_shared`: more than one runs it, or has run it.
    """

    __slots__ = ("_claims", "_rules", "is_shared", "process")

    def __init__(self, process: Process | None = None) -> None:
        self.process = process
        self.is_shared = False
        self._claims: tuple[Rule, ...] = ()
        self._rules: Sequence[Rule] | None = None

    def claims(self, rules: Sequence[Rule]) -> tuple[Rule, ...]:
        """The rules that match it; none as long as it is unread."""
        process = self.process
        if process is None:
            return ()
        if self._rules is not rules:
            self._claims = tuple([rule for rule in rules if rule.claims(process)])
            self._rules = rules
        return self._claims

    def become(self, process: Process | None) -> None:
        """Take in what was read of it, or that this is not to be believed."""
        self.process = process
        self._rules = None

    def is_known(self, *, ancestor: bool) -> bool:
        """Whether no rule can match that we do not see matching."""
        process = self.process
        if process is None:
            return False
        # An init that we may not look into is of no user namespace of ours: no rule could claim it.
        return process.executable is not None or process.is_kernel or (ancestor and not process.is_own_user_namespace)

    @property
    def path(self) -> str:
        """Of its program; empty if unknown."""
        return self.process.executable.path if self.process and self.process.executable else ""


class Node:
    """A process. `parent_image`: what the parent ran at the birth."""

    __slots__ = (
        "alive", "birth", "born", "born_after", "children", "depth", "doubted", "image", "leader", "looked_at", "mark",
        "misfit", "parent", "parent_image", "pid", "proved", "recalled", "settled", "source_of", "start_time",
        "threads",
    )  # fmt: skip

    def __init__(self, pid: int, birth: Birth, image: Image, start_time: int | None, born: int) -> None:
        self.pid = pid
        self.start_time = start_time  # None: nobody has looked yet
        self.born = born  # clock ticks: the start time is not later than this
        self.born_after = -1  # and later than this: the one who had the pid before was born then
        self.birth = birth
        self.parent: Node | None = None
        self.parent_image: Image | None = None
        self.image = image
        self.proved = False  # looked at since its birth: it ran what it should have, or became another program
        self.source_of: Image | None = None  # was read by looking at this one …
        self.looked_at = 0  # … not before this, in clock ticks
        self.doubted: tuple[Image, Process] | None = None  # the same, and what was read, as long as that is in doubt
        self.settled: Image | None = None  # the one before, believed again by what was read of the next
        self.misfit: Image | None = None  # what it ran when it did not fit its parent
        self.recalled: tuple[Process, Process] | None = None  # as read of whomever, and as told last of this one
        self.mark: Mark | None = None
        self.alive = self.leader = True
        self.threads = 0  # besides the leader, as far as their births were seen
        self.children: set[Node] = set()
        self.depth = 0  # the number of ancestors, as of its birth

    @property
    def last_read(self) -> Process | None:
        """What it is as last read, of whomever: an image is shared by all who run it since a fork.

        The start time is -1 if nobody has looked at this one itself yet.
        """
        if (read := self.image.process) is None:
            return None
        return read._replace(pid=self.pid, start_time=-1 if self.start_time is None else self.start_time)

    def recall(self) -> Process | None:
        """What it is while it lives, as of the last event; None: that was not read yet.

        Its arguments and its control group may be others by now. Its parent: the one it was born of, 0 if that is dead.
        While it is the same, it is the same object: 100,000 flows of a process share it.
        """
        read = self.image.process
        if not self.alive or self.start_time is None or read is None:
            return None
        parent = self.parent.pid if self.parent is not None and self.parent.alive else 0
        if self.recalled is None or self.recalled[0] is not read or self.recalled[1].parent != parent:
            self.recalled = read, read._replace(pid=self.pid, start_time=self.start_time, parent=parent)
        return self.recalled[1]

    def doubt(self, at: int) -> list[Image]:
        """It runs another program: what was read of it just before may have been that one.

        What is not believed any more: the first may be again, see `settle`; the other, which was by what was read of
        the first, is to be read anew.
        """
        image, settled = self.source_of, self.settled
        self.doubted = self.source_of = self.settled = None
        if image is None or image.process is None or at - self.looked_at > EXEC_TICKS:
            return []
        self.doubted = image, image.process
        doubtful = [image] if settled is None else [image, settled]
        for one in doubtful:
            one.become(None)
        return doubtful

    def settle(self, process: Process) -> list[Image]:
        """It was read anew: believe what was in doubt if that was something else; otherwise it is to be read anew."""
        if self.doubted is None:
            return []
        (image, read), self.doubted = self.doubted, None
        if image.process is not None:
            return []
        if not has_program(process) or traits_of(read) == traits_of(process):
            return [image]
        image.become(read)
        self.settled = image
        return []

    def is_started_at(self, start_time: int) -> bool:
        """Whether this is the process with that start time; who has none yet takes it, if it can be its own."""
        if self.start_time is None and self.born_after < start_time <= self.born:
            self.start_time = start_time
        return self.start_time == start_time


def line_of(node: Node) -> Iterator[Node]:
    """The ancestors, nearest first."""
    above = node.parent
    while above is not None:
        yield above
        above = above.parent


def count_descendants(pid: int, nodes: Iterable[Node]) -> tuple[int, int]:
    """How many of the living descend from the living process `pid`, and how many there are; but for kernel threads."""
    living = [one for one in nodes if one.alive and not ((read := one.image.process) is not None and read.is_kernel)]
    return sum(any(above.alive and above.pid == pid for above in line_of(one)) for one in living), len(living)


def is_missed(node: Node) -> bool:
    """Whether its birth, or an ancestor's, was missed."""
    return any(one.birth is Birth.MISSED for one in (node, *line_of(node)))


def traits_of(process: Process | None) -> tuple[object, ...] | None:
    """All that a rule may look at: who differ in nothing of it are matched by the same rules."""
    return None if process is None else process[WHO:]


def process_of(image: Image | None) -> Process | None:
    """What was read of an image, if there is one."""
    return None if image is None else image.process


def program_of(process: Process | None) -> Executable | None:
    """What a process ran, if that is known."""
    return None if process is None else process.executable


def has_program(process: Process) -> bool:
    """False for one that has ended, or that we may not look into."""
    return process.executable is not None or process.is_kernel


def find_client(node: Node, rules: Sequence[Rule]) -> Reason | None:
    """Why a process is the VPN's client, whatever it descends from; None: it is not."""
    return next((Reason(None, rule.label) for rule in node.image.claims(rules) if rule.client), None)


def stand_of(node: Node, reasons: Reasons | None, rules: Sequence[Rule]) -> Stand:
    """Where a process with these reasons stands."""
    return Stand(standing_of(reasons), find_client(node, rules) is not None)


def find_listed(node: Node, rules: Sequence[Rule], *, marks: bool) -> Listed | None:
    """What is to be shown of a process; None: nothing. Arguments as below."""
    reasons, client = find_reasons(node, rules, marks=marks), find_client(node, rules)
    if not node.alive or not (reasons or client):
        return None
    shown = (*(reasons or ()), *((client,) if client else ()))
    return Listed(node.pid, node.start_time, node.image.path, standing_of(reasons), shown)


def find_reasons(node: Node, rules: Sequence[Rule], *, marks: bool) -> Reasons | None:
    """A process's reasons, a mark first, then one for each rule, from the nearest; None: nobody can tell.

    `marks`: whether somebody who is missing in the line may have been marked.
    """
    by_rule = {rule.number: Reason(rule.number, rule.label) for rule in node.image.claims(rules) if not rule.client}
    by_hand = None if node.mark is None else Reason(None, "", node.mark)
    known = node.image.is_known(ancestor=False)
    gap = overridable = False
    below = node
    while True:
        gap = gap or below.birth is Birth.MISSED
        above, image = below.parent, below.parent_image
        if above is None or image is None:
            break
        for one in (image,) if image is above.image else (image, above.image):
            known = known and one.is_known(ancestor=True)
            for rule in one.claims(rules):
                if rule.inherit and rule.number not in by_rule:
                    by_rule[rule.number] = Reason(rule.number, rule.label, None, above.pid, one.path, not above.alive)
        if by_hand is None and above.mark is not None:
            by_hand = Reason(None, "", above.mark, above.pid, above.image.path or image.path, not above.alive)
            overridable = gap
        below = above
    if by_hand is not None:
        return None if overridable else (by_hand, *by_rule.values())
    if by_rule:
        return None if gap and marks else tuple(by_rule.values())
    return () if known and not gap else None
