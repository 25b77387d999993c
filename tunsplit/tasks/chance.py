"""Random numbers that nobody can guess, without a system call for each."""

import os

DRAWN = 4096  # bytes at a time


class Chance:
    """Draws from the kernel's generator."""

    def __init__(self) -> None:
        self._numbers = iter(memoryview(b"").cast("H"))

    def below(self, limit: int) -> int:
        """A number from 0 to under `limit`, each as likely; `limit` is at most 65,536."""
        fair = 0x10000 - 0x10000 % limit
        while True:
            for number in self._numbers:
                if number < fair:
                    return number % limit
            self._numbers = iter(memoryview(os.urandom(DRAWN)).cast("H"))
