"""/etc/resolv.conf: which resolvers it names, and how it is taken over for a while and given back.

Some facts about it (resolv.conf(5), rename(2), ip-netns(8)):

It may be a file, or a symlink that another program follows (systemd-resolved's and NetworkManager's lead to /run). Both
are directory entries: link(2) gives an entry a second name, rename(2) replaces one at once, and whoever opens the name
finds the old one or the new one whole.

The original keeps its place beside ours, in the same directory. So it survives a reboot, as ours does; it is found in
every mount namespace that shows this directory, and nowhere else; a relative symlink still leads where it led.

Under `ip netns exec`, and in most containers, the name is a mount point of its own: no second name can be given
(EXDEV), nothing be renamed over it (EBUSY), and what is mounted there belongs to whoever mounted it. It is left alone.

A taken file that somebody else has replaced since is theirs: it stays, and the original is forgotten. And /etc is
shared by network namespaces: whoever runs holds a lock on what he has taken (fcntl(2), of the open file description,
gone with the process), so that what was left behind can be told from what another daemon has taken. It is a write lock,
which takes a descriptor open for writing: anybody may read the file, and take whatever lock flock(2) knows.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import BinaryIO

from tunsplit.errors import KernelError
from tunsplit.host import IPAddress

PATH = Path("/etc/resolv.conf")
ORIGINAL = ".tunsplit-original"  # suffix of the original's second name
NEW = ".tunsplit-new"  # suffix of ours before it takes the place
HEAD = b"# tunsplit's while it runs; `tunsplit undo` puts back what was here.\n"

_LOCK = struct.Struct("hhqqi4x")  # struct flock: kind, whence, start, length (0: to the end), pid

MOST_BYTES = 65536
MOST_SERVERS = 32  # the C library asks three (MAXNS); stubs list more
MOST_WORDS = 64  # of a search list or of options


@dataclass(frozen=True, slots=True)
class ResolvConf:
    """What a resolv.conf says. Of a link-local server's address the scope is kept."""

    servers: tuple[IPAddress, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def parse_untrusted(text: bytes) -> ResolvConf:
    """Read a resolv.conf; what is no line of one, or no address, is passed over, as the C library does."""
    servers: list[IPAddress] = []
    search: tuple[str, ...] = ()
    options: list[str] = []
    for line in text[:MOST_BYTES].decode("ascii", "replace").split("\n"):
        # A comment has its sign in the first column; of a server the C library takes the first word.
        if line[:1] in ("#", ";") or len(words := line.split()) < 2:
            continue
        keyword, *values = words
        if keyword == "nameserver":
            address = address_untrusted(values[0])
            if address is not None and address not in servers and len(servers) < MOST_SERVERS:
                servers.append(address)
        elif keyword in ("search", "domain"):  # the last of them counts
            search = tuple(values[: MOST_WORDS if keyword == "search" else 1])
        elif keyword == "options":
            options += values[: MOST_WORDS - len(options)]
    return ResolvConf(tuple(servers), search, tuple(options))


def address_untrusted(text: str) -> IPAddress | None:
    """The address that a text is, if it is one."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def read(path: Path = PATH) -> ResolvConf:
    """What the file says, or would say if it were not taken over; nothing if there is none that can be read."""
    content = _read(path)
    if _is_ours(content):
        content = _read(_original(path))
    return parse_untrusted(content)


def is_taken(path: Path = PATH) -> bool:
    """Whether the file is ours."""
    return _is_ours(_read(path))


def takeover(servers: Iterable[IPAddress], path: Path = PATH) -> BinaryIO:
    """Put a file of ours in its place that names these servers; search list and options stay as they were.

    Whatever moment this is interrupted at, the name leads to the original or to ours, and `give_back` knows what to do.
    What a dead daemon had taken is taken from it.

    Returns:
        What holds it: to be kept open, and given to `give_back`.

    Raises:
        KernelError: it is a mount point, its directory cannot be written, or another daemon has taken it.
    """
    before = read(path)
    lines = [f"nameserver {server}" for server in servers]
    lines += [f"{word} {' '.join(values)}" for word, values in (("search", before.search), ("options", before.options))
              if values]  # fmt: skip
    new = path.with_name(path.name + NEW)
    try:
        if not is_taken(path):
            _keep(path)
        elif _is_held(path):
            raise KernelError(f"{path} is taken by the tunsplit of another network namespace")
        with suppress(FileNotFoundError):
            new.unlink()
        # Nobody else may read it, and so lock it, before we have.
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = os.fdopen(descriptor, "w+b")
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK))
            os.fchmod(descriptor, 0o644)  # whatever the umask: everybody resolves
            file.write(HEAD + "".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(descriptor)
            new.replace(path)
            _sync(path.parent)
        except OSError:
            file.close()
            raise
    except OSError as error:
        with suppress(KernelError):
            give_back(path)
        raise _failure(path, error) from error
    return file


def give_back(path: Path = PATH, held: BinaryIO | None = None) -> bool:
    """Put the original back; whether anything of ours was there. May be repeated.

    What another daemon holds stays. Without `held`, that is every one that runs.

    Raises:
        KernelError: the directory cannot be written.
    """
    if held is not None:
        held.close()
    original, new = _original(path), path.with_name(path.name + NEW)
    found = False
    try:
        is_ours = is_taken(path)
        if is_ours and _is_held(path):
            return False
        for leftover in (new, *(() if is_ours else (original,))):
            with suppress(FileNotFoundError):
                leftover.unlink()
                found = True
        if is_ours and os.path.lexists(original):
            original.replace(path)
        elif is_ours:  # there was none
            path.unlink()
        if found := found or is_ours:
            _sync(path.parent)
    except OSError as error:
        raise _failure(path, error) from error
    return found


@contextmanager
def taken_over(servers: Iterable[IPAddress], path: Path = PATH) -> Iterator[None]:
    """Have the file name these servers within the block; none: what a killed daemon has left is given back.

    Raises:
        KernelError: it cannot be taken over, or not be given back.
    """
    if not (servers := tuple(servers)):
        give_back(path)
        yield
        return
    held = takeover(servers, path)
    try:
        yield
    finally:
        give_back(path, held)


def _keep(path: Path) -> None:
    """Give the original a second name, in place of one from before: what is there now is the original."""
    original = _original(path)
    with suppress(FileNotFoundError):
        original.unlink()
    with suppress(FileNotFoundError):
        os.link(path, original, follow_symlinks=False)


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        told = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_RDLCK))
    finally:
        os.close(descriptor)
    kind: int = _LOCK.unpack(told)[0]
    return kind != fcntl.F_UNLCK


def _lock(kind: int) -> bytes:
    return _LOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def _original(path: Path) -> Path:
    return path.with_name(path.name + ORIGINAL)


def _is_ours(content: bytes) -> bool:
    return content.startswith(HEAD)


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # never wait for a pipe's writer
    except OSError:  # none, or a symlink that leads nowhere
        return b""
    try:
        return os.read(descriptor, MOST_BYTES)
    except OSError:  # a directory, a pipe
        return b""
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    """Have the rename outlive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _failure(path: Path, error: OSError) -> KernelError:
    if error.errno in (errno.EBUSY, errno.EXDEV):
        return KernelError(
            f"{path} is a mount point of its own, as `ip netns exec` and containers make it, and is left as it is: "
            "have whoever mounts it name the resolver (for ip netns: /etc/netns/NAME/resolv.conf)"
        )
    return KernelError(f"{path} cannot be taken over or given back: {error.strerror}")
