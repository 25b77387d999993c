"""Policy: which side an app belongs on.

Theory of operation. A rule is one `[[app]]` entry: matchers that must all agree. An app is a program that a
rule matches, with its descendants; the process tree says by which reasons a process is listed. In mode exclude
who is listed takes the uplink and all others the tunnel; mode include is its mirror; what was said by hand
holds in both. Every process that may have sent the flow must be on one side, else the flow is ambiguous; if
one of them cannot be known, it is unattributed. What a matcher's yes is worth, engine/matchers.py says.

A local resolver asks in its own name what other apps ask of it, and nobody can tell for whom. An included app among
them would have its names resolved beside the tunnel, so the tunnel is where a local resolver belongs, in both modes;
unless a rule says `force`, or somebody has said so by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from tunsplit.engine.attribution import Certainty, Owner
from tunsplit.engine.reasons import Reasons, Standing, standing_of
from tunsplit.engine.rules import Rule
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

# What was said by hand holds in both modes.
MARKED = {Standing.EXCLUDED: Verdict.UPLINK, Standing.INCLUDED: Verdict.TUNNEL}


LOCAL_RESOLVER = "local resolver"  # the reason of its verdict


class Judgement(NamedTuple):
    """A verdict and why, in a few words that users' scripts may rely on."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules, and what becomes of flows that they cannot be asked about. `enabled` is False after `tunsplit off`."""

    rules: tuple[Rule, ...]
    mode: Mode = Mode.EXCLUDE
    enabled: bool = True
    unattributed: Verdict = Verdict.BLOCK
    ambiguous: Verdict = Verdict.BLOCK

    def judge(
        self,
        owner: Owner | None,
        reasons_of: Callable[[Process], Reasons | None],
        is_resolver: Callable[[Process], bool] = lambda _: False,
    ) -> Judgement:
        """The verdict over a flow of this owner; None: nobody was found.

        Args:
            owner: who sends it.
            reasons_of: asks the process tree.
            is_resolver: whether a process is a local resolver; asked only where it matters.
        """
        if not self.enabled:
            return Judgement(Verdict.TUNNEL, "splitting is off")
        if owner is None or owner.certainty is Certainty.GONE:
            return Judgement(self.unattributed, "unattributed")
        judgements = [self._judge_holder(process, reasons_of(process), is_resolver) for process in owner.holders]
        known = [judgement for judgement in judgements if judgement is not None]
        if len(known) < len(judgements):
            return Judgement(self.unattributed, "unattributed")
        if owner.certainty is Certainty.AMBIGUOUS or len({judgement.verdict for judgement in known}) != 1:
            return Judgement(self.ambiguous, "ambiguous")
        return known[0]

    def judge_process(self, reasons: Reasons | None) -> Judgement | None:
        """The verdict over one process; None when nobody can tell."""
        standing = standing_of(reasons)
        if standing is Standing.UNKNOWN:
            return None
        verdict = MARKED.get(standing) or VERDICTS[self.mode][standing is Standing.OTHER]
        return Judgement(verdict, reasons[0].words if reasons else "default")

    def _judge_holder(
        self, process: Process, reasons: Reasons | None, is_resolver: Callable[[Process], bool]
    ) -> Judgement | None:
        judgement = self.judge_process(reasons)
        if judgement is None or judgement.verdict is not Verdict.UPLINK or self._is_forced(reasons or ()):
            return judgement
        return Judgement(Verdict.TUNNEL, LOCAL_RESOLVER) if is_resolver(process) else judgement

    def _is_forced(self, reasons: Reasons) -> bool:
        forced = {rule.number for rule in self.rules if rule.force}
        return any(reason.mark is not None or reason.rule in forced for reason in reasons)
