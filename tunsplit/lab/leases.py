"""Which lab is whose, so that labs of dead runners can be swept.

Each lab has a file in /run/tunsplit-lab that bears its name and is locked (flock(2)) by its runner. The kernel
drops the lock when the runner dies, however it dies: a file that can be locked belongs to nobody, and all that
bears its name goes. The file's text is the lab's own directory.
"""

import fcntl
import itertools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunsplit.lab import netns

LEASES = Path("/run/tunsplit-lab")
ROLES = ("host", "router", "relay", "internet")


@dataclass(frozen=True)
class Lease:
    """A lab's name, and a directory of its own."""

    name: str
    directory: Path


@contextmanager
def take() -> Iterator[Lease]:
    """A new name and directory; at the end all that bears the name is removed."""
    LEASES.mkdir(mode=0o700, exist_ok=True)
    descriptor, path = _create_locked()
    try:
        # Unpredictable: the directory for temporary files is everybody's.
        directory = Path(tempfile.gettempdir(), f"tunsplit-{path.name}-{secrets.token_hex(4)}")
        os.write(descriptor, os.fsencode(directory))
        directory.mkdir()
        try:
            yield Lease(path.name, directory)
        finally:
            remove(path.name, directory)
    finally:
        path.unlink()
        os.close(descriptor)


def sweep() -> list[str]:
    """Remove what dead runners left behind; give the names of their labs."""
    swept = []
    for path in sorted(LEASES.glob("ts*")) if LEASES.exists() else ():
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:  # its runner has just ended
            continue
        try:
            if _lock(descriptor, path, wait=False):
                # Empty: its runner died before it made anything.
                directory = os.fsdecode(os.read(descriptor, 4096))
                remove(path.name, Path(directory) if directory else None)
                path.unlink()
                swept.append(path.name)
        finally:
            os.close(descriptor)
    return swept


def remove(name: str, directory: Path | None) -> None:
    """Remove a lab's processes, namespaces and files."""
    netns.delete(f"{name}-{role}" for role in ROLES)
    if directory is not None and directory.exists():
        shutil.rmtree(directory)


def _create_locked() -> tuple[int, Path]:
    for number in itertools.count(1):
        path = LEASES / f"ts{os.getpid()}-{number}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        if _lock(descriptor, path, wait=True):
            return descriptor, path
        os.close(descriptor)
    raise AssertionError("count() has no end")


def _lock(descriptor: int, path: Path, *, wait: bool) -> bool:
    """Lock an open file, and tell whether it is ours and still the one at this path.

    Between open and lock another may have locked it first and removed it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
