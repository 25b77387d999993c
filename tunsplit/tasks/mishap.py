"""What becomes of a packet that we fail on.

An exception that ended a pump would end the daemon, and with it everything that keeps included apps off the
uplink. So the packet is dropped, the failure counted, and the first of its kind logged with its traceback:
a line a packet would be a weapon in the hand of whoever found the packet.
"""

import logging
from collections import Counter

logger = logging.getLogger(__name__)


def note(counters: Counter[str], error: Exception) -> None:
    """Count a failure by its kind, and log the first."""
    kind = type(error).__name__
    name = f"failed_{kind}_{error.errno}" if isinstance(error, OSError) else f"failed_{kind}"
    counters[name] += 1
    if counters[name] == 1:
        logger.error("a packet cannot be handled and is dropped", exc_info=error, extra={"counter": name})
