"""Fuzzing that follows the branches taken: `python -m tests.fuzz.guided [--seconds N] [--seed N] [NAME …]`.

All targets at once, unless some are named; the first byte of an input says which. It ends with 0, or with the input
that broke something, which goes into a file of the directory that it is started in; `--again FILE` runs it once more.

atheris (libFuzzer for Python) has wheels for Python 3.11 to 3.13 on x86_64. Where it is not installed, inputs are bent
by chance alone, which is said.
"""

import argparse
import importlib.util
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SEEDS = 24  # of a target: reading them takes time from the search
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
LONGEST = 4096  # bytes of an input
LONGEST_RUN_S = 120  # of one input, on a machine with other work

Run = Callable[[bytes], None]


def main() -> None:
    """Fuzz, as the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description="Fuzz the readers of bytes.")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", type=Path, metavar="FILE")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    run, inputs = load(arguments.names)
    if arguments.again is not None:
        run(arguments.again.read_bytes())
    else:
        fuzz(run, inputs, arguments.seconds, arguments.seed)


def load(names: list[str]) -> tuple[Run, list[bytes]]:
    """One function for these targets, or for all, and what to begin with."""
    if HAS_ATHERIS:
        import atheris

        with atheris.instrument_imports(include=["tunsplit"]):
            from tests.fuzz.targets import TARGETS
    else:
        from tests.fuzz.targets import TARGETS
    chosen = [TARGETS[name] for name in names] if names else list(TARGETS.values())
    assert len(chosen) <= 256

    def run(data: bytes) -> None:
        if data:
            chosen[data[0] % len(chosen)].run(data[1:])

    inputs = []
    for number, target in enumerate(chosen):
        inputs += [bytes((number,)) + seed for seed in target.some_seeds(SEEDS)]
    return run, inputs


def fuzz(run: Run, inputs: list[bytes], seconds: int, seed: int) -> None:
    """Feed the function for so long; an exception of it ends the process."""
    if HAS_ATHERIS:
        guide(run, inputs, seconds, seed)
    else:
        print("atheris is not installed: inputs are bent by chance alone")  # noqa: T201  # a program's word
        bend(run, inputs, seconds, seed)


def guide(run: Run, inputs: list[bytes], seconds: int, seed: int) -> None:
    """Let libFuzzer look for new branches; it ends the process."""
    import atheris

    corpus = Path(tempfile.mkdtemp())
    for number, data in enumerate(inputs):
        (corpus / str(number)).write_bytes(data)
    options = {"max_total_time": seconds, "seed": seed, "max_len": LONGEST, "timeout": LONGEST_RUN_S}
    words = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus)]
    atheris.Setup(words, run)
    atheris.Fuzz()


def bend(run: Run, inputs: list[bytes], seconds: int, seed: int) -> None:
    """Change inputs by chance."""
    chance = random.Random(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = bytearray(chance.choice(inputs))
        for _ in range(chance.randrange(8)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            data = data or bytearray(1)
        try:
            run(bytes(data))
        except Exception:
            Path(f"crash-{os.getpid()}").write_bytes(data)
            raise


if __name__ == "__main__":
    main()
