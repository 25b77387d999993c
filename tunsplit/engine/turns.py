"""Whose turn it is: what waits for one service, each user's in order, and the users in turn.

Theory of operation. Who has a thousand waiting gets one place in the next round like who has one, and what is left is
shared in the same way. So a user waits for his own, and for one of each other user's.
"""

from collections import deque

Key = tuple[int, bytes]


class Turns:
    """Keys that wait, by user; None is a user too: nobody knows who."""

    def __init__(self) -> None:
        # Invariant: no queue is empty, and the first user is the next one.
        self._queues: dict[int | None, deque[Key]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __contains__(self, user: int | None) -> bool:
        return user in self._queues

    def add(self, user: int | None, key: Key) -> None:
        """Let this wait as the last of its user's."""
        self._queues.setdefault(user, deque()).append(key)

    def take(self, most: int) -> list[Key]:
        """Whose turn it is, at most so many; they wait no longer."""
        taken: list[Key] = []
        while self._queues and len(taken) < most:
            user = next(iter(self._queues))
            queue = self._queues.pop(user)
            taken.append(queue.popleft())
            if queue:
                self._queues[user] = queue  # as the last
        return taken
