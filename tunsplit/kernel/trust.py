"""Whether a file is root's alone: who else could put a program of theirs in its place.

Some facts about that (path_resolution(7), inode(7))
- Who may write a directory may replace what lies in it; in a sticky one, only what is his own.
- A symlink's mode says nothing: the directory counts that it lies in, as well as those that it leads through.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import PurePath

ROOT = 0
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def why_not_roots(path: str) -> str | None:
    """Return what lets others than root choose the program at this path, in words that follow it; None: nothing.

    Of what does not exist, the directories count that do.
    """
    seen: set[str] = set()
    for one in _steps(path):
        if one in seen:
            continue
        seen.add(one)
        try:
            status = os.lstat(one)
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"cannot be looked at ({error.strerror})"
        what = "it" if one == path else one
        if status.st_uid != ROOT:
            return f"is not root's alone: {what} belongs to uid {status.st_uid}"
        if stat.S_ISLNK(status.st_mode):
            continue  # its mode says nothing; who may replace it, its directory's does
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & OTHERS_WRITE and not sticky:
            return f"is not root's alone: {what} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _steps(path: str) -> Iterator[str]:
    """The path as it is written and as its symlinks lead, with all directories above, from the root on."""
    for end in (path, os.path.realpath(path)):
        whole = PurePath(end)
        yield from (str(above) for above in reversed(whole.parents))
        yield str(whole)
