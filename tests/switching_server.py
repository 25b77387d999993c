"""A control server with the verbs that change something, in a thread, and nothing else of a daemon."""

import contextlib
from collections.abc import Iterator

from tests.control_server import serving_beside
from tests.fakes.switching import FakeSwitching
from tunsplit.tasks.verbs import Verbs


@contextlib.contextmanager
def serving(path: str, switching: FakeSwitching, *, config_file: str, group: str = "absent") -> Iterator[None]:
    """Answer on a control socket until left."""
    with serving_beside(path, group, Verbs(switching, config_file).verbs()):
        yield
