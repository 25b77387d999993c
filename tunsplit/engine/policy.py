"""Policy: which side an app belongs on.

Theory of operation. A rule is one `[[app]]` entry: matchers that must all agree. An app is a program that a
rule matches, with its descendants; the process tree says by which reasons a process is listed. In mode exclude
who is listed takes the uplink and all others the tunnel; mode include is its mirror; what was said by hand
holds in both. Every process that may have sent the flow must be on one side, else the flow is ambiguous; if
one of them cannot be known, it is unattributed. What a matcher's yes is worth, engine/matchers.py says.

A local resolver asks in its own name what other apps ask of it, and nobody can tell for whom. An included app among
them would have its names resolved beside the tunnel, so the tunnel is where a local resolver belongs, in both modes;
unless a rule says `force`, or somebody has said so by hand.

Without its client there is no tunnel: while that is down, the VPN's client has the uplink, whatever else is said of it,
and also when splitting is off. Who carries the tunnel's own packets keeps it while the tunnel is up; what else belongs
to the client is judged like any other app then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from tunsplit.engine.attribution import Certainty, Owner
from tunsplit.engine.reasons import OTHER, UNKNOWN, Reasons, Standing, standing_of
from tunsplit.engine.rules import Rule
from tunsplit.process import Process


class Verdict(StrEnum):
    """Policy's answer."""

    TUNNEL = "tunnel"
    UPLINK = "uplink"
    BLOCK = "block"


class Mode(StrEnum):
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


AMBIGUOUS, GONE, UPLINK = Certainty.AMBIGUOUS, Certainty.GONE, Verdict.UPLINK
LOCAL_RESOLVER = "local resolver"  # the reason of its verdict
UNATTRIBUTED = "unattributed"  # likewise where nobody can tell
FORWARDED = "forwarded"  # likewise of a guest's
OFF = "splitting is off"


class Judgement(NamedTuple):
    """A verdict and why, in a few words that users' scripts may rely on."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules, and what becomes of flows that they cannot be asked about.

    `enabled` is False after `tunsplit off`; `clients` are the rules that tell the VPN's client.
    """

    rules: tuple[Rule, ...]
    mode: Mode = Mode.EXCLUDE
    enabled: bool = True
    unattributed: Verdict = Verdict.BLOCK
    ambiguous: Verdict = Verdict.BLOCK
    forwarded: Verdict = Verdict.TUNNEL
    clients: tuple[Rule, ...] = ()

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """Those that list apps, and those that tell the VPN's client."""
        return (*self.rules, *self.clients)

    def judge(
        self,
        owner: Owner | None,
        reasons_of: Callable[[Process], Reasons | None],
        is_resolver: Callable[[Process], bool] = lambda _: False,
        stranded: Callable[[Process], str | None] = lambda _: None,
    ) -> Judgement:
        """The verdict over a flow of this owner; None: nobody was found.

        Args:
            owner: who sends it.
            reasons_of: asks the process tree.
            is_resolver: whether a process is a local resolver; asked only where it matters.
            stranded: why a process could do nothing in the tunnel, being the VPN's client; None: it is not, or could.
                Asked after `reasons_of`.
        """
        if not self.enabled and not self.clients:
            return Judgement(Verdict.TUNNEL, OFF)
        if owner is None or owner.certainty is GONE:
            return Judgement(self.unattributed, UNATTRIBUTED) if self.enabled else Judgement(Verdict.TUNNEL, OFF)
        judgements = [
            self._judge_holder(process, reasons_of(process), is_resolver, stranded(process))
            for process in owner.holders
        ]
        if not self.enabled and not any(one and one.verdict is Verdict.UPLINK for one in judgements):
            return Judgement(Verdict.TUNNEL, OFF)
        known = [judgement for judgement in judgements if judgement is not None]
        if len(known) < len(judgements):
            return Judgement(self.unattributed, UNATTRIBUTED)
        if owner.certainty is AMBIGUOUS or len({judgement.verdict for judgement in known}) != 1:
            return Judgement(self.ambiguous, "ambiguous")
        return known[0]

    def judge_forwarded(self) -> Judgement:
        """The verdict over what this host forwards for guests, who are no apps."""
        if not self.enabled and self.forwarded is not Verdict.BLOCK:
            return Judgement(Verdict.TUNNEL, "splitting is off")
        return Judgement(self.forwarded, FORWARDED)

    def judge_process(self, reasons: Reasons | None) -> Judgement | None:
        """The verdict over one process; None when nobody can tell."""
        standing = standing_of(reasons)
        if standing is UNKNOWN:
            return None
        verdict = MARKED.get(standing) or VERDICTS[self.mode][standing is OTHER]
        return Judgement(verdict, reasons[0].words if reasons else "default")

    def _judge_holder(
        self, process: Process, reasons: Reasons | None, is_resolver: Callable[[Process], bool], stranded: str | None
    ) -> Judgement | None:
        judgement: Judgement | None
        if stranded is not None:
            judgement = Judgement(Verdict.UPLINK, stranded)
        elif not self.enabled:
            judgement = Judgement(Verdict.TUNNEL, OFF)
        else:
            judgement = self.judge_process(reasons)
        if judgement is None or judgement.verdict is not UPLINK or self._is_forced(reasons or ()):
            return judgement
        return Judgement(Verdict.TUNNEL, LOCAL_RESOLVER) if is_resolver(process) else judgement

    def _is_forced(self, reasons: Reasons) -> bool:
        forced = {rule.number for rule in self.rules if rule.force}
        return any(reason.mark is not None or reason.rule in forced for reason in reasons)
