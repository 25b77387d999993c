"""The process tree on disk: it survives reload, restart and SIGKILL, for as long as the system runs.

Its time is not of day, but of the last look in seconds since boot, suspended ones too: who was born after that, and
before the next daemon looks, was missed.
"""

import json
import logging
import os
import socket
import time
from pathlib import Path

STATE = Path("/run/tunsplit")
SO_NETNS_COOKIE = 71  # asm-generic/socket.h, since Linux 5.14
KEPT_S = 7 * 86400.0  # for how long a tree that no daemon keeps is there for the next one
GAP_S = 60.0  # without us, after which who was born meanwhile is believed as at a first start

logger = logging.getLogger(__name__)


def path_here() -> Path:
    """Where it is kept: /run is shared by all network namespaces, so each has a file of its own."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        # Never given twice while the system runs, as an inode number is.
        cookie = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
    return STATE / f"processes-{cookie}.json"


class TreeFile:
    """One network namespace's tree."""

    def __init__(self, path: Path) -> None:
        """`path`: in a directory of such files, of which old ones go."""
        self._path = path
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._saved: bytes | None = None
        sweep(path.parent)

    def load(self) -> tuple[object, bool]:
        """What was saved, and whether that was so lately that who was born since was missed."""
        try:
            with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                status = os.fstat(file.fileno())
                saved = json.load(file) if status.st_uid == os.geteuid() else None
        except FileNotFoundError:
            return None, False
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("the saved process tree cannot be read", extra={"error": str(error)})
            return None, False
        if not isinstance(saved, dict) or saved.get("boot") != self._boot:
            return None, False
        return saved.get("tree"), _now() - status.st_mtime < GAP_S

    def save(self, tree: object) -> None:
        """Write a tree, if it has changed; None: there is nothing to keep.

        Raises:
            OSError: it cannot be written.
        """
        data = None if tree is None else json.dumps({"boot": self._boot, "tree": tree}).encode()
        saved, self._saved = self._saved, None  # nothing is known of it where this fails
        if data is None:
            self._path.unlink(missing_ok=True)
        elif data != saved:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
                file.write(data)
            new.replace(self._path)
        self._saved = data
        self.touch()

    def touch(self) -> None:
        """Note that what was saved last is so now, too.

        Raises:
            OSError: it is not there any more; the next `save` writes it anew.
        """
        if self._saved is not None:
            try:
                os.utime(self._path, (_now(), _now()))
            except OSError:
                self._saved = None
                raise


def sweep(directory: Path) -> None:
    """Forget the trees of network namespaces that are gone, or have been without a daemon for days."""
    for file in directory.glob("processes-*"):
        try:
            touched = file.lstat().st_mtime
            # While it is written, a file has the time of day (`TreeFile.save`), which is later than any since boot.
            if (_now() if touched <= _now() else time.time()) - touched > KEPT_S:
                file.unlink()
        except FileNotFoundError:
            continue  # its daemon has put it in its place meanwhile, or has swept too
        except OSError as error:
            logger.warning("an old process tree cannot be removed", extra={"error": str(error)})


def _now() -> float:
    """Seconds since boot, suspended ones too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
