"""One timer: idle flows, rested ports, datagrams that nobody completes."""

from collections import Counter
from collections.abc import Iterable

import trio

from tunsplit.engine.fragments import Fragments
from tunsplit.engine.nat import Nat
from tunsplit.tasks.portchoice import PortChoice

PERIOD_S = 1.0


async def expire(nat: Nat, ports: PortChoice, fragments: Iterable[Fragments], counters: Counter[str]) -> None:
    """End what is idle, once a second, until cancelled."""
    while True:
        await trio.sleep(PERIOD_S)
        now = trio.current_time()
        nat.expire(now)
        ports.rest(now)
        for one in fragments:
            counters["fragments_incomplete"] += one.expire(now)
