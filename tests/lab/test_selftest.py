"""`tunsplit selftest`: what is promised is shown, and what is not kept is seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tunsplit.cli import main
from tunsplit.lab import selftest
from tunsplit.lab.promises import PROMISES
from tunsplit.lab.selftest import Shown

ROOT = Path(__file__).parents[2]
KEPT = Shown("L1", "an app lives on one side", ok=True, uplink=3, tunnel=4)
LEAKED = Shown("L2", "it is switched", leaks=["1 × udp on the uplink"], uplink=1)
NOT_KEPT = Shown("L3", "it is switched back", failure="nothing was seen")


@pytest.mark.netns
def test_all_that_is_promised_is_kept():
    done = subprocess.run(
        [sys.executable, "-m", "tunsplit", "selftest", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    shown = json.loads(done.stdout)

    assert [] == [one for one in shown if not one["ok"]]
    assert (0, "", len(PROMISES) + 1) == (done.returncode, done.stderr, len(shown))
    assert {"promise", "says", "ok", "uplink", "tunnel", "leaks", "failure"} == set(shown[0])


@pytest.mark.netns
async def test_what_is_not_kept_is_seen():
    """The control of the whole: without its firewall tunsplit cannot keep a new interface closed."""
    wanted = [promise for promise in PROMISES if promise.name in ("L9", "L26")]
    control, loopback, interface = await selftest.run({"firewall": {"enabled": False}}, promises=wanted)

    assert (True, True, False) == (control.ok, loopback.ok, interface.ok)
    assert interface.leaks
    assert "LEAKED" == interface.verdict


def test_the_last_lines_say_what_went_wrong_and_how_it_came_out():
    assert "All 1 kept." == selftest.summarise([KEPT]).splitlines()[-1]
    lines = selftest.summarise([KEPT, LEAKED, NOT_KEPT]).splitlines()
    assert ["L2: leaked 1 × udp on the uplink", "L3: nothing was seen"] == lines[:2]
    assert "4 frames of apps were watched on the uplink, 4 in the tunnel." == lines[2]
    assert "2 of 3 were not kept, 1 flows leaked." == lines[-1]
    assert ["kept", "LEAKED", "NOT KEPT"] == [one.verdict for one in (KEPT, LEAKED, NOT_KEPT)]


@pytest.mark.parametrize(("shown", "code"), [([KEPT], 0), ([KEPT, LEAKED], 1), ([NOT_KEPT], 1)])
@pytest.mark.parametrize("as_json", [True, False])
def test_the_exit_code_says_whether_all_was_kept(monkeypatch, tmp_path, shown, code, as_json):
    laid_over = []

    async def run(sections, tell):
        laid_over.append(sections)
        for one in shown:
            tell(one)
        return shown

    monkeypatch.setattr(selftest, "run", run)
    file = tmp_path / "t.toml"
    file.write_text('[firewall]\nenabled = false\n[tunnel]\ninterface = "tun0"\n[[app]]\nname = "x"\n')
    done = CliRunner().invoke(main, ["selftest", "-c", str(file), *(["--json"] if as_json else [])])

    assert (code, [{"firewall": {"enabled": False}}]) == (done.exit_code, laid_over)
    if as_json:
        assert [one.promise for one in shown] == [one["promise"] for one in json.loads(done.output)]
    else:
        assert [one.verdict for one in shown] == [line[:9].strip() for line in done.output.splitlines()[: len(shown)]]


def test_a_file_that_is_no_toml_is_named(tmp_path):
    (tmp_path / "t.toml").write_text("[split\n")
    done = CliRunner().invoke(main, ["selftest", "-c", f"{tmp_path}/t.toml"])

    assert (2, True) == (done.exit_code, "t.toml: Expected" in done.output)


def test_without_root_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = CliRunner().invoke(main, ["selftest"])

    assert 3 == done.exit_code
    assert "needs root" in done.output
