"""The live ports and echo identifiers of NAT, as sets of our nftables table: the kernel leaves these alone."""

import errno
from collections.abc import Iterable, Iterator

from tunsplit.errors import KernelError
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.netlink import Refused
from tunsplit.kernel.nftsocket import NftSocket
from tunsplit.names import NFT_TABLE

ELEMENTS = 2000  # a message: an attribute holds 64 KiB, an element takes 20 bytes


class TableMissing(KernelError):
    """Our table, or one of its sets, is not there: somebody flushed the ruleset."""


class LivePorts(Closing):
    """The sets of live ports. Every change is one system call and in force when the call returns."""

    def __init__(self) -> None:
        self._socket = NftSocket()

    def close(self) -> None:
        """Close the socket; the sets stay as they are."""
        self._socket.close()

    @property
    def port(self) -> int:
        """The netlink port that marks the events which these changes cause."""
        return self._socket.port

    def is_there(self) -> bool:
        """Whether the table that holds the sets is there."""
        return self._socket.has_table()

    def add(self, name: str, ports: Iterable[int]) -> None:
        """Add ports to a set; no error for those that are there.

        Raises:
            TableMissing: the set is not there.
            KernelError: the kernel refused for another reason.
        """
        for keys in _pieces(ports):
            _check(name, self._socket.add_keys(name, keys))

    def delete(self, name: str, ports: Iterable[int]) -> None:
        """Take ports out of a set; no error for those that are not there.

        Raises:
            TableMissing: the set is not there.
            KernelError: the kernel refused for another reason.
        """
        for keys in _pieces(ports):
            number = self._socket.delete_keys(name, keys)
            if number == errno.ENOENT and self._socket.has_table():
                for key in keys:
                    number = self._socket.delete_keys(name, [key])
                    _check(name, 0 if number == errno.ENOENT else number)
                continue
            _check(name, number)


def _check(name: str, number: int) -> None:
    what = f"set {name} of table inet {NFT_TABLE}"
    if number == errno.ENOENT:
        raise TableMissing(f"{what} is not there")
    if number:
        raise Refused(what, number)


def _pieces(ports: Iterable[int]) -> Iterator[list[int]]:
    keys = list(ports)
    for at in range(0, len(keys), ELEMENTS):
        yield keys[at : at + ELEMENTS]
