"""Policy: which side an app belongs on.

Theory of operation. A rule is one `[[app]]` entry: matchers that must all agree. An app is a program that a
rule matches, with its descendants: a process belongs to the rule that matches itself, else to the one
that matches its nearest ancestor and is inherited. In mode exclude what a rule claims takes the uplink and
all others the tunnel; mode include is its mirror. Every process that may have sent the flow must be on
one side, else the flow is ambiguous; if one of them cannot be known, it is unattributed.

A path alone proves nothing: in a mount namespace of one's own, anything can be mounted at
/usr/bin/firefox. A path counts when the file that lies there in our namespace is the file that runs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from tunsplit.engine.attribution import Certainty, Lineage, Owner
from tunsplit.process import Executable, FileIdentity, Process

WILDCARD = re.compile(r"[*?[]")
# The parts of a glob, the longest first: directories of any depth · anything · a name's rest · a character · a set
GLOB = re.compile(r"/\*\*/|\*\*|\*|\?|\[!?\]?[^]/]*\]|.", re.DOTALL)


class Verdict(Enum):
    """Policy's answer."""

    TUNNEL = "tunnel"
    UPLINK = "uplink"
    BLOCK = "block"


class Mode(Enum):
    """What being listed means."""

    EXCLUDE = "exclude"
    INCLUDE = "include"


