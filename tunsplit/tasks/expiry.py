"""One timer: idle flows, rested ports, datagrams that nobody completes."""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import trio

from tunsplit.engine.flow import FlowState
from tunsplit.engine.nat import Nat
from tunsplit.errors import KernelError
from tunsplit.kernel.sockdeaths import SocketDeaths
from tunsplit.tasks.portchoice import PortChoice
from tunsplit.wire.ip import UDP

PERIOD_S = 1.0

logger = logging.getLogger(__name__)


class Expiring(Protocol):
    """Keeps pieces of datagrams."""

    def expire(self, now: float) -> int:
        """Forget those that nobody completed; how many."""


async def expire(
    nat: Nat, ports: PortChoice, fragments: Iterable[Expiring], deaths: SocketDeaths, counters: Counter[str]
) -> None:
    """End what is idle or has lost its socket, once a second, until cancelled."""
    while True:
        await trio.sleep(PERIOD_S)
        now = trio.current_time()
        nat.expire(now)
        close_dead(nat, deaths, counters)
        try:
            ports.rest(now)
        except KernelError as error:  # the kernel keeps its hands off a few ports for longer than it has to
            counters["ports_not_told"] += 1
            logger.warning("ports cannot be given back", extra={"error": str(error)})
        for one in fragments:
            counters["fragments_incomplete"] += one.expire(now)


def close_dead(nat: Nat, deaths: SocketDeaths, counters: Counter[str]) -> None:
    """Close the UDP flows whose socket is gone: no packet says so, and their ports would stay taken for minutes."""
    try:
        dead = {cookie for protocol, cookie in deaths.read() if protocol == UDP}
    except KernelError as error:
        counters["socket_deaths_failed"] += 1
        if counters["socket_deaths_failed"] == 1:
            logger.warning("nobody tells of dead sockets: flows end by time alone", extra={"error": str(error)})
        return
    if dead:
        for flow in nat:
            if flow.protocol == UDP and flow.state is FlowState.OPEN and flow.cookie in dead:
                nat.close(flow)
