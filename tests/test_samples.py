import configparser
import re
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


def unit_of_service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    unit.read_string(sample("tunsplit.service"))
    return unit["Service"]


def test_the_unit_stays_closed_after_a_crash_and_sees_every_process():
    service = unit_of_service()

    assert "tunsplit run --on-stop block" == service["ExecStart"]
    assert "notify" == service["Type"]
    assert "ExecStopPost" not in service
    assert ("default", "all") == (service["ProtectProc"], service["ProcSubset"])
    assert not {"PrivateNetwork", "PrivateUsers", "PrivateTmp", "PrivateDevices", "ProtectKernelTunables"} & set(
        service
    )


@pytest.mark.netns
async def test_the_daemon_splits_with_no_more_than_the_unit_grants(lab, tmp_path):
    granted = unit_of_service()["CapabilityBoundingSet"].lower().replace("cap_", "+").split()
    bounds = ",".join(["-all", *granted])
    file = tmp_path / "tunsplit.toml"
    file.write_text(lab.config(excluded=["/usr/bin/curl"]))
    confined = ["setpriv", "--no-new-privs", f"--bounding-set={bounds}", f"--inh-caps={bounds}"]
    curl = ["curl", "--silent", "--show-error", "--max-time", "10", "http://198.51.100.1/"]

    async with lab.host.start([*confined, sys.executable, "-m", "tunsplit", "run", "-c", str(file)]) as daemon:
        await daemon.wait_written("ready\n")
        answer = await lab.host.run(curl)
        await lab.uplink.settle()
        await lab.tunnel.settle()

    assert "192.168.50.2" == answer.stdout.strip()
    assert [] != lab.uplink.seen(destination="198.51.100.1")
    assert [] == lab.tunnel.seen(destination="198.51.100.1")
