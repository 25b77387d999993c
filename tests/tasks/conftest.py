"""What tests of tasks begin with: a host, a gate for first packets, a place for the control socket."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.devices import WG0, Side, nat
from tests.fakes.gates import a_gate
from tests.fakes.pumps import Pumps
from tests.hosts import open_host
from tests.tasks.proxystage import loopback


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that any user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def file(directory: Path) -> Path:
    return directory / "run" / "control.sock"


@pytest.fixture
def path(file: Path) -> str:
    return str(file)


@pytest.fixture
def host():
    with open_host() as made:
        yield made


@pytest.fixture
def gate():
    with a_gate() as made:
        yield made


@pytest.fixture
def resolvers_here():
    """Be in a namespace in which the DNS proxy's resolvers have their addresses."""
    with loopback():
        yield


@pytest.fixture
def uplink():
    side = Side()
    yield side
    side.close()


@pytest.fixture
def tunnel():
    side = Side("tunnel", WG0)
    yield side
    side.close()


@pytest.fixture
def table():
    return nat()


@pytest.fixture(params=["uplink", "tunnel"])
def pumps(request):
    side = Side() if request.param == "uplink" else Side("tunnel", WG0)
    made = Pumps(side)
    yield made
    made.close()
