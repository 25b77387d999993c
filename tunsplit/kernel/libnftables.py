"""libnftables, the library that the `nft` program consists of: the same words, without starting a program.

Starting nft takes 10 ms, and several times that on a busy machine; a call takes one. And a context keeps one netlink
socket, which can own a table (kernel/nftguard.py).
"""

import contextlib
import ctypes
import os
import socket
import stat
from pathlib import Path

from tunsplit.errors import KernelError
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket

LIBRARY = "libnftables.so.1"  # of the package that has nft, or of one that it depends on


class Context(Closing):
    """A context of the library, in the network namespace that the calling thread was in when this was made.

    Raises:
        KernelError: there is no such library, or nftables cannot be reached.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise KernelError(f"{error}; install the package nftables") from error
        # Where there is no descriptor left, or no nftables, the library would end the process (src/mnl.c,
        # netlink_init_error).
        NetlinkSocket(NETLINK_NETFILTER).close()
        self._library.nft_ctx_new.restype = ctypes.c_void_p
        self._library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        before = _sockets()
        self._context = ctypes.c_void_p(self._library.nft_ctx_new(0))
        self._opened = _sockets() - before
        self._library.nft_ctx_buffer_error(self._context)

    def close(self) -> None:
        """Give it back, and with it what it owns."""
        self._library.nft_ctx_free(self._context)

    def share(self) -> socket.socket:
        """Its socket under another descriptor, for what nft has no word for; the socket lives until both are closed.

        Raises:
            KernelError: it is not known which one that is.
        """
        opened = [socket.socket(fileno=os.dup(descriptor)) for descriptor, _ in self._opened]
        own = [one for one in opened if one.proto == NETLINK_NETFILTER]
        for one in opened:
            if [one] != own:
                one.close()
        if len(own) != 1:
            raise KernelError(f"{LIBRARY} has opened {len(own)} sockets of nftables, and not one")
        return own[0]

    def run(self, text: str) -> None:
        """Carry out what `nft -f` would, in one transaction.

        Raises:
            KernelError: nft says no; with its first words.
        """
        if self._library.nft_run_cmd_from_buffer(self._context, text.encode()):
            said = (self._library.nft_ctx_get_error_buffer(self._context) or b"").decode(errors="replace")
            raise KernelError(f"nft: {brief(said)}")


def brief(said: str) -> str:
    """The first complaint of what nft said, without the text that it points into."""
    lines = [line for line in said.splitlines() if line.strip()]
    return " / ".join(lines[:3]) or "failed without a word"


def _sockets() -> set[tuple[int, int]]:
    """Our sockets, as (descriptor, inode number)."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since, as that of the directory itself always is
            facts = entry.stat()
            if stat.S_ISSOCK(facts.st_mode):
                found.add((int(entry.name), facts.st_ino))
    return found
