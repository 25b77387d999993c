"""nftables: our table through the `nft` program, and the live ports in its sets directly.

Some facts about nftables:

- A file is one transaction (net/netfilter/nf_tables_api.c): all of it or nothing, and packets see it at once.
- `flush table` empties chains; sets keep their elements and named counters their values.
- A batch may carry elements only, without the program: starting nft costs milliseconds, a batch microseconds.
- A batch that deletes an element which is not there changes nothing at all: ENOENT, as for a missing table.
"""

import errno
import os
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

from tunsplit.errors import KernelError
from tunsplit.kernel.namespace import call_in_new
from tunsplit.kernel.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    NetlinkSocket,
    Refused,
    attribute,
    message,
    nested,
)
from tunsplit.names import NFT_TABLE

FAMILIES = ("inet", "arp")
MAIN = f"inet {NFT_TABLE}"  # where the sets, the counters and the records are
TIMEOUT_S = 30.0

# include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h
NETLINK_NETFILTER = 12
NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 16, 17
NFT_MSG_GETTABLE, NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM = 1, 12, 14
NFPROTO = {"inet": 1, "arp": 3}
NFTA_TABLE_NAME = 1
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE = 1, 1, 1
NFGENMSG = struct.Struct("!BBH")  # family · version · resource
U16 = struct.Struct("!H")

ELEMENTS = 2000  # a message: an attribute holds 64 KiB, an element takes 20 bytes


class TableMissing(KernelError):
    """Our table, or one of its sets, is not there: somebody flushed the ruleset."""


def run(*arguments: str, text: str = "") -> str:
    """Run nft; return what it prints.

    Raises:
        KernelError: nft is not installed, or said no; with its own words.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["nft", *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
            check=False,
        )
    except FileNotFoundError as error:
        raise KernelError("nft: no such program; install the package nftables") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"nft: {error}") from error
    if done.returncode:
        raise KernelError(f"nft {' '.join(arguments)}: {_brief(done.stderr)}")
    return done.stdout


def apply(bodies: Mapping[str, str], *, anew: bool, elements: Mapping[str, Iterable[int]] | None = None) -> None:
    """Put our tables in force with these bodies, in one transaction.

    Args:
        bodies: family → sets, counters and chains.
        anew: nothing of the old tables is kept. Otherwise sets keep their elements and counters their values.
        elements: of the sets of the inet table, to be added.
    """
    text = ""
    for family, body in bodies.items():
        table = f"{family} {NFT_TABLE}"
        text += f"table {table}\n{'delete' if anew else 'flush'} table {table}\ntable {table} {{\n{body}}}\n"
    for name, keys in (elements or {}).items():
        if listed := ", ".join(map(str, keys)):
            text += f"add element {MAIN} {name} {{ {listed} }}\n"
    run("-f", "-", text=text)


def delete() -> list[str]:
    """Remove our tables; return those that were there."""
    with NftSocket() as socket:
        standing = [f"{family} {NFT_TABLE}" for family in FAMILIES if socket.has_table(family)]
    if standing:
        run("-f", "-", text="".join(f"table {table}\ndelete table {table}\n" for table in standing))
    return standing


def listing(family: str = "inet") -> str | None:
    """Our table as it stands in the kernel, without elements and counter values; None: there is none."""
    with NftSocket() as socket:
        if not socket.has_table(family):
            return None
    return run("-s", "-t", "list", "table", family, NFT_TABLE)


def normal_form(bodies: Mapping[str, str]) -> dict[str, str]:
    """What `listing` would show of these bodies; they are tried in a network namespace of their own.

    Raises:
        KernelError: nft says no, or there may be no such namespace.
    """

    def put_and_list() -> dict[str, str]:
        apply(bodies, anew=True)
        return {family: listing(family) or "" for family in bodies}

    return call_in_new(put_and_list)


def comments(listed: str) -> list[str]:
    """The comments in a listing."""
    return re.findall(r'comment "([^"]*)"', listed)


class NftSocket:
    """An nfnetlink socket for nftables."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def has_table(self, family: str = "inet") -> bool:
        """Whether our table of a family is there."""
        body = NFGENMSG.pack(NFPROTO[family], 0, 0) + attribute(NFTA_TABLE_NAME, NFT_TABLE.encode() + b"\0")
        try:
            self._netlink.get(f"table {family} {NFT_TABLE}", _nft(NFT_MSG_GETTABLE), 0, body)
        except Refused as refused:
            if refused.errno == errno.ENOENT:
                return False
            raise
        return True

    def change_elements(self, kind: int, flags: int, name: str, keys: list[int]) -> int:
        """Send one batch about 16-bit elements of a set; return 0 or the errno."""
        what = NFGENMSG.pack(0, 0, NFNL_SUBSYS_NFTABLES)
        begin, change, end = (self._netlink.next_sequence() for _ in range(3))
        batch = (
            message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, begin, what)
            + message(_nft(kind), NLM_F_REQUEST | NLM_F_ACK | flags, change, _elements(name, keys))
            + message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, end, what)
        )
        answers = self._netlink.batch(batch, change, change)
        return next((number for number, _ in answers.values() if number), 0)


class LivePorts:
    """The live ports and echo identifiers of NAT, which the kernel is to leave alone.

    Every change is one system call and in force when the call returns.
    """

    def __init__(self) -> None:
        self._socket = NftSocket()

    def close(self) -> None:
        """Close the socket; the sets stay as they are."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
            self._check(name, self._socket.change_elements(NFT_MSG_NEWSETELEM, NLM_F_CREATE, name, keys))

    def delete(self, name: str, ports: Iterable[int]) -> None:
        """Take ports out of a set; no error for those that are not there.

        Raises:
            TableMissing: the set is not there.
            KernelError: the kernel refused for another reason.
        """
        for keys in _pieces(ports):
            number = self._socket.change_elements(NFT_MSG_DELSETELEM, 0, name, keys)
            if number == errno.ENOENT and self._socket.has_table():
                for key in keys:
                    number = self._socket.change_elements(NFT_MSG_DELSETELEM, 0, name, [key])
                    self._check(name, 0 if number == errno.ENOENT else number)
                continue
            self._check(name, number)

    def _check(self, name: str, number: int) -> None:
        if number == errno.ENOENT:
            raise TableMissing(f"set {name} of table {MAIN} is not there")
        if number:
            raise Refused(f"set {name} of table {MAIN}", number)


def _nft(kind: int) -> int:
    return NFNL_SUBSYS_NFTABLES << 8 | kind


def _elements(name: str, keys: list[int]) -> bytes:
    elements = (
        nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, U16.pack(key)))) for key in keys
    )
    return (
        NFGENMSG.pack(NFPROTO["inet"], 0, 0)
        + attribute(NFTA_SET_ELEM_LIST_TABLE, NFT_TABLE.encode() + b"\0")
        + attribute(NFTA_SET_ELEM_LIST_SET, name.encode() + b"\0")
        + nested(NFTA_SET_ELEM_LIST_ELEMENTS, *elements)
    )


def _pieces(ports: Iterable[int]) -> Iterator[list[int]]:
    keys = list(ports)
    for at in range(0, len(keys), ELEMENTS):
        yield keys[at : at + ELEMENTS]


def _brief(stderr: str) -> str:
    """The first complaint, without the text that it points into."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return " / ".join(lines[:3]) or "failed without a word"
