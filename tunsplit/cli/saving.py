"""`--save`: who writes the configuration, and how.

The command writes, not the daemon. Its unit shows it /etc read-only, and a daemon that wrote for others would have to
judge who may have what written; as it is, the file's own mode says who may save: root, as a rule. The daemon says which
file it was started with.

The file is replaced by rename(2): whoever reads it meanwhile, or after a power cut, finds the old or the new one whole.
Two commands at once take turns by a lock on the directory, which needs no file of its own.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunsplit.cli.base import read
from tunsplit.errors import PermissionMissing, TunsplitError


def rewrite(file: str, edit: Callable[[str], str]) -> bool:
    """Replace a configuration by what `edit` makes of it; say whether that is something else.

    Mode and owner stay, and of a symlink it is the file behind it that is replaced.

    Raises:
        PermissionMissing: the file may not be written by this user.
        TunsplitError: it cannot be read or written, or `edit` refuses.
    """
    target = Path(file).resolve()
    try:
        with _locked(target.parent):
            _, before = read(str(target))
            after = edit(before)
            if after == before:
                return False
            _replace(target, after.encode())
            return True
    except PermissionError as error:
        raise PermissionMissing(
            f"{file}: not saved, and nothing changed: {error.strerror}; run it as root, or without --save"
        ) from None
    except OSError as error:
        raise TunsplitError(f"{file}: not saved, and nothing changed: {error.strerror}") from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)  # the rename's, so that it outlives a power cut
    finally:
        os.close(descriptor)


def _replace(target: Path, content: bytes) -> None:
    status = target.stat()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchown(descriptor, status.st_uid, status.st_gid)
            os.fchmod(descriptor, status.st_mode & 0o7777)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(target)
    finally:
        with suppress(FileNotFoundError):  # renamed, as it should be
            Path(name).unlink()
