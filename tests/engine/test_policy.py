"""Which side an app belongs on."""

from typing import NamedTuple

import pytest

from tunsplit.engine.attribution import Certainty, Owner
from tunsplit.engine.matchers import CgroupRule, CmdlineRule, NameRule, PathRule, UserRule
from tunsplit.engine.policy import Judgement, Mode, Policy, Verdict
from tunsplit.engine.processes import ProcessTree
from tunsplit.engine.rules import Rule, keys_of
from tunsplit.process import Executable, FileIdentity, Process

ROOT, USER = 0, 1000
DISK, HOME = 1, 2

FIREFOX = FileIdentity(DISK, 10, ROOT)
UPGRADED = FileIdentity(DISK, 11, ROOT)
CURL = FileIdentity(DISK, 20, ROOT)
OTHER = FileIdentity(DISK, 99, ROOT)

DEFAULT = {Mode.EXCLUDE: Verdict.TUNNEL, Mode.INCLUDE: Verdict.UPLINK}
LISTED = {Mode.EXCLUDE: Verdict.UPLINK, Mode.INCLUDE: Verdict.TUNNEL}


def runs(path, identity, path_identity="the same", *, deleted=False, pid=100, own_user_namespace=True):
    there = identity if path_identity == "the same" else path_identity
    executable = Executable(path, deleted, identity, there)
    return Process(pid, 1, 1, USER, executable, is_own_user_namespace=own_user_namespace)


firefox = runs("/usr/bin/firefox", FIREFOX)
curl = runs("/usr/bin/curl", CURL, pid=200)
shell = runs("/bin/sh", OTHER, pid=300)
init = runs("/sbin/init", OTHER, pid=1)
kernel_thread = Process(2, 1, 0, ROOT, None, is_kernel=True)
unreadable = Process(400, 1, 1, USER, None)
foreign_init = Process(1, 1, 0, ROOT, None, is_own_user_namespace=False)

firefox_rule = Rule(1, "/usr/bin/firefox", (PathRule("/usr/bin/firefox", "/usr/bin/firefox", FIREFOX),))


class Held(NamedTuple):
    """Who holds the socket, and everybody whom the process tree knows."""

    owner: Owner
    everybody: tuple[Process, ...]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("forwarded", Verdict)
def test_guests_are_on_the_side_that_was_said_and_in_the_tunnel_while_splitting_is_off(enabled, forwarded):
    judgement = Policy((), enabled=enabled, forwarded=forwarded).judge_forwarded()

    if enabled or forwarded is Verdict.BLOCK:
        assert Judgement(forwarded, "forwarded") == judgement
    else:
        assert Judgement(Verdict.TUNNEL, "splitting is off") == judgement


def owner(*lines, certainty=Certainty.EXACT):
    """Who holds the socket: each a process, then its ancestors."""
    everybody = [
        process._replace(parent=above.pid if above else 0)
        for line in lines
        for process, above in zip(line, (*line[1:], None), strict=True)
    ]
    # Who stands in two lines has the parent of the longer one.
    everybody.sort(key=lambda process: bool(process.parent))
    return Held(Owner(tuple([line[0] for line in lines]), certainty), tuple(everybody))


def judge(policy, held):
    tree = ProcessTree(policy.rules)
    if held is None:
        return policy.judge(None, lambda _: None)
    tree.picture(held.everybody)
    return policy.judge(held.owner, lambda process: tree.reasons(process.pid, process.start_time))


def policy(*rules, **settings):
    return Policy(rules or (firefox_rule,), **settings)


# An app is a program that a rule matches, with its descendants


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ((firefox,), "rule 1: /usr/bin/firefox"),
        ((firefox, shell, init), "rule 1: /usr/bin/firefox"),
        ((curl, firefox, init), "inherited from 100 (/usr/bin/firefox)"),
        ((curl, shell, firefox, init), "inherited from 100 (/usr/bin/firefox)"),
        ((curl, unreadable, firefox), "inherited from 100 (/usr/bin/firefox)"),
        ((unreadable, firefox), "inherited from 100 (/usr/bin/firefox)"),
    ],
)
def test_a_listed_app_has_its_side(mode, line, reason):
    assert Judgement(LISTED[mode], reason) == judge(policy(mode=mode), owner(line))


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    "line", [(curl,), (curl, shell, init), (curl, foreign_init), (kernel_thread,), (curl, kernel_thread)]
)
def test_all_others_have_the_other(mode, line):
    assert Judgement(DEFAULT[mode], "default") == judge(policy(mode=mode), owner(line))


