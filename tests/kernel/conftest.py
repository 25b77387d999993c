"""What tests of kernel interfaces begin with."""

from collections.abc import Iterator

import pytest

from tests.hosts import UPLINK, Host, open_host, own_namespace
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.rtnetlink import Rtnetlink


@pytest.fixture
def namespace() -> Iterator[None]:
    """This thread in a network namespace of its own."""
    with own_namespace():
        yield


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
def processes():
    with Processes() as found:
        yield found


@pytest.fixture
def eth0(rtnetlink: Rtnetlink) -> int:
    """The index of the host's uplink."""
    link = rtnetlink.snapshot().link(UPLINK)
    assert link is not None
    return link.index
