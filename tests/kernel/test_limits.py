"""Descriptors: as many as we may have, and what becomes of judgement when there are none left."""

import os
import resource
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tunsplit.errors import KernelError
from tunsplit.kernel.limits import raise_descriptor_limit
from tunsplit.kernel.procfs import Processes


@pytest.fixture
def limits():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_limit_is_what_we_may_have(limits):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits))
    raise_descriptor_limit()

    assert (limits, limits) == resource.getrlimit(resource.RLIMIT_NOFILE)


@contextmanager
def no_descriptors(left, limits):
    """So many may be opened, no more."""
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits))
        spare = []
        with suppress(OSError):
            while True:
                spare.append(stack.enter_context(open(os.devnull)))  # noqa: PTH123 -- a descriptor each
        for one in spare[:left]:
            one.close()
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits))


@pytest.mark.parametrize("left", [0, 1, 2])
@pytest.mark.parametrize(
    "look",
    [
        lambda processes: processes.held_of(os.getpid(), {4711}),
        lambda processes: list(processes.scan_all({4711})),
        lambda processes: list(processes.find_holders({4711})),
    ],
)
def test_without_descriptors_nobody_is_said_to_hold_nothing(limits, look, left):
    """A local resolver that seems to hold no socket would be let out beside the tunnel."""
    with Processes() as processes, no_descriptors(left, limits):
        try:
            look(processes)
            raised = ""
        except KernelError as error:
            raised = str(error)

    assert "Too many open files" in raised
