"""Keeps what is ours on the host as it was put there, and says so when somebody else has changed it.

Theory of operation. Links, addresses, routes and rules tell of themselves, which tasks/network.py follows; our nft
tables do by events of their own; a sysctl does not, so it is looked at five times a second. Whatever was touched, the
network task puts the plan in force again, which changes what differs from it. What did is counted here, and logged, but
not more often than anybody reads: another program may be as stubborn as we are.
"""

import logging
from collections import Counter
from collections.abc import Callable

import trio

from tunsplit.errors import KernelError
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.nftevents import TableEvents

LOOK_S = 0.2  # two dozen reads, 0.1 ms
RETRY_S = 1.0
QUIET_S = 5.0  # between two lines
MOST_WORDS = 6  # things that a line names

logger = logging.getLogger(__name__)


class Upkeep:
    """Watches over nft tables and sysctls.

    `restore` has the plan put in force again, soon.
    """

    def __init__(
        self, host_config: HostConfig, tables: TableEvents, restore: Callable[[], None], counters: Counter[str]
    ) -> None:
        self._host_config = host_config
        self._tables = tables
        self._restore = restore
        self._by: str | None = None
        self._quiet_until = float("-inf")
        self._egress: str | None = None  # why there is no netdev table
        self._counters = counters

    def restored(self, found: list[tuple[str, str]]) -> None:
        """Count and tell what others had changed; as (kind, words)."""
        for kind, _ in found:
            self._counters[f"restored_{kind}"] += 1
        now = trio.current_time()
        if now < self._quiet_until:
            return
        self._quiet_until = now + QUIET_S
        words = [words for _, words in found[:MOST_WORDS]] + (["…"] if len(found) > MOST_WORDS else [])
        by = {"by": self._by} if self._by and any(kind == "tables" for kind, _ in found) else {}
        logger.warning("somebody has changed what is ours: restored", extra={"what": ", ".join(words), **by})

    def egress(self, complaint: str | None) -> None:
        """Count and tell that the netdev table could not be put in force; None: it stands."""
        if complaint is not None:
            self._counters["egress_failed"] += 1
            if complaint != self._egress:
                logger.warning("packet sockets are not filtered: no netdev table", extra={"error": complaint})
        self._egress = complaint

    async def watch_tables(self) -> None:
        """Have our nft tables restored when somebody has touched them, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._tables.fileno())
            try:
                changes = self._tables.read()
            except KernelError as error:
                self._counters["table_events_failed"] += 1
                logger.warning("nftables' events cannot be read", extra={"error": str(error)})
                await trio.sleep(RETRY_S)
                self._touched(None)
                continue
            others = [change for change in changes if change.generation not in self._host_config.generations]
            if others:
                self._touched(others[-1].by)

    def _touched(self, by: str | None) -> None:
        self._by = by
        self._host_config.distrust_tables()
        self._restore()

    async def watch_sysctls(self) -> None:
        """Have sysctls restored when somebody has written other values, until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            try:
                settled = self._host_config.is_settled()
            except KernelError as error:
                self._counters["sysctls_unreadable"] += 1
                if self._counters["sysctls_unreadable"] == 1:
                    logger.warning("sysctls cannot be read", extra={"error": str(error)})
                continue
            if not settled:
                self._restore()
