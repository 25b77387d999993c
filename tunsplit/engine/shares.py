"""What one user may have of what is everybody's: places in the table of flows, and ports.

Theory of operation. A user's programs can take more than there is, on purpose or not, and it would be the others' who
are refused. So nobody has more than three quarters; who wants more makes room among his own. Less would hinder a
desktop, where all that is much is one user's.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

PART, WHOLE = 3, 4

User = int | None  # uid; None: guests, and whom nobody knows


class Shares:
    """Who has how many of what."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """`sizes`: how many there are, by what it is."""
        self._most = {what: size * PART // WHOLE for what, size in sizes.items()}
        self._had: defaultdict[str, Counter[User]] = defaultdict(Counter)

    def has_room(self, what: str, user: User) -> bool:
        """Whether this user may have one more."""
        return self._had[what][user] < self._most[what]

    def take(self, what: str, user: User) -> None:
        """He has one more."""
        self._had[what][user] += 1

    def give_back(self, what: str, user: User) -> None:
        """He has one less."""
        had = self._had[what]
        had[user] -= 1
        if not had[user]:
            del had[user]
