"""A control server with the verbs that change something, in a thread, and nothing else of a daemon."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial

import trio

from tests.fakes.switching import FakeSwitching
from tunsplit.config import Control
from tunsplit.tasks import control
from tunsplit.tasks.verbs import Verbs


@contextlib.contextmanager
def serving(path: str, switching: FakeSwitching, *, config_file: str, group: str = "absent") -> Iterator[None]:
    """Answer on a control socket until left."""
    ready, stop = threading.Event(), trio.CancelScope()
    token: list[trio.lowlevel.TrioToken] = []

    async def serve() -> None:
        with stop:
            async with trio.open_nursery() as nursery:
                settings = Control(socket=path, group=group)
                await nursery.start(partial(control.serve, settings, Verbs(switching, config_file).verbs()))
                token.append(trio.lowlevel.current_trio_token())
                ready.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    ready.wait(10)
    try:
        yield
    finally:
        trio.from_thread.run_sync(stop.cancel, trio_token=token[0])
        thread.join()
