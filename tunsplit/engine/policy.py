"""Policy: which side an app belongs on.

Theory of operation. A rule is one `[[app]]` entry: matchers that must all agree. An app is a program that a
rule matches, with its descendants: a process belongs to the rule that matches itself, else to the one
that matches its nearest ancestor and is inherited. In mode exclude what a rule claims takes the uplink and
all others the tunnel; mode include is its mirror. Every process that may have sent the flow must be on
one side, else the flow is ambiguous; if one of them cannot be known, it is unattributed. What a matcher's
yes is worth, engine/matchers.py says.
"""

from dataclasses import dataclass
from enum import Enum

from tunsplit.engine.attribution import Certainty, Lineage, Owner
from tunsplit.engine.matchers import KEYS, Matcher
from tunsplit.process import Process


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

    @property
    def keys(self) -> frozenset[str]:
        """What the rules ask of a process, by the names of the keys: nothing else need be read."""
        kinds = {type(matcher) for rule in self.rules for matcher in rule.matchers}
        return frozenset(key for kind, key in KEYS.items() if kind in kinds)

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
