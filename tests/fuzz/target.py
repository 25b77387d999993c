"""What a fuzzer is aimed at: a function that takes any bytes, and raises only if something of ours is wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Seeds = Callable[[], list[bytes]]


@dataclass(frozen=True)
class Target:
    """`run` is fed with bytes; `seeds`, what a fuzzer begins with, are valid ones of every kind, by our crafters."""

    name: str
    run: Callable[[bytes], None]
    seeds: Seeds

    def some_seeds(self, most: int) -> list[bytes]:
        """Evenly from all that there are, where all would take too long."""
        seeds = self.seeds()
        return seeds[:: -(-len(seeds) // most)]


def target(targets: dict[str, Target], seeds: Seeds) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Put the function that follows among the targets, under its own name."""

    def put(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        name = run.__name__
        assert name not in targets
        targets[name] = Target(name, run, seeds)
        return run

    return put


# One input is often several things: each follows its length, as over TCP in DNS.


def joined(*parts: bytes) -> bytes:
    """Several things as one input."""
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def split(data: bytes, most: int) -> list[bytes]:
    """The things in an input, at most so many; the last may be cut, and one of any other input is all of it."""
    return list(_split(data, most))


def _split(data: bytes, most: int) -> Iterator[bytes]:
    while data and most:
        size = int.from_bytes(data[:2], "big")
        yield data[2 : 2 + size]
        data, most = data[2 + size :], most - 1
