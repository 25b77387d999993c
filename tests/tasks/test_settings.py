"""The policy and the steering that a configuration asks for."""

import pwd

import pytest

from tunsplit.config import parse
from tunsplit.engine.matchers import CgroupRule, CmdlineRule, NameRule, PathRule, UserRule, path_rule
from tunsplit.engine.policy import Mode, Policy, Verdict
from tunsplit.engine.rules import Rule
from tunsplit.errors import ConfigError
from tunsplit.kernel.procpid import identify, resolve
from tunsplit.tasks.settings import followed, policy_of, steering_of

TUNNEL = "[tunnel]\ninterface = 'wg0'\nfwmark = 1\n"


def policy(text):
    return policy_of(parse(TUNNEL + text))


def steering(text):
    return steering_of(parse(TUNNEL + text))


def test_each_app_is_a_rule_in_the_file_s_order():
    rules = policy("[[app]]\npath = '/bin/sh'\n[[app]]\npath = '/opt/**'\ninherit = false").rules
    assert [(1, "/bin/sh", True), (2, "/opt/**", False)] == [(one.number, one.label, one.inherit) for one in rules]


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


def test_clients_are_programs_of_roots_and_units():
    path, unit = policy_of(parse("[tunnel]\ninterface = 'w'\nfwmark = 1\nclient = ['/bin/sh', 'a.service']")).clients

    assert [True, True] == [path.client, unit.client]
    assert [False, False] == [path.inherit, unit.inherit]
    assert ("/bin/sh", "a.service") == (path.label, unit.label)


def test_a_client_that_others_can_replace_is_refused(tmp_path):
    program = tmp_path / "client"
    program.write_bytes(b"")
    program.chmod(0o777)

    with pytest.raises(ConfigError, match=r"\[tunnel\] client #1: found .*/client, which is not root's alone"):
        policy_of(parse(f"[tunnel]\ninterface = 'w'\nfwmark = 1\nclient = ['{program}']"))


def test_steering_takes_what_concerns_it():
    settings = steering("[lan]\nallow = true\ndiscovery = true")
    assert ("wg0", "auto", 1, 0, True, True, True) == (
        settings.tunnel, settings.uplink, settings.fwmark, settings.transport_uid,
        settings.lan_allow, settings.lan_discovery, settings.firewall,
    )  # fmt: skip


@pytest.mark.parametrize(("user", "wanted"), [("0", 0), ("'nobody'", pwd.getpwnam("nobody").pw_uid)])
def test_the_transport_s_user_may_be_a_name_or_a_number(user, wanted):
    assert wanted == steering(f"transport_user = {user}").transport_uid


def test_a_user_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="ts-nobody"):
        steering("transport_user = 'ts-nobody'")


@pytest.fixture
def link(tmp_path):
    """A symlink to a directory with a program, beside another such directory."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program").write_bytes(name.encode())
    (tmp_path / "current").symlink_to("old")
    return tmp_path / "current"


def lead_elsewhere(link):
    link.unlink()
    link.symlink_to("new")


def test_paths_that_lead_where_they_did_make_no_other_policy(link):
    made = policy(f"[[app]]\npath = '{link}/program'\n[[app]]\npath = '{link}/**'\n[[app]]\nname = 'x'")

    assert followed(made) is made


@pytest.mark.parametrize("path", ["program", "*"])
def test_a_path_is_followed_by_its_symlinks(link, path):
    """A glob's up to its first wildcard; all else of the policy stays."""
    text = f"[split]\nmode = 'include'\n[[app]]\npath = '{link}/{path}'\nuser = 7\n[[app]]\nname = 'x'"
    made = policy(text)
    lead_elsewhere(link)

    assert policy(text) == followed(made) != made


def test_a_path_names_the_file_that_has_replaced_another(link):
    program = link / "program"
    made = policy(f"[[app]]\npath = '{program}'")
    (link / "next").write_bytes(b"")
    (link / "next").replace(program)

    assert policy(f"[[app]]\npath = '{program}'") == followed(made) != made


def test_a_path_that_leads_nowhere_any_more_names_no_file(link):
    made = policy(f"[[app]]\npath = '{link}/program'")
    (link / "program").unlink()

    (rule,) = followed(made).rules
    path = str(link / "program")
    assert (PathRule(path, str(link.with_name("old") / "program"), None),) == rule.matchers


def test_the_path_of_a_client_is_followed_as_well(link):

    def client():
        return Rule(1, "c", (path_rule(f"{link}/program", identify, resolve),), client=True)

    made = Policy((), clients=(client(),))
    lead_elsewhere(link)

    assert (client(),) == followed(made).clients != made.clients
