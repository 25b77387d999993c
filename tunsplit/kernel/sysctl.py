"""Values under /proc/sys, of the network namespace of the calling thread.

A path is as in the file system, "net/ipv4/conf/eth0.5/rp_filter": a device's name may hold a dot.
"""

from collections.abc import Iterable
from pathlib import Path

from tunsplit.errors import KernelError

ROOT = Path("/proc/sys")

Ranges = list[tuple[int, int]]  # inclusive, in order, apart


def read(path: str) -> str | None:
    """Read a value; None: there is none of this name (the device is gone, the kernel has no such switch).

    Raises:
        KernelError: it is there and cannot be read.
    """
    try:
        with open(f"{ROOT}/{path}", "rb", buffering=0) as file:  # noqa: PTH123 -- a third of the time, for all of ours often
            return file.read().decode().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KernelError(f"sysctl {path}: {error.strerror}") from error


def write(path: str, value: str) -> None:
    """Write a value.

    Raises:
        KernelError: it is not there, is read-only (a container's /proc), or does not take the value.
    """
    try:
        (ROOT / path).write_text(value + "\n")
    except OSError as error:
        raise KernelError(f"sysctl {path} = {value}: {error.strerror}") from error


def parse_ranges(text: str) -> Ranges:
    """Read a list of numbers and ranges as the kernel prints it: "80,1000-1010"."""
    found = []
    for part in text.split(",") if text.strip() else []:
        first, _, last = part.strip().partition("-")
        found.append((int(first), int(last or first)))
    return merged(found)


def format_ranges(ranges: Iterable[tuple[int, int]]) -> str:
    """Write ranges as the kernel prints them."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Order ranges, and join those that touch."""
    joined: Ranges = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


def without(ranges: Iterable[tuple[int, int]], removed: Iterable[tuple[int, int]]) -> Ranges:
    """What is left of ranges when others are taken out."""
    left = merged(ranges)
    for cut_first, cut_last in removed:
        kept: Ranges = []
        for first, last in left:
            if last < cut_first or cut_last < first:
                kept.append((first, last))
                continue
            if first < cut_first:
                kept.append((first, cut_first - 1))
            if cut_last < last:
                kept.append((cut_last + 1, last))
        left = kept
    return left
