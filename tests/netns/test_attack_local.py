"""A program that wants to pass for another one on this host (L24)."""

import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.netns.sides import is_on
from tests.netns.stage import AGENT, App

pytestmark = pytest.mark.netns

COVERED = 'mount --bind "$1" "$2" && shift && exec "$@"'


def shown(app):
    """What /proc calls the program."""
    return str(Path(f"/proc/{app.pid}/exe").readlink())


@asynccontextmanager
async def start(stage, *before):
    """Run the excluded program's path behind other words."""
    command = [*before, stage.excluded, "-I", "-S", "-u", AGENT]
    async with stage.lab.host.start(command, stdin=subprocess.PIPE) as running:
        app = App(running)
        await app("pass")  # it runs
        assert str(stage.excluded) == shown(app), "the control"
        yield app


@pytest.mark.attack(
    "an excluded app's path, in a mount namespace", "/proc shows that path", "another file, and not excluded"
)
@pytest.mark.attack("the same in a user namespace", "/proc can be forged whole there", "no path counts there")
async def test_an_excluded_app_s_path_is_no_identity(stage):
    """L24: neither over another file, nor where everything about it can be forged; the file itself is the control."""
    async with start(stage, "unshare", "--mount", "sh", "-c", COVERED, "sh", stage.included) as app:
        assert await is_on(stage, app, "tunnel")
    async with start(stage, "unshare", "--user", "--map-root-user") as app:
        assert await is_on(stage, app, "tunnel")
    async with start(stage, "env") as app:
        assert await is_on(stage, app, "uplink")
