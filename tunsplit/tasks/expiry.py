"""One timer: idle flows, rested ports, datagrams that nobody completes."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import trio

from tunsplit.engine.nat import Nat
from tunsplit.errors import KernelError
from tunsplit.tasks.handovers import Handovers
from tunsplit.tasks.portchoice import PortChoice

PERIOD_S = 1.0

logger = logging.getLogger(__name__)


class Expiring(Protocol):
    """Keeps pieces of datagrams."""

    def expire(self, now: float) -> int:
        """Forget those that nobody completed; how many."""


async def expire(
    nat: Nat, ports: PortChoice, fragments: Iterable[Expiring], handovers: Handovers, counters: Counter[str]
) -> None:
    """End what is idle or has lost its socket, once a second, until cancelled."""
    while True:
        await trio.sleep(PERIOD_S)
        now = trio.current_time()
        for _ in nat.expire(now):
            await trio.lowlevel.checkpoint()
        handovers.close_dead(nat)
        try:
            ports.rest(now)
        except KernelError as error:  # the kernel keeps its hands off a few ports for longer than it has to
            counters["ports_not_told"] += 1
            logger.warning("ports cannot be given back", extra={"error": str(error)})
        for one in fragments:
            counters["fragments_incomplete"] += one.expire(now)
