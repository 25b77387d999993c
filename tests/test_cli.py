"""The command line: what each command prints, and what it ends with."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.control_server import serving_beside
from tunsplit import __version__
from tunsplit.cli import base, main, show

REPOSITORY = Path(__file__).parent.parent

STATUS: dict[str, Any] = {
    "state": "active",
    "failure": None,
    "tunnel": {"interface": "wg0", "up": True, "addresses": ["10.64.0.2/32"], "mtu": 1420},
    "uplink": {
        "interface4": "eth0",
        "interface6": "eth0",
        "addresses": ["192.168.50.2/24"],
        "gateway4": "192.168.50.1",
        "gateway6": None,
    },
    "dns": {
        "platform": "linux",
        "setting": "default",
        "routes": [
            {"app": "normal", "route": "tunnel", "servers": [{"address": "8.8.8.8", "route": "tunnel"}], "row": "…"},
            {"app": "excluded", "route": "refused", "servers": [], "row": "…"},
        ],
    },
    "split": {"enabled": True, "mode": "exclude"},
    "hints": ["the local resolver dnsmasq asks"],
    "link_sockets": [
        {"kind": "packet", "interface": "eth0", "app": {"pid": 7, "exe": "/sbin/dhclient", "user": 0}},
        {"kind": "packet", "interface": None, "app": None},
        {"kind": "xdp", "interface": None, "app": None},
    ],
    "counters": {"flows": 2, "refused": 0},
}
FLOW: dict[str, Any] = {
    "protocol": "tcp",
    "source": "10.128.0.1:40000",
    "destination": "198.51.100.1:443",
    "nat": "192.168.50.2:50000",
    "verdict": "uplink",
    "state": "open",
    "reason": "rule 1: /usr/bin/firefox",
    "attribution": "exact",
    "app": {"pid": 4711, "exe": "/usr/bin/firefox", "user": "ada"},
    "packets_out": 2,
    "bytes_out": 1200,
    "packets_in": 1,
    "bytes_in": 300,
    "age_s": 1.5,
    "captured": False,
}
QUESTION: dict[str, Any] = {
    "number": 1,
    "at": 1.5,
    "app": {"pid": 4711, "exe": "/usr/bin/dig", "user": 1000},
    "verdict": "uplink",
    "route": "outside",
    "row": "linux · public custom · excluded app",
    "asked": "192.168.50.1",
    "upstream": "8.8.8.8",
    "name": "example.org.",
    "type": "A",
    "rcode": "NOERROR",
    "ms": 12.34,
    "cached": False,
}
CACHED = QUESTION | {"cached": True, "app": None, "name": "\\027[2J.[red]."}
BUSY = FLOW | {"destination": "[2001:db8:100::1]:443", "bytes_in": 5_000_000, "app": None, "verdict": "block"}


def invoke(*arguments: str, **environment: str) -> Result:
    unset: dict[str, str | None] = {"TUNSPLIT_CONFIG": None, "TUNSPLIT_SOCKET": None}
    return CliRunner().invoke(main, arguments, env=unset | environment)


@pytest.fixture
def daemon(tmp_path, config_file) -> Iterator[str]:
    """A control server, and nothing else of a daemon."""
    verbs = {
        "status": lambda _: STATUS,
        "flows": lambda _: iter([FLOW, BUSY]),
        "dns": lambda _: iter([QUESTION, CACHED]),
    }
    with serving_beside(f"{tmp_path}/c.sock", verbs=verbs):
        yield f"{tmp_path}/c.sock"


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["status", "--json"],
        ["flows"],
        ["flows", "--json"],
        ["flows", "--watch"],
        ["dns"],
        ["dns", "--json"],
    ],
)
def test_without_a_daemon_they_end_with_5_and_one_line(command, tmp_path):
    result = invoke(*command, "--socket", f"{tmp_path}/none")

    assert (5, "") == (result.exit_code, result.stdout)
    (line,) = result.stderr.splitlines()
    assert (
        f"tunsplit: no tunsplit answers at {tmp_path}/none: is `tunsplit run` running, with this [control] socket?"
        == line
    )


@pytest.mark.parametrize("how", ["--socket", "TUNSPLIT_SOCKET", "-c", "TUNSPLIT_CONFIG"])
def test_the_socket_is_found(how, daemon, config_file):
    value = daemon if "ocket" in how.lower() else config_file
    result = invoke("status", "--json", how, value) if how[0] == "-" else invoke("status", "--json", **{how: value})

    assert (0, STATUS) == (result.exit_code, msgspec.json.decode(result.stdout))


def test_a_named_configuration_that_is_wrong_is_said(tmp_path):
    assert 2 == invoke("status", "-c", str(tmp_path / "absent")).exit_code


def test_without_any_configuration_the_socket_is_the_default(monkeypatch):
    monkeypatch.setattr(base, "DEFAULT_CONFIG", "/nowhere/tunsplit.toml")

    assert "no tunsplit answers at /run/tunsplit/tunsplit.sock" in invoke("status").stderr


def test_the_summary_says_what_is_where(daemon):
    assert [
        "state    active: apps are judged",
        "mode     exclude: listed apps use the uplink",
        "tunnel   wg0 up 10.64.0.2/32",
        "uplink   eth0 192.168.50.2/24 via 192.168.50.1",
        "dns      linux, default: normal apps tunnel 8.8.8.8; excluded apps refused",
        "note     the local resolver dnsmasq asks",
        "note     /sbin/dhclient, process 7 of user 0 has a packet socket on eth0: what is sent by it is no app's",
        "note     somebody has a packet socket on every interface: what is sent by it is no app's",
        "note     somebody has an XDP socket: what is sent by it passes beside tunsplit and its firewall",
        "counters flows=2",
    ] == invoke("status", "--socket", daemon).stdout.splitlines()


def test_the_summary_says_what_has_failed():
    blocked = STATUS | {"state": "blocked", "failure": "process events: buffer overrun"}

    assert (
        "state    blocked: tunsplit cannot judge, so nothing leaves: process events: buffer overrun"
        == show.status_lines(blocked)[0]
    )


def test_the_summary_of_a_host_without_network(monkeypatch):
    alone = STATUS | {
        "state": "disabled",
        "tunnel": {"interface": "wg0", "up": False, "addresses": [], "mtu": None},
        "uplink": {"interface4": None, "interface6": None, "addresses": [], "gateway4": None, "gateway6": None},
        "split": {"enabled": False, "mode": "include"},
        "hints": [],
        "link_sockets": [],
        "counters": {},
    }

    assert [
        "state    disabled: splitting is off: every app uses the tunnel",
        "mode     include: listed apps use the tunnel",
        "tunnel   wg0 down",
        "uplink   none",
        "dns      linux, default: normal apps tunnel 8.8.8.8; excluded apps refused",
        "counters all zero",
    ] == show.status_lines(alone)


def test_flows_as_json_are_a_list(daemon):
    result = invoke("flows", "--json", "--socket", daemon)

    assert (0, [FLOW, BUSY]) == (result.exit_code, msgspec.json.decode(result.stdout))


def test_flows_are_a_table_with_the_busiest_first(daemon):
    lines = [line.split() for line in invoke("flows", "--socket", daemon).stdout.splitlines()]

    assert ["app", "protocol", "source", "destination", "side", "state", "reason", "out", "in"] == lines[0]
    assert ["unknown", "tcp", "10.128.0.1:40000", "[2001:db8:100::1]:443", "block"] == lines[1][:5]
    assert (
        "/usr/bin/firefox tcp 10.128.0.1:40000 198.51.100.1:443 uplink open rule 1: /usr/bin/firefox 1.2 kB 300 B"
        == (" ".join(lines[2]))
    )


def test_questions_are_a_table_with_the_latest_first(daemon):
    assert [QUESTION, CACHED] == msgspec.json.decode(invoke("dns", "--json", "--socket", daemon).stdout)
    lines = [" ".join(line.split()) for line in invoke("dns", "--socket", daemon).stdout.splitlines()]

    assert [
        "app name type answer route resolver row ms",
        "unknown \\027[2J.[red]. A NOERROR outside cache linux · public custom · excluded app 12.3",
        "/usr/bin/dig example.org. A NOERROR outside 8.8.8.8 linux · public custom · excluded app 12.3",
    ] == lines


def test_a_program_cannot_write_on_the_terminal_or_in_its_markup(monkeypatch):
    evil = FLOW | {"app": {"pid": 1, "exe": "/tmp/\x1b[2J[red]x", "user": "x"}}
    monkeypatch.setattr(show, "ask", lambda *_: [evil])
    shown = invoke("flows").stdout

    assert "\x1b" not in shown
    assert "/tmp/\\u001b[2J[red]x" in shown


def test_a_flow_without_verdict_or_app_is_shown():
    assert 1 == show.flows_table([FLOW | {"verdict": None, "reason": None, "app": None}]).row_count


@pytest.mark.parametrize("form", ["--json", "plain"])
def test_watching_goes_on_until_it_is_ended(form, monkeypatch):
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(show, "ask", lambda *_: [FLOW])
    monkeypatch.setattr("tunsplit.cli.show.time.sleep", pause)
    result = invoke("flows", "--watch", *(["--json"] if form == "--json" else []))

    assert 0 == result.exit_code
    if form == "--json":
        assert [[FLOW]] * 3 == [msgspec.json.decode(line) for line in result.stdout.splitlines()]
    else:
        assert 3 == result.stdout.count("rule 1: /usr/bin/firefox")  # no terminal: one after the other


def test_a_question_has_no_side_of_its_own(monkeypatch):
    monkeypatch.setattr(show, "ask", lambda *_: [FLOW | {"destination": "8.8.8.8:53", "captured": True}])
    _, line = invoke("flows").stdout.splitlines()

    assert "see dns" in line
    assert "uplink" not in line


def test_watching_ends_when_nobody_reads_any_more(daemon):
    """`tunsplit flows --watch | head -2`."""
    command = [sys.executable, "-m", "tunsplit", "flows", "--watch", "--socket", daemon]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert watching.stdout.readline().startswith(b"app ")
        watching.stdout.close()
        assert (b"", 1) == (watching.stderr.read(), watching.wait())


@pytest.mark.parametrize(
    ("octets", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e6, "1.5 MB"), (2e9, "2.0 GB"), (3e15, "3000.0 TB")],
)
def test_sizes(octets, shown):
    assert shown == show.size_of(octets)


def test_no_command_is_cut_short_in_the_list_of_commands():
    for group in ((), ("app",), ("pid",)):
        assert "..." not in invoke(*group, "--help").stdout.partition("Commands:")[2]


def test_every_command_has_help_with_an_example():
    commands = main.list_commands(click.Context(main))

    assert {"run", "check", "undo", "status", "flows", "lab"} <= set(commands)
    for command in set(commands) - {"lab"}:
        result = invoke(command, "--help")
        assert 0 == result.exit_code
        assert "Example: " in result.stdout


def test_the_lab_has_its_own_commands():
    result = invoke("lab", "--help")

    assert 0 == result.exit_code
    assert {"demo", "run", "shell"} <= set(result.stdout.split())


def test_the_version_is_the_packages():
    packaged = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    assert f"tunsplit, version {__version__}\n" == invoke("--version").stdout
    assert packaged.get("version", __version__) == __version__


def tunsplit(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", "tunsplit", *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["run", "-c", "/nowhere/t.toml"], 2),
        (["status", "--socket", "/nowhere/c.sock"], 5),
        (["flows", "--json", "--socket", "/nowhere/c.sock"], 5),
        (["nonsense"], 2),
        (["lab", "nonsense"], 2),
    ],
)
def test_as_a_process(arguments, code):
    result = tunsplit(*arguments)

    assert code == result.returncode
    assert "Traceback" not in result.stderr


def test_asking_for_flows_loads_neither_trio_nor_what_the_daemon_needs():
    code = (
        "import sys, tunsplit.cli, tunsplit.client, tunsplit.config\n"
        "print({'trio', 'rich', 'dpkt', 'pytun', 'asyncio', 'logging'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert "set()\n" == result.stdout
