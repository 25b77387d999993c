"""A control server with the verbs that change something, in a thread, and nothing else of a daemon."""

import contextlib
from collections.abc import Callable, Iterator

from click.testing import Result

from tests.control_server import serving_beside
from tests.fakes.switching import FakeSwitching
from tunsplit.tasks.verbs import Verbs

FILE = '# mine\n[tunnel]\ninterface = "wg0"\nfwmark = 1\n\n[[app]]  # the browser\npath = "/usr/bin/firefox"\n'

Invoke = Callable[..., Result]


@contextlib.contextmanager
def serving(path: str, switching: FakeSwitching, *, config_file: str, group: str = "absent") -> Iterator[None]:
    """Answer on a control socket until left."""
    with serving_beside(path, group, Verbs(switching, config_file).verbs()):
        yield
