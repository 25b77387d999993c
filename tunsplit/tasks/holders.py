"""One look at everybody's descriptors, for all who have to know who holds a socket.

Theory of operation. No event tells of a descriptor that was passed over a unix socket. So all processes are looked
through now and then, with the sockets of live flows and those that take questions on port 53 in hand at once. A look
that fails is repeated soon; where looks go on failing, nobody can tell any more whose a flow is, and flows end.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Protocol

import trio

from tunsplit.errors import KernelError
from tunsplit.kernel.procfs import Processes

LOOK_S = 4.0  # between two looks
RETRY_S = 0.5  # after one that failed
MOST_FAILURES = 2  # in a row: a passed descriptor is to be seen within five seconds
QUIET_S = 60.0  # between two lines about failures

Held = Mapping[int, frozenset[tuple[int, int]]]  # inode → pid and start time of each holder

logger = logging.getLogger(__name__)


class Asker(Protocol):
    """Has to know who holds sockets."""

    def wanted_sockets(self) -> set[int]:
        """Their inodes.

        Raises:
            KernelError: that cannot be known now.
        """

    def take_holders(self, held: Held) -> Iterator[None]:
        """Take the holders of these sockets, and perhaps of others; None now and then, to give way.

        Raises:
            KernelError: something cannot be known now.
        """

    def holders_unknown(self) -> None:
        """Nobody can look any more, for now."""


class HoldersWatch:
    """Looks for all askers."""

    def __init__(self, processes: Processes, askers: tuple[Asker, ...], counters: Counter[str]) -> None:
        self._processes = processes
        self._askers = askers
        self._counters = counters
        self._quiet_until = float("-inf")

    async def watch(self) -> None:
        """Look now and then, until cancelled."""
        failures = 0
        while True:
            failures = 0 if await self.look() else failures + 1
            if failures == MOST_FAILURES:
                for asker in self._askers:
                    asker.holders_unknown()
                failures = 0
            await trio.sleep(RETRY_S if failures else LOOK_S)

    async def look(self) -> bool:
        """Look once; whether all could be seen. A failure of one asker is none of the others'."""
        failed = self._counters["holders_not_seen"]
        wanted: dict[Asker, set[int]] = {}
        for asker in self._askers:
            try:
                wanted[asker] = asker.wanted_sockets()
            except KernelError as error:
                self._failed(error)
        inodes = set[int]().union(*wanted.values())
        held: dict[int, frozenset[tuple[int, int]]] = {}
        try:
            # Also for nobody: what is read now, a first packet need not wait for.
            for found in self._processes.scan_all(inodes):
                if found is None:
                    await trio.lowlevel.checkpoint()
                else:
                    held[found[0]] = found[1]
        except KernelError as error:
            self._failed(error)
            return False
        for asker in wanted:
            try:
                for _ in asker.take_holders(held):
                    await trio.lowlevel.checkpoint()
            except KernelError as error:
                self._failed(error)
        return failed == self._counters["holders_not_seen"]

    def _failed(self, error: KernelError) -> None:
        self._counters["holders_not_seen"] += 1
        if trio.current_time() >= self._quiet_until:
            self._quiet_until = trio.current_time() + QUIET_S
            logger.warning("holders of sockets cannot be found", extra={"error": str(error)})
