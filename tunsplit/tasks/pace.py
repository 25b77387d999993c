"""How often something may look that packets wait for: at once, unless it has had to look often of late.

Theory of operation. A look at the host, or for the holder of a socket, blocks the event loop for the time that it
takes. So each look owes packets a rest of four times its own length: in the long run they have four fifths of the time.
What is owed may add up to a bound, so that a device that goes and comes back is followed at once; time that passes pays
it.
"""

from collections.abc import Callable

REST = 4  # times as long as a look took
MOST_OWED_S = 1.0


class Pace:
    """Keeps account of what looks took; `now` tells the event loop's time, and up to `most_owed_s` may be owed."""

    def __init__(self, now: Callable[[], float], most_owed_s: float = MOST_OWED_S) -> None:
        self._now = now
        self._most_owed_s = most_owed_s
        self._owed_s = 0.0
        self._paid = now()

    def looked(self, took_s: float) -> float:
        """Write down a look that has just ended; how many seconds there is to be none."""
        now = self._now()
        self._owed_s = max(0.0, self._owed_s - (now - took_s - self._paid)) + REST * took_s
        self._paid = now
        return max(0.0, self._owed_s - self._most_owed_s)
