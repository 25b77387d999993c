import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tunsplit.config import parse, unsupported
from tunsplit.config.schema import SECTIONS, readers

SAMPLES = Path(__file__).parent.parent / "config"
NAMES = sorted(path.name for path in SAMPLES.glob("*.toml"))


def sample(name: str) -> str:
    return (SAMPLES / name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_accepted(name):
    parse(sample(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_asks_for_nothing_that_this_release_lacks_but_the_relay_resolver(name):
    assert [] == [line for line in unsupported(parse(sample(name), name)) if not line.startswith("[tunnel] dns ")]


def test_every_key_is_explained_on_its_line():
    lines = [line for line in sample("wireguard.toml").splitlines() if re.match(r"(# )?\w+ = ", line)]

    assert [] == [line for line in lines if "  # " not in line]


def test_the_wireguard_sample_shows_every_key():
    text = re.sub(r"^# ?(\[\[app\]\]|\w+ = )", r"\1", sample("wireguard.toml"), flags=re.MULTILINE)
    shown = tomllib.loads(text)
    shown["app"] = {key: value for app in shown["app"] for key, value in app.items()}

    assert {name: set(readers(section)) for name, section in SECTIONS.items()} == {
        name: set(section) for name, section in shown.items()
    }


def service_of(name: str) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    unit.read_string(sample(name))
    return unit["Service"]


def confined(name: str) -> list[str]:
    """The command that runs another with the capabilities of a unit."""
    granted = service_of(name)["CapabilityBoundingSet"].lower().replace("cap_", "+").split()
    bounds = ",".join(["-all", *granted])
    return ["setpriv", "--no-new-privs", f"--bounding-set={bounds}", f"--inh-caps={bounds}"]


@pytest.mark.parametrize("broken", [False, True])
def test_systemd_understands_the_units(tmp_path, broken):
    for name in ("tunsplit.service", "tunsplit-block.service"):
        text = sample(name).replace("=tunsplit ", f"={sys.executable} -m tunsplit ")  # it wants a program that is there
        (tmp_path / name).write_text(text.replace("WatchdogSec=", "Watchdog=") if broken else text)
    units = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )

    assert broken is bool(done.stderr), done.stderr
    assert broken is ("Unknown key" in done.stderr)


def test_the_unit_stays_closed_after_a_crash_and_sees_every_process():
    service = service_of("tunsplit.service")

    assert "tunsplit run --on-stop block" == service["ExecStart"]
    assert "notify" == service["Type"]
    assert "ExecStopPost" not in service
    assert ("default", "all") == (service["ProtectProc"], service["ProcSubset"])
    assert not {"PrivateNetwork", "PrivateUsers", "PrivateTmp", "PrivateDevices", "ProtectKernelTunables"} & set(
        service
    )


@pytest.mark.netns
async def test_the_daemon_splits_with_no_more_than_the_unit_grants(lab, tmp_path):
    file = tmp_path / "tunsplit.toml"
    file.write_text(lab.config(excluded=["/usr/bin/curl"]))
    curl = ["curl", "--silent", "--show-error", "--max-time", "10", "http://198.51.100.1/"]

    command = [*confined("tunsplit.service"), sys.executable, "-m", "tunsplit", "run", "-c", str(file)]
    async with lab.host.start(command) as daemon:
        await daemon.wait_written("ready\n")
        answer = await lab.host.run(curl)
        await lab.uplink.settle()
        await lab.tunnel.settle()

    assert "192.168.50.2" == answer.stdout.strip()
    assert [] != lab.uplink.seen(destination="198.51.100.1")
    assert [] == lab.tunnel.seen(destination="198.51.100.1")


@pytest.mark.netns
async def test_the_way_can_be_closed_with_no_more_than_the_unit_grants(lab, tmp_path):
    file = tmp_path / "tunsplit.toml"
    file.write_text(lab.config(excluded=["/usr/bin/curl"]))
    curl = ["curl", "--silent", "--show-error", "--max-time", "10", "http://198.51.100.1/"]
    before = await lab.host.run(curl, check=False)

    tunsplit = [sys.executable, "-m", "tunsplit"]
    await lab.host.run([*confined("tunsplit-block.service"), *tunsplit, "block", "-c", str(file)])
    after = await lab.host.run(curl, check=False)
    await lab.host.run([*tunsplit, "undo"])

    assert [0, 7] == [before.returncode, after.returncode]
