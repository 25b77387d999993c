"""Signals that end a process, taken so that what was built is taken down first."""

import signal
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from tunsplit.lab.programs import background


@asynccontextmanager
async def unwind_first(*signals: signal.Signals) -> AsyncGenerator[None]:
    """Let such a signal cancel the block, and take its usual effect once that has unwound.

    Only Python's main thread can do so; in another the block just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: signal.Signals | None = None

    async def watch(nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        nonlocal received
        with trio.open_signal_receiver(*signals) as arriving:
            task_status.started()
            async for number in arriving:
                received = signal.Signals(number)
                nursery.cancel_scope.cancel()

    async with background() as nursery:
        await nursery.start(lambda task_status: watch(nursery, task_status))
        yield
    if received is not None:
        signal.raise_signal(received)
        # Whoever has taken it over does not end the process: the block has not been done all the same.
        raise SystemExit(128 + received)
