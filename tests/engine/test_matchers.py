"""What each key of an entry asks of a process."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunsplit.engine.matchers import (
    CgroupRule,
    CmdlineRule,
    NameRule,
    PathRule,
    UserRule,
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


def runs(path, identity=FIREFOX, path_identity="the same", *, deleted=False, own_user_namespace=True):
    there = identity if path_identity == "the same" else path_identity
    executable = Executable(path, deleted, identity, there)
    return Process(100, 1, 1, USER, executable, is_own_user_namespace=own_user_namespace)


unreadable = Process(400, 1, 1, USER, None)

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


# Name, user, cmdline, cgroup


@pytest.mark.parametrize(
    ("process", "matches"),
    [
        (runs("/usr/bin/firefox"), True),
        (runs("/home/user/firefox", GAME), True),
        (runs("/usr/bin/firefox", FIREFOX, None, deleted=True), True),
        # a name proves nothing, so there is nothing to forge
        (runs("/usr/bin/firefox", own_user_namespace=False), True),
        (runs("/usr/bin/firefox-bin"), False),
        (runs("/firefox/bin"), False),
        (unreadable, False),
    ],
)
def test_a_name_matches_the_last_part_of_the_path(process, matches):
    assert matches == NameRule("firefox").matches(process)


@pytest.mark.parametrize(("uid", "matches"), [(USER, True), (ROOT, False)])
def test_a_user_matches_who_the_process_acts_for(uid, matches):
    assert matches == UserRule(uid).matches(unreadable)


@pytest.mark.parametrize(
    ("pattern", "cmdline", "matches"),
    [
        (r"server\.py", "python3 /srv/server.py --port 80", True),
        (r"^python3? .*/server\.py( |$)", "python3 /srv/server.py", True),
        (r"^server", "python3 server.py", False),
        (r"a  b", "x a  b", True),
        (r"^$", "", True),
        (r"\udcff", "x \udcff", True),
        (r"x", None, False),
        (r"", None, False),
    ],
)
def test_a_cmdline_is_searched(pattern, cmdline, matches):
    assert matches == CmdlineRule(pattern).matches(unreadable._replace(cmdline=cmdline))


@pytest.mark.parametrize(
    ("glob", "cgroup", "matches"),
    [
        ("/system.slice/x.service", "/system.slice/x.service", True),
        ("/system.slice/x.service", "/system.slice/x.service/inner", False),
        ("/system.slice/x.service/**", "/system.slice/x.service/inner", True),
        ("/user.slice/**/app-steam-*.scope", "/user.slice/user-1000.slice/app.slice/app-steam-1.scope", True),
        ("/user.slice/**/app-steam-*.scope", "/user.slice/app-steam-1.scope", True),
        ("app-steam-*.scope", "/user.slice/app.slice/app-steam-1.scope", True),
        ("app-steam-*.scope", "/app-steam-1.scope", True),
        ("app-steam-*.scope", "/app-steam-1.scope/inner", False),
        ("steam-*.scope", "/app-steam-1.scope", False),
        ("/", "/", True),
        ("/*", "/", True),
        ("/*", "/a/b", False),
        ("/**", "/a/b", True),
        ("/*", None, False),
        # outside the root of our cgroup namespace
        ("/**", "/../x.service", False),
        ("x.service", "/../x.service", False),
        ("/**", "/..", False),
        ("/../**", "/../x.service", True),
        ("/**", "/..x", True),
    ],
)
def test_a_cgroup_is_matched_whole(glob, cgroup, matches):
    assert matches == CgroupRule(glob).matches(unreadable._replace(cgroup=cgroup))


@given(st.text(min_size=1), st.text())
@example("[[a", "/")
def test_any_text_is_a_glob_of_cgroups(glob, cgroup):
    CgroupRule(glob).matches(unreadable._replace(cgroup=cgroup))


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