# The verdict of a listed app and of all others.
VERDICTS = {
    Mode.EXCLUDE: (Verdict.UPLINK, Verdict.TUNNEL),
    Mode.INCLUDE: (Verdict.TUNNEL, Verdict.UPLINK),
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and why, in a few words that users' scripts may rely on."""

    verdict: Verdict
    reason: str


class Matcher(Protocol):
    """One key of an `[[app]]` entry."""

    def matches(self, process: Process) -> bool:
        """Whether the process is what the key says."""


class Never:
    """A key that this release cannot judge by: the entry that has it claims nobody."""

    def matches(self, process: Process) -> bool:  # noqa: ARG002 -- a Matcher, whoever asks
        """No."""
        return False


@dataclass(frozen=True, slots=True)
class PathRule:
    """`path`, exact or glob.

    `resolved` is the same path with its symlinks followed (a glob's up to its first wildcard), which is how
    the kernel names a program. `identity` is the file that an exact path led to.
    """

    path: str
    resolved: str
    identity: FileIdentity | None
    _glob: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        both = "|".join((glob_regex(self.path), glob_regex(self.resolved)))
        object.__setattr__(self, "_glob", re.compile(both, re.DOTALL) if WILDCARD.search(self.path) else None)

    def matches(self, process: Process) -> bool:
        """Whether this is the program that the process runs."""
        executable = process.executable
        # In another user namespace /proc/PID/exe can be forged whole, identity and all (prctl(2), PR_SET_MM_MAP).
        if executable is None or not process.is_own_user_namespace:
            return False
        if self._glob is not None:
            named = self._glob.fullmatch(executable.path) is not None
        elif self.identity is not None and executable.identity == self.identity:
            return True  # the very file, whatever name it was started by
        else:
            # Not the file that the rule knows: replaced since, before the process started or after.
            named = executable.path in (self.path, self.resolved)
        return named and is_genuine(executable)


def is_genuine(executable: Executable) -> bool:
    """Whether its path may be believed.

    A deleted executable (upgraded, above all) is nowhere to be compared with. What still holds: it lies on the
    same device as what replaced it and belongs to the same user. Without the right of that user nobody can
    bring a file of theirs on that device under that name, in whatever mount namespace.
    """
    running, there = executable.identity, executable.path_identity
    if running == there:
        return True
    return executable.deleted and there is not None and (running.device, running.owner) == (there.device, there.owner)


def glob_regex(glob: str) -> str:
    """Translate: `**` crosses slashes (`/**/` is also one slash), `*`, `?` and `[…]` do not."""
    return "".join(_translate(part) for part in GLOB.findall(glob))


def fixed_part(path: str) -> str:
    """The directories of a glob before its first wildcard; an exact path whole."""
    wildcard = WILDCARD.search(path)
    return path if wildcard is None else path[: path.rindex("/", 0, wildcard.start())]


def path_rule(path: str, identify: Callable[[str], FileIdentity | None], resolve: Callable[[str], str]) -> PathRule:
    """The matcher of a path as it leads now. `resolve` follows symlinks; `identify` names the file at the end."""
    fixed = fixed_part(path)
    identity = identify(path) if fixed == path else None
    return PathRule(path, resolve(fixed) + path[len(fixed) :], identity)


@dataclass(frozen=True, slots=True)
class Rule:
    """One `[[app]]` entry. `number` counts from 1 in the file's order; `label` is what its reason shows."""

    number: int
    label: str
    matchers: tuple[Matcher, ...]
    inherit: bool = True

    def claims(self, process: Process) -> bool:
        """Whether all matchers agree on this process. An entry without any claims nobody."""
        return bool(self.matchers) and all(matcher.matches(process) for matcher in self.matchers)


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules, and what becomes of flows that they cannot be asked about. `enabled` is False after `tunsplit off`."""

    rules: tuple[Rule, ...]
    mode: Mode = Mode.EXCLUDE
    enabled: bool = True
    unattributed: Verdict = Verdict.BLOCK
    ambiguous: Verdict = Verdict.BLOCK

    def judge(self, owner: Owner | None) -> Judgement:
        """The verdict over a flow of this owner; None: nobody was found."""
        if not self.enabled:
            return Judgement(Verdict.TUNNEL, "splitting is off")
        if owner is None or owner.certainty is Certainty.GONE:
            return Judgement(self.unattributed, "unattributed")
        judgements = [self._judge(lineage) for lineage in owner.holders]
        known = [judgement for judgement in judgements if judgement is not None]
        if len(known) < len(judgements):
            return Judgement(self.unattributed, "unattributed")
        if owner.certainty is Certainty.AMBIGUOUS or len({judgement.verdict for judgement in known}) != 1:
            return Judgement(self.ambiguous, "ambiguous")
        return known[0]

    def _judge(self, lineage: Lineage) -> Judgement | None:
        """The verdict over one process; None when its program, or that of an ancestor that may count, is unknown."""
        listed, others = VERDICTS[self.mode]
        process = lineage.process
        for rule in self.rules:
            if rule.claims(process):
                return Judgement(listed, f"rule {rule.number}: {rule.label}")
        known = process.executable is not None or process.is_kernel
        for ancestor in lineage.ancestors:
            if any(rule.inherit and rule.claims(ancestor) for rule in self.rules):
                path = ancestor.executable.path if ancestor.executable else "?"
                return Judgement(listed, f"inherited from {ancestor.pid} ({path})")
            # An init that we may not look into is of no user namespace of ours: no rule could claim it.
            known = known and (
                ancestor.executable is not None or ancestor.is_kernel or not ancestor.is_own_user_namespace
            )
        return Judgement(others, "default") if known else None


def _translate(part: str) -> str:
    match part:
        case "/**/":
            return "/(?:.*/)?"
        case "**":
            return ".*"
        case "*":
            return "[^/]*"
        case "?":
            return "[^/]"
    return _translate_set(part) if len(part) > 1 else re.escape(part)


def _translate_set(part: str) -> str:
    negated, members = part[1] == "!", part[1:-1].removeprefix("!")
    # What re keeps for set operations is a plain character here; a range may be backwards, and then holds nothing.
    members = re.sub(r"([\\\[\]^&~|])", r"\\\1", members).replace("--", r"-\-")
    translated = f"(?!/)[{'^' if negated else ''}{members}]"
    try:
        re.compile(translated)
    except re.error:
        return "(?!)"
    return translated
