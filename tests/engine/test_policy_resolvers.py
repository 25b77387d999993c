"""A local resolver is on no side that one of its clients may not use (L32)."""

import pytest

from tunsplit.engine.attribution import Certainty, Owner
from tunsplit.engine.policy import Judgement, Mode, Policy, Verdict
from tunsplit.engine.reasons import Mark, Reason
from tunsplit.engine.rules import Rule
from tunsplit.process import Process

RESOLVER, OTHER = (Process(pid, 1, 1, 0, None) for pid in (53, 54))
LISTED = Reason(1, "/usr/sbin/dnsmasq")
BY_HAND = Reason(None, "", Mark.EXCLUDED)
IN_TUNNEL = Judgement(Verdict.TUNNEL, "local resolver")


def judge(*reasons, mode=Mode.EXCLUDE, force=False, holders=(RESOLVER,)):
    policy = Policy((Rule(1, "/usr/sbin/dnsmasq", (), force=force), Rule(2, "other", ())), mode)
    return policy.judge(Owner(holders, Certainty.EXACT), lambda _: reasons, lambda process: process is RESOLVER)


def test_in_mode_include_its_questions_go_in_the_tunnel_listed_or_not():
    assert IN_TUNNEL == judge(mode=Mode.INCLUDE)
    assert Judgement(Verdict.TUNNEL, "rule 1: /usr/sbin/dnsmasq") == judge(LISTED, mode=Mode.INCLUDE)


def test_in_mode_exclude_a_rule_takes_it_out_by_force_only():
    assert Judgement(Verdict.TUNNEL, "default") == judge()
    assert IN_TUNNEL == judge(LISTED)
    assert Judgement(Verdict.UPLINK, "rule 1: /usr/sbin/dnsmasq") == judge(LISTED, force=True)
    assert IN_TUNNEL == judge(Reason(2, "other"), force=True)  # by a rule that was not forced
    assert Verdict.UPLINK is judge(Reason(2, "other"), LISTED, force=True).verdict


@pytest.mark.parametrize("mode", Mode)
def test_what_was_said_by_hand_holds(mode):
    assert Judgement(Verdict.UPLINK, "by hand") == judge(BY_HAND, mode=mode)


@pytest.mark.parametrize("mode", Mode)
def test_who_is_none_is_judged_as_ever(mode):
    assert Policy((), mode).judge(Owner((OTHER,)), lambda _: ()) == judge(mode=mode, holders=(OTHER,))


def test_a_socket_that_is_shared_with_an_app_beside_the_tunnel_is_ambiguous():
    assert Judgement(Verdict.BLOCK, "ambiguous") == judge(LISTED, holders=(RESOLVER, OTHER))


def test_whose_reasons_nobody_knows_is_unattributed():
    policy = Policy(())
    assert "unattributed" == policy.judge(Owner((RESOLVER,)), lambda _: None, lambda _: True).reason
