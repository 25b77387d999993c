"""Fixtures that tests of several folders begin with."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.apps import Apps, own_network, running_apps
from tests.fakes.switching import FakeSwitching
from tests.switching_server import FILE, Invoke, serving
from tunsplit.cli import main
from tunsplit.kernel.sockdiag import SockDiag


@pytest.fixture
def tun() -> Iterator[int]:
    """This process in a network of its own; what leads out of it can be read here."""
    with own_network() as descriptor:
        yield descriptor


@pytest.fixture
def diag(tun: int) -> Iterator[SockDiag]:
    with SockDiag() as sockets:
        yield sockets


@pytest.fixture
def apps() -> Iterator[Apps]:
    with running_apps() as started:
        yield started


@pytest.fixture
def own_cgroup(tmp_path: Path) -> Iterator[Path]:
    """A new cgroup of v2, wherever this host has them mounted."""
    subprocess.run(["mount", "-t", "cgroup2", "none", tmp_path], check=True)
    directory = tmp_path / f"ts{os.getpid()}"
    try:
        directory.mkdir()
        yield directory  # to be asked for before `apps`, who live in it
        directory.rmdir()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    """The least that a configuration says; its control socket is `c.sock` beside it."""
    path = tmp_path / "tunsplit.toml"
    path.write_text(f"[tunnel]\ninterface = 'wg0'\nfwmark = 1\n[control]\nsocket = '{tmp_path}/c.sock'\n")
    return str(path)


# Of the verbs that change something.


@pytest.fixture
def switching() -> FakeSwitching:
    return FakeSwitching()


@pytest.fixture
def listed_file(tmp_path: Path) -> Path:
    """A configuration with a list, a comment and rights of its own."""
    file = tmp_path / "tunsplit.toml"
    file.write_text(FILE)
    file.chmod(0o640)
    return file


@pytest.fixture
def invoke(tmp_path: Path, listed_file: Path, switching: FakeSwitching) -> Iterator[Invoke]:
    """Run a command beside a daemon that was started with that file."""

    def invoke(*arguments: str) -> Result:
        unset = {"TUNSPLIT_CONFIG": None, "TUNSPLIT_SOCKET": f"{tmp_path}/c.sock"}
        return CliRunner().invoke(main, arguments, env=unset)

    with serving(f"{tmp_path}/c.sock", switching, config_file=str(listed_file)):
        yield invoke
