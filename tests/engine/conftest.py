"""What tests of engines begin with."""

import pytest

from tests.world import World


@pytest.fixture
def world():
    return World()
