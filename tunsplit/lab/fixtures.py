"""pytest fixtures: `pytest_plugins = ["tunsplit.lab.fixtures"]` in the outermost conftest.py.

The tests are trio's (pytest-trio). A network of its own for each test takes a quarter of a second.

    @pytest.mark.lab(tunnel=(4,))
    async def test_without_ipv6_in_the_tunnel(lab):
        ...
"""

from collections.abc import AsyncGenerator

import pytest

from tunsplit.lab.lab import Lab, open_lab


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line("markers", "lab(**options): options of open_lab for the test's fixture `lab`")


@pytest.fixture
async def lab(request: pytest.FixtureRequest) -> AsyncGenerator[Lab]:
    """A throw-away network; its options come from the mark `lab`."""
    mark = request.node.get_closest_marker("lab")
    async with open_lab(**(mark.kwargs if mark else {})) as opened:
        yield opened
