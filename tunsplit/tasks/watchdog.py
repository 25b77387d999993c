"""Tells the service manager that the loop runs: one that is stuck is killed and started anew, and the way is closed."""

import logging

import trio

from tunsplit.kernel import servicemanager

logger = logging.getLogger(__name__)


async def reassure() -> None:
    """Say so as often as the service manager wants to hear it, until cancelled; if it does not, return."""
    period = servicemanager.watchdog_period()
    while period:
        try:
            servicemanager.tell("WATCHDOG=1")
        except OSError as error:  # it will find out by itself
            logger.warning("the service manager cannot be told that all is well", extra={"error": str(error)})
        await trio.sleep(period)
