"""Each end-to-end test has a lab of its own, tunsplit running in it, and two apps, one on each side."""

from collections.abc import AsyncIterator

import pytest

from tests.netns.stage import App, Stage, open_stage
from tunsplit.lab import Lab


@pytest.fixture
async def stage(lab: Lab) -> AsyncIterator[Stage]:
    """Run tunsplit in the lab as it comes by default."""
    async with open_stage(lab) as opened:
        yield opened


@pytest.fixture
async def excluded(stage: Stage) -> AsyncIterator[App]:
    """Run an excluded app."""
    async with stage.app(stage.excluded) as app:
        yield app


@pytest.fixture
async def included(stage: Stage) -> AsyncIterator[App]:
    """Run an included app."""
    async with stage.app(stage.included) as app:
        yield app
