"""What a benchmark is told on its command line."""

import sys


def whole_numbers(*defaults: int) -> tuple[int, ...]:
    """The arguments, and for those that are not given what is usual."""
    given = tuple(int(word) for word in sys.argv[1:])
    return (*given, *defaults[len(given) :])
