"""What becomes of a task of ours that fails: the daemon goes on without guessing.

Theory of operation. What the kernel may refuse, each task deals with itself (KernelError). Anything else is a mistake
of ours. Were it to end the daemon, every app would be cut off until somebody starts it again. So what hangs on the
failed task is closed first: without judgement nothing is judged, without the network there is no way on either side;
`status` says `blocked`, and why. Then it is begun anew, again and again: a mistake over one event is over with that
event. The log has each kind of failure once, with its traceback.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import trio

RETRY_S = 1.0

logger = logging.getLogger(__name__)


class Organ(NamedTuple):
    """A task that is not to end.

    Attributes:
        name: for the log, and for its counter `failed_NAME`.
        task: what to run; it returns or raises only by mistake, or when it is cancelled.
        close: closes what hangs on it; told why. If that fails too, the daemon ends, and the way stays closed.
    """

    name: str
    task: Callable[[], Awaitable[None]]
    close: Callable[[str], None] = lambda _: None

    async def keep(self, counters: Counter[str]) -> None:
        """Run it until cancelled, anew after each failure."""
        logged: set[type[Exception]] = set()
        while True:
            try:
                await self.task()
            except Exception as error:
                counters[f"failed_{self.name}"] += 1
                self.close(f"{self.name} failed: {type(error).__name__}: {error}")
                if type(error) not in logged:
                    logged.add(type(error))
                    logger.exception("a mistake of ours: a task is begun anew", extra={"task": self.name})
            await trio.sleep(RETRY_S)


@contextmanager
def closing(close: Callable[[str], None]) -> Iterator[None]:
    """Hear of something; if that fails, what hangs on it is closed: the news are gone with the failure."""
    try:
        yield
    except Exception as error:  # and whoever hears is begun anew
        close(f"what has happened is not known: {type(error).__name__}: {error}")
        raise
