"""`tunsplit app`, `pid`, `on`, `off`, `reload` and `explain`: what they ask, and what they print."""

import os

import msgspec
import pytest
from click.testing import CliRunner

from tunsplit.cli import main
from tunsplit.cli.base import DEFAULT_SOCKET, absolute
from tunsplit.config import Control
from tunsplit.errors import TunsplitError

COMMANDS = [
    "app list", "app add /x", "app add /x --save", "app remove /x", "app clear",
    "pid list", "pid add 1", "pid remove 1", "pid clear", "on", "off", "reload", "explain --pid 1", "exec true",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_daemon_they_end_with_5_and_one_line(command, tmp_path):
    words = command.split()
    at = 1 if words[0] in {"on", "off", "reload", "explain", "exec"} else 2
    result = CliRunner().invoke(main, [*words[:at], "--socket", f"{tmp_path}/none", *words[at:]])

    assert (5, "") == (result.exit_code, result.stdout)
    assert 1 == len(result.stderr.splitlines())


@pytest.mark.parametrize("group", ["app", "pid"])
def test_every_command_of_a_group_has_help_with_an_example(group):
    names = {"app": ["list", "add", "remove", "clear"], "pid": ["list", "add", "remove", "clear"]}[group]
    for name in names:
        result = CliRunner().invoke(main, [group, name, "--help"])
        assert 0 == result.exit_code
        assert "Example" in result.stdout


def test_the_default_socket_is_the_configurations():
    assert Control().socket == DEFAULT_SOCKET


def test_a_daemon_at_work_is_asked_whatever_else_has_been_written_since(invoke, tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(f"[tunnel]\nnonsense = 1\n[control]\nsocket = '{tmp_path}/c.sock'\n")
    result = CliRunner().invoke(main, ["on", "-c", str(wrong)], env={"TUNSPLIT_SOCKET": None})

    assert (0, "splitting is on\n") == (result.exit_code, result.stdout)


@pytest.mark.parametrize("text", ["[control", "control = 1", "[control]\nsocket = 'c.sock'", "a = " + "[" * 5000])
def test_a_configuration_that_names_no_socket_is_said_to_be_wrong(text, tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(text)
    result = CliRunner().invoke(main, ["on", "-c", str(wrong)], env={"TUNSPLIT_SOCKET": None})

    assert 2 == result.exit_code
    assert result.stderr.startswith(f"tunsplit: {wrong}: ")


def test_the_list_as_json_is_a_list(invoke, switching):
    result = invoke("app", "list", "--json")

    assert (0, switching.apps()) == (result.exit_code, msgspec.json.decode(result.stdout))


def test_the_list_is_shown(invoke, switching, monkeypatch):
    apps = [
        {"rule": 1, "path": "/usr/bin/firefox", "inherit": True, "saved": True, "matches": [4711, 4712]},
        {"rule": 2, "path": None, "name": "st\x1beam", "user": "ada", "saved": True, "matches": []},
        {"rule": None, "path": "/opt/x", "inherit": False, "force": True, "saved": False, "matches": []},
    ]
    monkeypatch.setattr(switching, "apps", lambda: apps)

    assert [
        "1  path /usr/bin/firefox                              processes 4711 4712",
        "2  name st\\u001beam, user ada                         no process",
        "-  path /opt/x, inherit false, force true  not saved  no process",
    ] == invoke("app", "list").stdout.splitlines()


def test_an_empty_list_says_so(invoke, switching):
    switching.paths.clear()

    assert "the list is empty\n" == invoke("app", "list").stdout
    assert "no process is on the list\n" == invoke("pid", "list").stdout


def test_an_empty_path_is_refused(invoke, switching):
    """Not the directory that the command is run in."""
    before = list(switching.paths)
    for command in (("app", "add"), ("app", "remove"), ("explain", "--exe")):
        result = invoke(*command, "")
        assert (2, 'tunsplit: path: found "", expected the path of an executable, or a glob\n') == (
            result.exit_code,
            result.stderr,
        )
    assert before == list(switching.paths)


def test_a_directory_is_warned_about(invoke, tmp_path):
    words = f"{tmp_path} is a directory (for all that is in it: {tmp_path}/**), so it matches nothing yet"
    assert f"tunsplit: warning: {words}\n" == invoke("app", "add", str(tmp_path)).stderr


def test_an_app_is_put_on_the_list_and_taken_off(invoke, switching):
    assert "/bin/sh is on the list\n" == invoke("app", "add", "/bin/sh").stdout
    assert "/bin/sh is on the list already\n" == invoke("app", "add", "/bin/sh").stdout
    assert "/bin/sh" in switching.paths
    assert "/bin/sh is off the list\n" == invoke("app", "remove", "/bin/sh").stdout
    assert "/bin/sh is not on the list\n" == invoke("app", "remove", "/bin/sh").stdout
    assert "taken off the list: 1\n" == invoke("app", "clear").stdout


def test_a_path_that_does_not_exist_is_a_warning(invoke, switching):
    result = invoke("app", "add", "/nowhere/x")

    assert (0, "/nowhere/x is on the list\n") == (result.exit_code, result.stdout)
    assert "tunsplit: warning: /nowhere/x does not exist, so it matches nothing yet\n" == result.stderr


def test_a_relative_path_starts_here_and_its_symlinks_stay(invoke, switching, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "program").touch()
    (tmp_path / "link").symlink_to("real/program")
    monkeypatch.chdir(tmp_path)

    assert 0 == invoke("app", "add", "./link").exit_code
    assert f"{tmp_path}/link" in switching.paths


def test_of_a_bare_name_it_is_told_that_it_counts_as_a_file_here(invoke, switching, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    note = "tunsplit: note: sh counts as a file here; the program on the PATH is /bin/sh"
    monkeypatch.setenv("PATH", "/bin")

    assert note in invoke("app", "add", "sh").stderr.splitlines()
    assert f"{tmp_path}/sh" in switching.paths
    for path in ("./sh", "/bin/sh", "no-such-program"):
        assert "note" not in invoke("app", "add", path).stderr
    (tmp_path / "sh").touch()
    assert "note" not in invoke("app", "add", "sh").stderr


@pytest.mark.parametrize(
    ("path", "from_root"),
    [
        ("x", "{here}/x"),
        ("./x/./y//z", "{here}/x/y/z"),
        ("/a//b/.", "/a/b"),
        ("//a", "/a"),
        ("../x*", "{above}/x*"),
        ("link/../x", "{here}/deep/x"),  # up from where the link leads
        ("..", "{above}"),
        ("**", "{here}/**"),
    ],
)
def test_a_path_is_told_from_the_root(path, from_root, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "deep" / "er").mkdir(parents=True)
    (here / "link").symlink_to("deep/er")
    monkeypatch.chdir(here)

    assert from_root.format(here=here, above=tmp_path) == absolute(path)


@pytest.mark.parametrize("name", ["closed/program", "a" * 5000, "loop/program"])
def test_a_path_that_cannot_be_looked_at_is_a_path(name, tmp_path, monkeypatch):
    """By an ordinary user above all: the daemon may look."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    real = os.stat

    def stat(path, *args, **options):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)

    assert f"{tmp_path}/{name}" == absolute(name)


def test_a_name_that_no_configuration_can_hold_is_refused(invoke):
    with pytest.raises(TunsplitError, match="found bytes that are no UTF-8"):
        absolute("/x\udcff")


@pytest.mark.parametrize("command", ["add", "remove"])
def test_a_path_that_is_none_ends_with_2(invoke, command):
    result = invoke("app", command, "/a\nb")

    assert (2, "") == (result.exit_code, result.stdout)
    assert result.stderr.startswith("tunsplit: path: found ")


def test_processes_are_shown_with_their_reasons(invoke, switching):
    switching.processes = [
        {"pid": 4711, "exe": "/usr/bin/steam", "user": 1000, "reasons": ["rule 1: /usr/bin/steam", "by hand"]},
        {"pid": 52, "exe": None, "user": 0, "reasons": ["inherited from 4711 (/usr/bin/steam)"]},
    ]

    assert switching.processes == msgspec.json.decode(invoke("pid", "list", "--json").stdout)
    assert [
        "4711  /usr/bin/steam  1000  rule 1: /usr/bin/steam; by hand",
        "52    unknown         0     inherited from 4711 (/usr/bin/steam)",
    ] == invoke("pid", "list").stdout.splitlines()


def test_a_process_is_excluded_by_hand(invoke, switching):
    pid = os.getpid()

    added = invoke("pid", "add", str(pid))
    assert ("", f"process {pid} is excluded\n") == (added.stderr, added.stdout)
    assert [pid] == list(switching.by_hand)
    assert f"process {pid} is no longer listed by hand\n" == invoke("pid", "remove", str(pid)).stdout
    assert f"process {pid} is not listed by hand\n" == invoke("pid", "remove", str(pid)).stdout
    assert "no longer listed by hand: 0\n" == invoke("pid", "clear").stdout

    switching.below[pid] = 9
    added = invoke("pid", "add", str(pid))
    warning = f"tunsplit: warning: 9 of 10 processes descend from process {pid}, and are excluded with it\n"
    assert (0, warning, f"process {pid} is excluded\n") == (added.exit_code, added.stderr, added.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["pid", "add", "4194304"], 1, "tunsplit: there is no process 4194304\n"),
        (["pid", "add", "x"], 2, "'x' is not a valid integer range"),
        (["pid", "add", "0"], 2, "0 is not in the range x>=1"),
        (["explain"], 2, "name one of --pid, --exe, or --proto with --src and --dst"),
        (["explain", "--pid", "1", "--exe", "/x"], 2, "name one of"),
        (["explain", "--proto", "udp", "--src", "10.0.0.1:1"], 2, "name one of"),
        (["exec"], 2, "Missing argument"),
    ],
)
def test_wrong_words_get_one_clear_error(arguments, code, error, invoke):
    result = invoke(*arguments)

    assert (code, "") == (result.exit_code, result.stdout)
    assert error in result.stderr


def test_splitting_is_switched(invoke, switching):
    assert "splitting is off: every app uses the tunnel\n" == invoke("off").stdout
    assert not switching.enabled
    assert "splitting is on\n" == invoke("on").stdout
    assert switching.enabled


def test_a_reload_says_what_changed_or_what_is_wrong(invoke, switching, monkeypatch):
    assert "[[app]] #2 is new\n" == invoke("reload").stdout
    assert '["[[app]] #2 is new"]\n' == invoke("reload", "--json").stdout
    switching.wrong = "t.toml: [dns]: found nothing"
    result = invoke("reload")
    assert (2, "", "tunsplit: t.toml: [dns]: found nothing\n") == (result.exit_code, result.stdout, result.stderr)
    monkeypatch.setattr(switching, "reload", list)
    assert "nothing changed\n" == invoke("reload").stdout


@pytest.mark.parametrize(
    ("arguments", "question"),
    [
        (["--pid", "4711"], {"pid": 4711}),
        (["--exe", "x"], {"exe": "{here}/x"}),
        (
            ["--proto", "UDP", "--src", "10.0.0.1:1", "--dst", "[2001:db8::1]:2"],
            {"protocol": "udp", "source": "10.0.0.1:1", "destination": "[2001:db8::1]:2"},
        ),
    ],
)
def test_a_question_reaches_the_daemon(arguments, question, invoke, switching, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "exe" in question:
        question = {"exe": f"{tmp_path}/x"}

    assert switching.answer == msgspec.json.decode(invoke("explain", "--json", *arguments).stdout)
    assert [dict.fromkeys(("pid", "exe", "protocol", "source", "destination")) | question] == switching.asked


def test_the_chain_of_judgement_is_shown_step_by_step(invoke, switching):
    app, parent = {"pid": 4711, "exe": "/x\x1b", "user": 1000}, {"pid": 2, "exe": "", "user": 0}
    switching.answer = {
        "app": app,
        "enabled": True,
        "holders": [{**app, "parents": [parent, parent], "reasons": ["rule 1: /x"]}, {"pid": 7, "birth": "seen"}],
        "way": {"side": "uplink"},
        "nothing": None,
        "empty": [],
    }

    assert [
        "app     /x\\u001b, process 4711 of user 1000",
        "enabled yes",
        "holders",
        "  pid     4711",
        "  exe     /x\\u001b",
        "  user    1000",
        "  parents unknown, process 2 of user 0",
        "          unknown, process 2 of user 0",
        "  reasons rule 1: /x",
        "holders",
        "  pid   7",
        "  birth seen",
        "way",
        "  side uplink",
        "nothing -",
        "empty   -",
    ] == invoke("explain", "--pid", "4711").stdout.splitlines()
