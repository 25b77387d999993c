"""`tunsplit run` and `tunsplit undo`: how they begin, and how they end."""

import socket
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tunsplit.cli import main
from tunsplit.errors import KernelError
from tunsplit.kernel import caps, instance
from tunsplit.kernel.instance import Instance
from tunsplit.tasks.planning import Part


def invoke(*arguments: str, **environment: str) -> Result:
    unset: dict[str, str | None] = {"TUNSPLIT_CONFIG": None, "TUNSPLIT_SOCKET": None}
    return CliRunner().invoke(main, arguments, env=unset | environment)


@pytest.fixture
def started(monkeypatch) -> list[tuple[object, str]]:
    """What `tunsplit.app.run` was called with, in a host where nothing is missing."""
    calls: list[tuple[object, str]] = []

    def run(config: object, *, config_file: str, ready: Any, on_stop: str | None) -> None:
        calls.append((config, " ".join(filter(None, (config_file, on_stop)))))
        ready()

    monkeypatch.setitem(sys.modules, "tunsplit.app", types.SimpleNamespace(run=run))
    monkeypatch.setattr("tunsplit.log.setup", lambda *_: None)
    monkeypatch.setattr("tunsplit.check.require_runnable", lambda: None)
    return calls


def test_ready_is_the_only_line_on_stdout(started, config_file):
    result = invoke("run", "-c", config_file)

    assert (0, "ready\n", "") == (result.exit_code, result.stdout, result.stderr)
    assert [config_file] == [file for _, file in started]


def test_what_a_stop_does_may_be_said_at_the_start(started, config_file):
    assert 0 == invoke("run", "-c", config_file, "--on-stop", "block").exit_code
    assert [f"{config_file} block"] == [words for _, words in started]


def test_the_configuration_may_be_named_by_the_environment(started, config_file):
    assert 0 == invoke("run", TUNSPLIT_CONFIG=config_file).exit_code
    assert [config_file] == [file for _, file in started]


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(started, config_file, abstract):
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        name = f"{directory}/notify"
        systemd.bind("\0" + name if abstract else name)
        systemd.settimeout(5)
        invoke("run", "-c", config_file, NOTIFY_SOCKET="@" + name if abstract else name)

        assert b"READY=1" == systemd.recv(100)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"[tunnel]\ninterface = 7", "[tunnel] interface: found 7, expected the name"),
        (b"\xff", "found bytes that are no UTF-8 at offset 0, expected TOML"),
    ],
)
def test_a_wrong_configuration_ends_with_2(tmp_path, content, error):
    path = tmp_path / "t.toml"
    path.write_bytes(content)
    result = invoke("run", "-c", str(path))

    assert (2, "") == (result.exit_code, result.stdout)
    assert result.stderr.startswith(f"tunsplit: {path}: {error}")


def test_a_missing_configuration_ends_with_2(tmp_path):
    result = invoke("run", "-c", str(tmp_path / "absent"))

    assert 2 == result.exit_code
    assert (
        "found no readable file (No such file or directory), expected a configuration; name one with" in result.stderr
    )


def test_a_missing_capability_ends_with_3(config_file, monkeypatch):
    monkeypatch.setattr("tunsplit.log.setup", lambda *_: None)
    monkeypatch.setattr(caps, "effective", lambda: frozenset(caps.NEEDED[1:]))
    result = invoke("run", "-c", config_file)

    assert (3, "") == (result.exit_code, result.stdout)
    assert (
        "tunsplit: missing CAP_NET_ADMIN (creates the tun, sets routes, rules and the firewall): run as root, or let "
        "systemd grant it: AmbientCapabilities=CAP_NET_ADMIN\n"
    ) == result.stderr


def test_a_missing_program_ends_with_4(config_file, monkeypatch, tmp_path):
    monkeypatch.setattr("tunsplit.log.setup", lambda *_: None)
    monkeypatch.setattr(caps, "effective", lambda: frozenset(caps.NEEDED))
    monkeypatch.setattr("tunsplit.check.TUN_DEVICE", tmp_path)
    result = invoke("run", "-c", config_file, PATH="/nowhere")

    assert (4, "") == (result.exit_code, result.stdout)
    assert "tunsplit: the program nft is missing: install the package nftables\n" == result.stderr


