"""The policy that a configuration asks for."""

import pytest

from tunsplit.config import parse
from tunsplit.engine.matchers import CgroupRule, CmdlineRule, NameRule, UserRule
from tunsplit.engine.policy import Mode, Verdict
from tunsplit.errors import ConfigError
from tunsplit.tasks.settings import policy_of

TUNNEL = "[tunnel]\ninterface = 'wg0'\nfwmark = 1\n"


def policy(text):
    return policy_of(parse(TUNNEL + text))


def test_every_key_of_an_entry_becomes_a_matcher():
    keys = "name = 'firefox'\ncmdline = 'x$'\nuser = 'root'\ncgroup = '/a/**'\ninherit = false"
    (rule,) = policy(f"[[app]]\n{keys}").rules
    assert (NameRule("firefox"), CmdlineRule("x$"), UserRule(0), CgroupRule("/a/**")) == rule.matchers
    assert (1, "name firefox, cmdline x$, user root, cgroup /a/**", False) == (rule.number, rule.label, rule.inherit)


def test_a_rule_is_labelled_by_its_path_first():
    first, second = policy("[[app]]\npath = '/bin/sh'\n[[app]]\npath = '/bin/sh'\nuser = 1000").rules
    assert ("/bin/sh", "/bin/sh, user 1000") == (first.label, second.label)


def test_a_user_that_this_host_does_not_know_is_named():
    with pytest.raises(ConfigError, match=r"\[\[app\]\] #2 user: found 'nobody-of-this-name', expected a user"):
        policy("[[app]]\nname = 'x'\n[[app]]\nuser = 'nobody-of-this-name'")


def test_the_section_split_is_taken_over():
    split = policy("[split]\nenabled = false\nmode = 'include'\nunattributed = 'tunnel'\nambiguous = 'uplink'")
    assert (False, Mode.INCLUDE, Verdict.TUNNEL, Verdict.UPLINK) == (
        split.enabled,
        split.mode,
        split.unattributed,
        split.ambiguous,
    )
