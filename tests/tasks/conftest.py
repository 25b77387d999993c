"""Where tests of the control socket put it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


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
