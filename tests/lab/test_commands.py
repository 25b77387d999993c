"""`tunsplit lab` as a user calls it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tunsplit.cli import main

ROOT = Path(__file__).parents[2]


def tunsplit(*words, text=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tunsplit", *words],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_its_help_names_it_once():
    shown = CliRunner().invoke(main, ["lab", "run", "--help"], prog_name="tunsplit").output
    assert shown.startswith("Usage: tunsplit lab run [OPTIONS] COMMAND...\n")


def test_a_configuration_in_another_encoding_is_said(tmp_path):
    (tmp_path / "t.toml").write_bytes(b"\xff")
    result = CliRunner().invoke(main, ["lab", "run", "-c", f"{tmp_path}/t.toml", "--", "true"])

    assert 2 == result.exit_code
    assert f"{tmp_path}/t.toml: found bytes that are no UTF-8" in result.stderr


def test_the_machines_own_files_are_not_taken(tmp_path):
    """Namespaces part networks: /etc/resolv.conf is the one that everybody has."""
    file = tmp_path / "t.toml"
    file.write_text('[dns]\nlisten = ["127.0.0.54:53"]\ntake_over = true\n')
    result = CliRunner().invoke(main, ["lab", "run", "-c", str(file), "--", "true"])

    assert 2 == result.exit_code
    assert "take_over would take this machine's own /etc/resolv.conf" in result.stderr


@pytest.mark.netns
@pytest.mark.parametrize("platform", ["linux", "android"])
def test_the_demo_shows_every_app_on_its_side(platform):
    done = tunsplit("lab", "demo", "--platform", platform)

    assert (0, "") == (done.returncode, done.stderr)
    assert "All 19 went as expected." in done.stdout
    for shown in (
        "203.0.113.10",
        "excluded-client",
        "included-client",
        "[[app]]",
        '"verdict": "uplink"',
        f"what platform {platform} says",
        "tunsplit lab shell ",
    ):
        assert shown in done.stdout
    assert " NO " not in done.stdout


@pytest.mark.netns
@pytest.mark.parametrize(("command", "address"), [("excluded-curl", "192.168.50.2"), ("curl", "203.0.113.10")])
def test_a_command_is_run_with_tunsplit(command, address):
    done = tunsplit("lab", "run", "--", command, "-sS", "http://198.51.100.1/")

    assert (0, f"{address}\n") == (done.returncode, done.stdout)


@pytest.mark.netns
def test_an_interrupt_ends_it_in_order():
    """Ctrl-C: no traceback, no namespace left."""
    command = [
        sys.executable,
        "-m",
        "tunsplit",
        "lab",
        "run",
        "--no-tunsplit",
        "--",
        "sh",
        "-c",
        "echo $PATH; sleep 60",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as running:
        assert running.stdout is not None
        directory = Path(running.stdout.readline().split(os.pathsep)[0]).parent
        assert directory.exists()
        running.send_signal(signal.SIGINT)
        assert ("", "interrupted\n") == running.communicate(timeout=60)

    assert 130 == running.returncode
    assert not directory.exists()


@pytest.mark.netns
@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -KILL $$", 137)])
def test_the_exit_code_is_the_commands(script, code):
    assert code == tunsplit("lab", "run", "--no-tunsplit", "--", "sh", "-c", script).returncode


@pytest.mark.netns
def test_any_executable_may_be_excluded(tmp_path):
    copy = tmp_path / "mine"
    copy.write_bytes(Path("/usr/bin/curl").read_bytes())
    copy.chmod(0o755)

    assert (
        "192.168.50.2\n"
        == tunsplit("lab", "run", "-x", str(copy), "--", str(copy), "-sS", "http://198.51.100.1/").stdout
    )


@pytest.mark.netns
def test_a_configuration_of_ones_own_may_be_used(tmp_path):
    file = tmp_path / "tunsplit.toml"
    file.write_text(
        f'[tunnel]\ninterface = "wg0"\nfwmark = 51820\n[split]\nmode = "include"\n[control]\nsocket = "{tmp_path}/s"\n'
    )

    done = tunsplit("lab", "run", "-c", str(file), "--", "curl", "-sS", "http://198.51.100.1/")

    assert "192.168.50.2\n" == done.stdout


@pytest.mark.netns
def test_a_shell_tells_what_there_is_and_has_the_daemon_at_hand():
    done = tunsplit(
        "lab", "shell", text="tunsplit status --json; excluded-curl -sS http://198.51.100.1/; exit 3\n", SHELL="/bin/sh"
    )

    assert 3 == done.returncode
    assert "dig @RESOLVER who.is TXT" in done.stdout
    assert '"state"' in done.stdout
    assert done.stdout.endswith("192.168.50.2\n")


@pytest.mark.netns
def test_a_command_that_does_not_exist_is_named():
    done = tunsplit("lab", "run", "--no-tunsplit", "--", "nonesuch")

    assert 4 == done.returncode
    assert "nonesuch is missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["demo"], ["shell"], ["run", "--", "true"]])
def test_without_root_each_says_what_it_needs(monkeypatch, command):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    done = CliRunner().invoke(main, ["lab", *command])

    assert 3 == done.exit_code
    assert "needs root" in done.output


def test_a_configuration_and_exclude_do_not_go_together(tmp_path):
    file = tmp_path / "tunsplit.toml"
    file.touch()

    done = CliRunner().invoke(main, ["lab", "run", "-c", str(file), "-x", "/usr/bin/curl", "--", "true"])

    assert 2 == done.exit_code
    assert "write [[app]] there" in done.output
