"""Which side an app belongs on."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunsplit.engine.attribution import Certainty, Lineage, Owner
from tunsplit.engine.policy import (
    Judgement,
    Mode,
    Never,
    PathRule,
    Policy,
    Rule,
    Verdict,
    fixed_part,
    glob_regex,
    path_rule,
)
from tunsplit.process import Executable, FileIdentity, Process

ROOT, USER = 0, 1000
DISK, HOME = 1, 2

FIREFOX = FileIdentity(DISK, 10, ROOT)
UPGRADED = FileIdentity(DISK, 11, ROOT)
CURL = FileIdentity(DISK, 20, ROOT)
GAME = FileIdentity(HOME, 30, USER)
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


def owner(*lines, certainty=Certainty.EXACT):
    """Who holds the socket: each a process, then its ancestors."""
    return Owner(tuple([Lineage(line[0], line[1:]) for line in lines]), certainty)


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
    assert Judgement(LISTED[mode], reason) == policy(mode=mode).judge(owner(line))


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    "line", [(curl,), (curl, shell, init), (curl, foreign_init), (kernel_thread,), (curl, kernel_thread)]
)
def test_all_others_have_the_other(mode, line):
    assert Judgement(DEFAULT[mode], "default") == policy(mode=mode).judge(owner(line))


def test_the_nearest_ancestor_gives_the_reason():
    grandparent = runs("/usr/bin/firefox", FIREFOX, pid=1000)
    assert "inherited from 100 (/usr/bin/firefox)" == policy().judge(owner((curl, firefox, grandparent))).reason


def test_a_rule_that_is_not_inherited_claims_its_program_alone():
    alone = Rule(1, "/usr/bin/firefox", firefox_rule.matchers, inherit=False)
    assert "rule 1: /usr/bin/firefox" == policy(alone).judge(owner((firefox,))).reason
    assert "default" == policy(alone).judge(owner((curl, firefox))).reason


def test_an_ancestor_of_two_rules_is_inherited_from_if_one_of_them_says_so():
    alone = Rule(1, "/usr/bin/firefox", firefox_rule.matchers, inherit=False)
    both = policy(alone, Rule(2, "/usr/bin/*", (PathRule("/usr/bin/*", "/usr/bin/*", None),)))
    assert "inherited from 100 (/usr/bin/firefox)" == both.judge(owner((shell, firefox))).reason


def test_the_first_rule_that_claims_gives_the_reason():
    both = policy(firefox_rule, Rule(2, "/usr/bin/*", (PathRule("/usr/bin/*", "/usr/bin/*", None),)))
    assert "rule 1: /usr/bin/firefox" == both.judge(owner((firefox,))).reason
    assert "rule 2: /usr/bin/*" == both.judge(owner((curl,))).reason


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
    assert Judgement(verdict, "unattributed") == policy(unattributed=verdict).judge(nobody)


@pytest.mark.parametrize("verdict", Verdict)
@pytest.mark.parametrize(
    "two",
    [owner((firefox,), (curl,)), owner((curl, init), (shell, firefox)), owner((curl,), certainty=Certainty.AMBIGUOUS)],
)
def test_holders_on_both_sides_are_ambiguous(verdict, two):
    assert Judgement(verdict, "ambiguous") == policy(ambiguous=verdict).judge(two)


@pytest.mark.parametrize("certainty", [Certainty.EXACT, Certainty.SHARED, Certainty.INHERITED])
def test_holders_on_one_side_have_it(certainty):
    both = owner((curl, firefox), (firefox,), certainty=certainty)
    assert Judgement(Verdict.UPLINK, "inherited from 100 (/usr/bin/firefox)") == policy().judge(both)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("whose", [None, owner((firefox,)), owner((curl,)), owner((firefox,), (curl,))])
def test_switched_off_everything_takes_the_tunnel(mode, whose):
    assert Judgement(Verdict.TUNNEL, "splitting is off") == policy(mode=mode, enabled=False).judge(whose)


# An entry is a conjunction of matchers


@pytest.mark.parametrize(
    "matchers",
    [(), (Never(),), (*firefox_rule.matchers, Never()), (*firefox_rule.matchers, PathRule("/x", "/x", None))],
)
def test_an_entry_that_cannot_be_judged_whole_claims_nobody(matchers):
    assert "default" == policy(Rule(1, "entry", matchers)).judge(owner((firefox,))).reason


# A path counts when the file that lies there is the file that runs

EXACT = PathRule("/usr/bin/firefox", "/usr/lib/firefox/firefox", FIREFOX)
MISSING = PathRule("/usr/bin/firefox", "/usr/bin/firefox", None)
GLOB = PathRule("/opt/games/**", "/data/games/**", None)


@pytest.mark.parametrize(
    ("rule", "process", "matches"),
    [
        # the file itself, by any name: hard links, a symlink's end, deleted
        (EXACT, runs("/usr/lib/firefox/firefox", FIREFOX), True),
        (EXACT, runs("/somewhere/else", FIREFOX), True),
        (EXACT, runs("/usr/bin/firefox", FIREFOX, None, deleted=True), True),
        # replaced since the rule was read, and started after that
        (EXACT, runs("/usr/lib/firefox/firefox", UPGRADED), True),
        (EXACT, runs("/usr/bin/firefox", UPGRADED), True),
        (MISSING, runs("/usr/bin/firefox", FIREFOX), True),
        # upgraded while it ran, before the rule was read
        (EXACT, runs("/usr/lib/firefox/firefox", OTHER, FIREFOX, deleted=True), True),
        (EXACT, runs("/usr/bin/curl", CURL), False),
        # the path, in another mount namespace
        (EXACT, runs("/usr/bin/firefox", GAME, FIREFOX), False),
        (EXACT, runs("/usr/bin/firefox", GAME, None), False),
        (EXACT, runs("/usr/bin/firefox", CURL, FIREFOX), False),
        # … and deleted there: another user's file, another device, nothing to compare with
        (EXACT, runs("/usr/bin/firefox", FileIdentity(DISK, 50, USER), FIREFOX, deleted=True), False),
        (EXACT, runs("/usr/bin/firefox", FileIdentity(HOME, 50, ROOT), FIREFOX, deleted=True), False),
        (EXACT, runs("/usr/bin/firefox", OTHER, None, deleted=True), False),
        # an inode number given again to another user's file
        (EXACT, runs("/home/user/x", FIREFOX._replace(owner=USER)), False),
        # another user namespace, where everything can be forged
        (EXACT, runs("/usr/bin/firefox", FIREFOX, own_user_namespace=False), False),
        (EXACT, unreadable, False),
        # globs: by name, as configured or resolved, and genuine
        (GLOB, runs("/opt/games/chess/bin/chess", GAME), True),
        (GLOB, runs("/data/games/chess/bin/chess", GAME), True),
        (GLOB, runs("/opt/games/chess", GAME, None), False),
        (GLOB, runs("/opt/games/chess", GAME, GAME._replace(inode=31), deleted=True), True),
        (GLOB, runs("/opt/games", GAME), False),
        (GLOB, runs("/opt/gamesx/chess", GAME), False),
        (GLOB, runs("/home/user/opt/games/chess", GAME), False),
    ],
)
def test_a_path_matches_the_file_that_lies_there(rule, process, matches):
    assert matches == rule.matches(process)


def test_a_path_is_resolved_when_the_rule_is_made():
    files = {"/usr/bin/firefox": FIREFOX}
    links = {"/usr/bin/firefox": "/usr/lib/firefox/firefox", "/opt/games": "/data/games"}
    made = path_rule("/usr/bin/firefox", files.get, links.__getitem__)
    assert PathRule("/usr/bin/firefox", "/usr/lib/firefox/firefox", FIREFOX) == made
    assert PathRule("/opt/games/**", "/data/games/**", None) == path_rule("/opt/games/**", files.get, links.__getitem__)


# Globs


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("/opt/*", "/opt/game", True),
        ("/opt/*", "/opt/game/bin", False),
        ("/opt/**", "/opt/game/bin/x", True),
        ("/opt/**/x", "/opt/x", True),
        ("/opt/**/x", "/opt/a/b/x", True),
        ("/opt/**/x", "/optx", False),
        ("/opt/**/x", "/opt/ax", False),
        ("/opt/a**", "/opt/a/b", True),
        ("/opt/?", "/opt/a", True),
        ("/opt/?", "/opt//", False),
        ("/opt/[ab]", "/opt/b", True),
        ("/opt/[ab]", "/opt/c", False),
        ("/opt/[!ab]", "/opt/c", True),
        ("/opt/[!ab]", "/opt/a", False),
        ("/opt[!a]x", "/opt/x", False),
        ("/opt/[a-c]x", "/opt/bx", True),
        ("/opt/[]]", "/opt/]", True),
        ("/opt/[!]]", "/opt/]", False),
        ("/opt/[^a]", "/opt/^", True),
        ("/opt/[[]x", "/opt/[x", True),
        ("/opt/[a&&b]", "/opt/&", True),
        ("/opt/[+--]", "/opt/,", True),
        ("/opt/[z-a]", "/opt/z", False),
        ("/opt/[ab", "/opt/[ab", True),
        ("/opt/a.b", "/opt/axb", False),
        ("/opt/a b*\n", "/opt/a bc\n", True),
    ],
)
def test_a_glob_matches(glob, path, matches):
    assert matches == (re.compile(glob_regex(glob), re.DOTALL).fullmatch(path) is not None)


@given(st.text())
@example("[[a")
@example("[a--b][a||b]")
def test_any_text_is_a_glob(text):
    re.compile(glob_regex(text), re.DOTALL)


@given(st.text().filter(lambda text: not set(text) & set("*?[")))
def test_without_wildcards_a_glob_is_itself(text):
    assert re.compile(glob_regex(text), re.DOTALL).fullmatch(text)


@given(st.text(alphabet="ab*?[]!/"), st.text())
def test_a_single_star_never_crosses_a_slash(before, after):
    assert re.compile(glob_regex("/x/*"), re.DOTALL).fullmatch(f"/x/{before}/{after}") is None


@pytest.mark.parametrize(
    ("path", "fixed"),
    [
        ("/usr/bin/x", "/usr/bin/x"),
        ("/opt/g*/x", "/opt"),
        ("/opt/games/**", "/opt/games"),
        ("/*", ""),
        ("/a/b[c]", "/a"),
    ],
)
def test_the_fixed_part_of_a_path_has_no_wildcard(path, fixed):
    assert fixed == fixed_part(path)
