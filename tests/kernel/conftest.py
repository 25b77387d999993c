"""What tests of kernel interfaces begin with."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.apps import running_apps
from tests.hosts import Host, open_host
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.rtnetlink import Rtnetlink


@pytest.fixture
def host() -> Iterator[Host]:
    with open_host() as host:
        yield host


@pytest.fixture
def rtnetlink(host) -> Iterator[Rtnetlink]:
    with Rtnetlink() as rtnetlink:
        yield rtnetlink


@pytest.fixture
def config(rtnetlink) -> HostConfig:
    return HostConfig(rtnetlink)


@pytest.fixture
def apps():
    with running_apps() as started:
        yield started


@pytest.fixture
def processes():
    with closing(Processes()) as found:
        yield found
