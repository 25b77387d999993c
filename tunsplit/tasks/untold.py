"""What no event tells of, of those who have live flows: their arguments, their control group.

Theory of operation. Who sends a first packet is read before it is judged. Flows that are open are judged by nobody, so
as long as a rule goes by what may have changed, those who hold their sockets are read again, twice a second, and those
above them; what comes of that is told as if it had been an event.
"""

import logging
from collections.abc import Callable

import trio

from tunsplit.engine.nat import Nat
from tunsplit.errors import KernelError
from tunsplit.tasks.judge import Judge

LOOK_S = 0.5  # between two looks
REST = 50  # times as long as the last look took: where there are many, they cost others little
PAUSE = 8  # processes that are read before others get their turn: 1 ms
MOST_FAILURES = 4  # in a row; then nobody can tell whose the flows are

logger = logging.getLogger(__name__)


class Untold:
    """Reads the holders of live flows again."""

    def __init__(self, judge: Judge, nat: Nat, holders_unknown: Callable[[], None]) -> None:
        """`holders_unknown` is called when they cannot be read."""
        self._judge = judge
        self._nat = nat
        self._holders_unknown = holders_unknown

    async def watch(self) -> None:
        """Look now and then, until cancelled."""
        failures = 0
        while True:
            began = trio.current_time()
            try:
                await self.look()
                failures = 0
            except KernelError as error:
                failures += 1
                if failures == MOST_FAILURES:
                    failures = 0
                    logger.error("those who have live flows cannot be read: these end", extra={"error": str(error)})
                    self._holders_unknown()
            await trio.sleep(max(LOOK_S, REST * (trio.current_time() - began)))

    async def look(self) -> None:
        """Look once, if any rule goes by what no event tells of.

        Raises:
            KernelError: a process cannot be read.
        """
        if not self._judge.goes_by_untold:
            return
        try:
            self._judge.prepare()
        except KernelError:  # the judge tells of it; a storm of births must not end the flows of those who have none
            return
        holders = {holder[:2] for flow in self._nat if flow.owner is not None for holder in flow.owner.holders}
        # What they are may be inherited from those above them.
        lines = {one.pid for holder in holders for one in self._judge.tree.lineage(*holder)}
        for number, pid in enumerate(lines, 1):
            self._judge.read_again(pid)
            if not number % PAUSE:
                self._judge.tell()
                await trio.lowlevel.checkpoint()
        self._judge.tell()
