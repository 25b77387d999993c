"""At most one daemon in a network namespace.

Some facts about abstract unix sockets:

- Their names are per network namespace and per socket type (net/unix/af_unix.c, unix_abstract_hash), while /run is
  shared by all: a lock file could not tell two namespaces apart.
- A name dies with its last descriptor: no stale lock after SIGKILL.
- connect() on a datagram socket only looks the name up, so asking leaves no trace and needs no answer.
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tunsplit.errors import KernelError, TunsplitError

LOCK = "\0tunsplit"


class Instance:
    """The lock that says "a tunsplit is at work in this network namespace"."""

    @classmethod
    @contextmanager
    def acquire(cls) -> Iterator[None]:
        """Hold the lock of the calling thread's network namespace.

        Raises:
            TunsplitError: somebody else holds it.
            KernelError: the kernel refused for another reason.
        """
        with _datagram_socket() as lock:
            try:
                lock.bind(LOCK)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise KernelError(f"bind of the abstract socket @tunsplit: {error.strerror}") from error
                raise TunsplitError(
                    "another tunsplit is at work in this network namespace; `tunsplit status` shows it"
                ) from error
            lock.shutdown(socket.SHUT_RD)  # nobody's datagrams are kept
            yield

    @classmethod
    def is_running(cls) -> bool:
        """Say whether somebody holds the lock in the calling thread's network namespace."""
        with _datagram_socket() as question:
            try:
                question.connect(LOCK)
            except ConnectionRefusedError:
                return False
            return True


def _datagram_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
