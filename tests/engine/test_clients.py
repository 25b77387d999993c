"""Who is the VPN's client, and what that means for its side."""

import pytest

from tests.engine.story import CURL, FIREFOX, Story, rule_for, runs
from tunsplit.engine.attribution import Certainty, Owner
from tunsplit.engine.clients import client_of_path, client_of_unit
from tunsplit.engine.matchers import PathRule, UnitRule
from tunsplit.engine.policy import LOCAL_RESOLVER, OFF, Judgement, Mode, Policy, Verdict
from tunsplit.engine.reasons import Standing
from tunsplit.engine.rules import keys_of
from tunsplit.process import Executable, FileIdentity, Process

ROOT, USER, OPENVPN_USER = 0, 1000, 110
OPENVPN = "/usr/sbin/openvpn"
THE_FILE = FileIdentity(1, 10, ROOT)
UPGRADED = FileIdentity(1, 11, ROOT)
FORGED = FileIdentity(1, 12, USER)

by_path = client_of_path(1, OPENVPN, PathRule(OPENVPN, OPENVPN, THE_FILE), OPENVPN_USER)
by_unit = client_of_unit(2, "openvpn@work.service")


def process(identity=THE_FILE, *, path=OPENVPN, uid=ROOT, own_user_namespace=True, cgroup=None):
    return Process(
        100, 1, 1, uid, Executable(path, False, identity, identity), is_own_user_namespace=own_user_namespace,
        cgroup=cgroup,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "is_client"),
    [
        (process(), True),
        (process(uid=OPENVPN_USER), True),
        (process(UPGRADED), True),
        (process(path="/somewhere/else"), True),
        (process(uid=USER), False),
        (process(FORGED), False),
        (process(UPGRADED, path="/usr/sbin/other"), False),
        (process(own_user_namespace=False), False),
        (process()._replace(executable=None), False),
    ],
)
def test_an_executable_needs_all_of_its_traits(one, is_client):
    assert is_client == by_path.claims(one)


@pytest.mark.parametrize(
    ("cgroup", "is_client"),
    [
        ("/system.slice/openvpn@work.service", True),
        ("/system.slice/system-openvpn.slice/openvpn@work.service", True),
        ("/openvpn@work.service", True),
        ("/vpn.slice/openvpn@work.service/payload", True),
        ("/system.slice/openvpn@work-service", False),
        ("/system.slice/openvpn@work.service2", False),
        ("/system.slice/other.service/openvpn@work.service", False),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/openvpn@work.service", False),
        ("/../system.slice/openvpn@work.service", False),
        ("/", False),
        (None, False),
    ],
)
def test_a_unit_is_the_systems_own(cgroup, is_client):
    assert is_client == by_unit.claims(process(FORGED, uid=USER, cgroup=cgroup))


def test_what_a_unit_is_told_by_is_read():
    assert UnitRule in [type(matcher) for matcher in by_unit.matchers]
    assert {"path"} == keys_of([by_path])
    assert {"cgroup"} == keys_of([by_unit])


# In the process tree: it lists nobody, is not inherited, and needs no known birth

vpn = rule_for(FIREFOX)
client = type(vpn)(1, FIREFOX, vpn.matchers, inherit=False, client=True)


def client_words(story, pid):
    reason = story.tree.client(pid, pid)
    return None if reason is None else reason.words


def shown(story):
    return {one.pid: (one.standing, [reason.words for reason in one.reasons]) for one in story.tree.listed()}


def test_the_client_is_told_beside_its_reasons():
    story = Story(client, rule_for(CURL, 1))
    story.fork(1, 100)
    story.exec(100, FIREFOX)
    story.fork(100, 200)
    story.exec(200, CURL)

    assert [] == story.words(100)
    assert ["tunnel client: /usr/bin/firefox", None, None] == [client_words(story, pid) for pid in (100, 200, 300)]
    assert {
        100: (Standing.OTHER, ["tunnel client: /usr/bin/firefox"]),
        200: (Standing.LISTED, ["rule 1: /usr/bin/curl"]),
    } == shown(story)


def test_who_was_born_unseen_may_be_the_client():
    """Its own program says so; what it was born of does not matter."""
    story = Story(client)
    story.tree.rescan([runs(1, CURL, parent=0), runs(100, FIREFOX)])

    assert None is story.words(100)
    assert "tunnel client: /usr/bin/firefox" == client_words(story, 100)
    assert {100: (Standing.UNKNOWN, ["tunnel client: /usr/bin/firefox"])} == shown(story)


def test_who_becomes_the_client_or_is_it_no_more_has_changed():
    story = Story(client)
    story.fork(1, 100)
    assert [] == story.words(100)
    story.exec(100, FIREFOX)
    assert {(100, 100)} == story.tree.changed()
    story.exec(100, CURL)
    assert {(100, 100)} == story.tree.changed()
    story.tree.set_rules((client, rule_for(CURL, 1)))
    assert {(100, 100)} == story.tree.changed()
    story.tree.set_rules(())
    assert {(100, 100)} == story.tree.changed()


# Judged

LISTED = rule_for(OPENVPN)
one, other = process(), process(path="/usr/bin/other")._replace(pid=200)
UPLINK = Judgement(Verdict.UPLINK, "tunnel client: openvpn")


def judge(policy, *holders, certainty=Certainty.EXACT, stranded=(one,), is_resolver=(), unknown=()):
    return policy.judge(
        Owner(holders, certainty) if holders else None,
        lambda holder: None if holder in unknown else (),
        lambda holder: holder in is_resolver,
        lambda holder: "tunnel client: openvpn" if holder in stranded else None,
    )


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("unknown", [(), (one,)])
def test_a_client_that_is_stranded_has_the_uplink_whatever_else_is_said(mode, enabled, unknown):
    policy = Policy((LISTED,), mode, enabled=enabled, clients=(by_path,))

    assert UPLINK == judge(policy, one, unknown=unknown)


def test_one_that_asks_for_others_has_it_not():
    assert Judgement(Verdict.TUNNEL, LOCAL_RESOLVER) == judge(Policy((), clients=(by_path,)), one, is_resolver=(one,))


def test_with_somebody_of_the_other_side_it_is_ambiguous():
    assert Verdict.BLOCK is judge(Policy((), clients=(by_path,)), one, other).verdict
    assert Judgement(Verdict.BLOCK, "ambiguous") == judge(Policy((), enabled=False, clients=(by_path,)), one, other)


@pytest.mark.parametrize("certainty", Certainty)
def test_switched_off_all_others_take_the_tunnel(certainty):
    policy = Policy((), enabled=False, clients=(by_path,))

    assert Judgement(Verdict.TUNNEL, OFF) == judge(policy, other, certainty=certainty, unknown=(other,))
    assert Judgement(Verdict.TUNNEL, OFF) == judge(policy)


def test_rules_and_clients_are_read_for_together():
    assert (LISTED, by_path) == Policy((LISTED,), clients=(by_path,)).all_rules