def test_the_nearest_ancestor_gives_the_reason():
    grandparent = runs("/usr/bin/firefox", FIREFOX, pid=1000)
    assert "inherited from 100 (/usr/bin/firefox)" == judge(policy(), owner((curl, firefox, grandparent))).reason


def test_a_rule_that_is_not_inherited_claims_its_program_alone():
    alone = Rule(1, "/usr/bin/firefox", firefox_rule.matchers, inherit=False)
    assert "rule 1: /usr/bin/firefox" == judge(policy(alone), owner((firefox,))).reason
    assert "default" == judge(policy(alone), owner((curl, firefox))).reason


def test_an_ancestor_of_two_rules_is_inherited_from_if_one_of_them_says_so():
    alone = Rule(1, "/usr/bin/firefox", firefox_rule.matchers, inherit=False)
    both = policy(alone, Rule(2, "/usr/bin/*", (PathRule("/usr/bin/*", "/usr/bin/*", None),)))
    assert "inherited from 100 (/usr/bin/firefox)" == judge(both, owner((shell, firefox))).reason


def test_the_first_rule_that_claims_gives_the_reason():
    both = policy(firefox_rule, Rule(2, "/usr/bin/*", (PathRule("/usr/bin/*", "/usr/bin/*", None),)))
    assert "rule 1: /usr/bin/firefox" == judge(both, owner((firefox,))).reason
    assert "rule 2: /usr/bin/*" == judge(both, owner((curl,))).reason


# What is not known, or not one thing


@pytest.mark.parametrize("verdict", Verdict)
@pytest.mark.parametrize(
    "nobody",
    [
        None,
        owner((firefox,), certainty=Certainty.GONE),
        owner((unreadable, init)),
        owner((curl, unreadable)),
        owner((firefox,), (unreadable,)),
    ],
)
def test_what_is_not_known_is_unattributed(verdict, nobody):
    assert Judgement(verdict, "unattributed") == judge(policy(unattributed=verdict), nobody)


@pytest.mark.parametrize("verdict", Verdict)
@pytest.mark.parametrize(
    "two",
    [owner((firefox,), (curl,)), owner((curl, init), (shell, firefox)), owner((curl,), certainty=Certainty.AMBIGUOUS)],
)
def test_holders_on_both_sides_are_ambiguous(verdict, two):
    assert Judgement(verdict, "ambiguous") == judge(policy(ambiguous=verdict), two)


@pytest.mark.parametrize("certainty", [Certainty.EXACT, Certainty.SHARED, Certainty.INHERITED])
def test_holders_on_one_side_have_it(certainty):
    both = owner((curl, firefox), (firefox,), certainty=certainty)
    assert Judgement(Verdict.UPLINK, "inherited from 100 (/usr/bin/firefox)") == judge(policy(), both)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("whose", [None, owner((firefox,)), owner((curl,)), owner((firefox,), (curl,))])
def test_switched_off_everything_takes_the_tunnel(mode, whose):
    assert Judgement(Verdict.TUNNEL, "splitting is off") == judge(policy(mode=mode, enabled=False), whose)


# An entry is a conjunction of matchers


@pytest.mark.parametrize(
    "matchers",
    [(), (PathRule("/x", "/x", None),), (*firefox_rule.matchers, UserRule(ROOT)), (UserRule(USER), NameRule("x"))],
)
def test_an_entry_of_which_one_key_does_not_match_claims_nobody(matchers):
    assert "default" == judge(policy(Rule(1, "entry", matchers)), owner((firefox,))).reason


def test_an_entry_of_which_every_key_matches_claims_the_process():
    python = runs("/usr/bin/python3.11", OTHER)._replace(
        cmdline="python3 /srv/get.py", cgroup="/system.slice/get.service"
    )
    entry = Rule(1, "get", (NameRule("python3.11"), CmdlineRule("get"), UserRule(USER), CgroupRule("get.service")))
    assert "rule 1: get" == judge(policy(entry), owner((python,))).reason


def test_the_policy_says_what_has_to_be_read():
    assert frozenset({"path"}) == keys_of(policy().rules)
    both = policy(firefox_rule, Rule(2, "x", (CmdlineRule("x"), CgroupRule("x"))))
    assert frozenset({"path", "cmdline", "cgroup"}) == keys_of(both.rules)
    assert frozenset() == keys_of(())


def test_a_user_is_judged_also_where_the_program_is_unknown():
    assert "rule 1: user" == judge(policy(Rule(1, "user", (UserRule(USER),))), owner((unreadable, init))).reason