def test_a_missing_tun_driver_ends_with_4(config_file, monkeypatch, tmp_path):
    monkeypatch.setattr("tunsplit.log.setup", lambda *_: None)
    monkeypatch.setattr(caps, "effective", lambda: frozenset(caps.NEEDED))
    monkeypatch.setattr("tunsplit.check.TUN_DEVICE", tmp_path / "absent")

    assert 4 == invoke("run", "-c", config_file).exit_code


@pytest.fixture
def planning(monkeypatch) -> types.SimpleNamespace:
    """A host where nothing is missing, and what is planned for it."""
    text = Part("nftables, inet", ("a", "b", "c"), ("a", "x", "c"), is_text=True)
    rules = Part("rules", ("stays", "goes"), ("stays", "comes"))
    blocked: list[object] = []
    fake = types.SimpleNamespace(
        parts=lambda _: [text, rules, Part("routes", ("same",), ("same",))], block=blocked.append, blocked=blocked
    )
    monkeypatch.setitem(sys.modules, "tunsplit.tasks.planning", fake)
    monkeypatch.setattr("tunsplit.check.TUN_DEVICE", Path("/dev/null"))
    monkeypatch.setattr(caps, "missing", list)
    return fake


def test_plan_prints_everything(planning, config_file):
    result = invoke("plan", "-c", config_file)

    assert "# nftables, inet\na\nx\nc\n# rules\nstays\ncomes\n# routes\nsame\n" == result.stdout


def test_plan_prints_what_differs(planning, config_file):
    result = invoke("plan", "-c", config_file, "--diff")

    assert "# nftables, inet\n@@ -1,3 +1,3 @@\n a\n-b\n+x\n c\n# rules\n-goes\n+comes\n" == result.stdout


def test_block_says_how_the_way_opens_again(planning, config_file, monkeypatch):
    monkeypatch.setattr("tunsplit.check.TUN_DEVICE", Path("/nowhere"))  # not needed for this
    result = invoke("block", "-c", config_file)

    assert (0, "the way is closed; `tunsplit undo` opens it\n") == (result.exit_code, result.stdout)
    assert 1 == len(planning.blocked)


@pytest.fixture
def undoes(monkeypatch) -> list[str]:
    lines = ["table inet tunsplit", "9 rules"]
    monkeypatch.setitem(sys.modules, "tunsplit.kernel.hostconfig", types.SimpleNamespace(undo=lambda: lines))
    monkeypatch.setattr(instance, "LOCK", f"\0tunsplit-test-{id(lines):x}")
    monkeypatch.setattr(caps, "missing", list)
    return lines


def test_undo_says_who_may_undo(undoes, monkeypatch):
    monkeypatch.setattr(caps, "missing", lambda: list(caps.NEEDED))
    result = invoke("undo")

    assert (3, "") == (result.exit_code, result.stdout)
    assert result.stderr.startswith("tunsplit: missing CAP_NET_ADMIN (")
    assert "CAP_NET_RAW" not in result.stderr


def test_undo_says_what_it_removed(undoes):
    result = invoke("undo")

    assert (0, "table inet tunsplit\n9 rules\n") == (result.exit_code, result.stdout)


def test_undo_says_when_there_was_nothing(undoes):
    undoes.clear()
    result = invoke("undo")

    assert (0, "nothing to undo\n") == (result.exit_code, result.stdout)


def test_undo_leaves_a_running_daemon_alone(undoes):
    with Instance.acquire():
        result = invoke("undo")

    assert (1, "") == (result.exit_code, result.stdout)
    assert "a daemon is at work in this network namespace" in result.stderr


def test_an_undo_that_fails_keeps_its_exit_code(undoes, monkeypatch):
    def undo() -> list[str]:
        raise KernelError("delete rule: no")

    monkeypatch.setitem(sys.modules, "tunsplit.kernel.hostconfig", types.SimpleNamespace(undo=undo))
    result = invoke("undo")

    assert (4, "tunsplit: delete rule: no\n") == (result.exit_code, result.stderr)
