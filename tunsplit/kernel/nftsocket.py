"""nftables without nft's words: what stands there, and elements that come and go.

Some facts about nftables by netlink (net/netfilter/nf_tables_api.c):

- A batch may carry elements only: starting nft costs milliseconds, a batch microseconds.
- Every transaction that changes anything makes a new generation, one more than the last.
- A batch that deletes an element which is not there changes nothing at all: ENOENT, as for a missing table.
- Chains and rules come in a dump as they were put in, but for the generation in the head of each message; what named
  counters and sets hold is not in there.
"""

import errno
import hashlib
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from tunsplit.host import IPAddress
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    NetlinkSocket,
    Refused,
    attribute,
    attributes,
    message,
    nested,
)
from tunsplit.names import NFT_TABLE

# include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h
NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 16, 17
NFT_MSG_NEWTABLE, NFT_MSG_GETTABLE, NFT_MSG_DELTABLE = 0, 1, 2
NFT_MSG_GETCHAIN, NFT_MSG_GETRULE, NFT_MSG_GETGEN = 4, 7, 16
NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM = 12, 14
NFPROTO = {"inet": 1, "arp": 3, "netdev": 5}
NFTA_TABLE_NAME = NFTA_CHAIN_TABLE = NFTA_RULE_TABLE = NFTA_GEN_ID = 1
NFTA_CHAIN_NAME = 3
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE = 1, 1, 1
NFGENMSG = struct.Struct("!BBH")  # family · version · resource
pack_key = struct.Struct("!H2x").pack  # the padding is the attribute's

OUR_TABLE = NFT_TABLE.encode() + b"\0"


class Move(NamedTuple):
    """A set's new elements and those that are no longer in it."""

    family: str
    name: str
    new: tuple[IPAddress, ...]
    gone: tuple[IPAddress, ...]


class NftSocket(Closing):
    """An nfnetlink socket for our nftables tables, in the network namespace that the calling thread was in.

    With `bound` it is that one.
    """

    def __init__(self, bound: socket.socket | None = None) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER, bound=bound)

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    @property
    def port(self) -> int:
        """The netlink port that marks the events which its changes cause."""
        return self._netlink.port

    # What is there.

    def has_table(self, family: str = "inet", name: str = NFT_TABLE) -> bool:
        """Whether our table of a family is there, or another one of ours."""
        body = NFGENMSG.pack(NFPROTO[family], 0, 0) + attribute(NFTA_TABLE_NAME, name.encode() + b"\0")
        try:
            self._netlink.get(f"table {family} {name}", _nft(NFT_MSG_GETTABLE), 0, body)
        except Refused as refused:
            if refused.errno == errno.ENOENT:
                return False
            raise
        return True

    def fingerprint(self, family: str = "inet") -> str | None:
        """A digest of our table's chains and rules as they stand in the kernel; None: there is no table.

        Two of them are equal as long as nobody has touched the table, also if he put the same back. Takes a quarter of
        a millisecond, where starting nft takes ten.
        """
        if not self.has_table(family):
            return None
        digest = hashlib.blake2b(digest_size=16)
        body = NFGENMSG.pack(NFPROTO[family], 0, 0)
        for kind, attribute_of in ((NFT_MSG_GETCHAIN, NFTA_CHAIN_TABLE), (NFT_MSG_GETRULE, NFTA_RULE_TABLE)):
            wanted = attribute(attribute_of, OUR_TABLE)
            for _, found in self._netlink.dump(f"table {family} {NFT_TABLE}", _nft(kind), body + wanted):
                # Of chains the kernel shows those of other tables, too.
                if found[NFGENMSG.size :].startswith(wanted):
                    digest.update(found[NFGENMSG.size :])
        return digest.hexdigest()

    def chains(self, table: str, family: str = "inet") -> list[str]:
        """The names of the chains in a table; none where there is no such table."""
        wanted = attribute(NFTA_CHAIN_TABLE, table.encode() + b"\0")
        body = NFGENMSG.pack(NFPROTO[family], 0, 0) + wanted
        return [
            attributes(found, NFGENMSG.size)[NFTA_CHAIN_NAME].rstrip(b"\0").decode()
            for _, found in self._netlink.dump(f"table {family} {table}", _nft(NFT_MSG_GETCHAIN), body)
            if found[NFGENMSG.size :].startswith(wanted)
        ]

    def generation(self) -> int:
        """The number of the ruleset that is in force, everybody's tables included."""
        answer = self._netlink.get("generation", _nft(NFT_MSG_GETGEN), 0, NFGENMSG.pack(0, 0, 0))
        return int.from_bytes(attributes(answer, NFGENMSG.size)[NFTA_GEN_ID], "big")

    # What is to be: every change is one batch, and in force when the call returns.

    def add_keys(self, name: str, keys: Iterable[int]) -> int:
        """Put 16-bit elements into a set of the inet table; return 0 or the errno."""
        return self.change([(NFT_MSG_NEWSETELEM, NLM_F_CREATE, _keys(name, keys))])

    def delete_keys(self, name: str, keys: Iterable[int]) -> int:
        """Take 16-bit elements out of a set of the inet table; return 0, or the errno if nothing was changed."""
        return self.change([(NFT_MSG_DELSETELEM, 0, _keys(name, keys))])

    def move_elements(self, moves: Iterable[Move]) -> int:
        """Change what sets of addresses hold, all of them at once; return 0, or the errno if nothing was changed."""
        return self.change(
            [
                (kind, flags, _elements(move.family, move.name, map(_element, addresses)))
                for move in moves
                for kind, flags, addresses in (
                    (NFT_MSG_NEWSETELEM, NLM_F_CREATE, move.new),
                    (NFT_MSG_DELSETELEM, 0, move.gone),
                )
                if addresses
            ]
        )

    def change(self, changes: list[tuple[int, int, bytes]]) -> int:
        """Send one batch of messages, each (type, flags, body); return 0, or the errno if nothing was changed."""
        what = NFGENMSG.pack(0, 0, NFNL_SUBSYS_NFTABLES)
        begin, *numbers, end = (self._netlink.next_sequence() for _ in range(len(changes) + 2))
        batch = message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, begin, what)
        for number, (kind, flags, body) in zip(numbers, changes, strict=True):
            batch += message(_nft(kind), NLM_F_REQUEST | NLM_F_ACK | flags, number, body)
        batch += message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, end, what)
        answers = self._netlink.batch(batch, numbers[0], numbers[-1])
        return next((number for number, _ in answers.values() if number), 0)


# What is in front of its key in an element: a batch has 64, and is sent while a first packet waits.
_BEFORE_KEY = nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, pack_key(0)[:2])))[:12]


def _nft(kind: int) -> int:
    return NFNL_SUBSYS_NFTABLES << 8 | kind


def _element(address: IPAddress) -> bytes:
    return nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, address.packed)))


def _keys(name: str, keys: Iterable[int]) -> bytes:
    return _elements("inet", name, (_BEFORE_KEY + pack_key(key) for key in keys))


def _elements(family: str, name: str, elements: Iterable[bytes]) -> bytes:
    return (
        NFGENMSG.pack(NFPROTO[family], 0, 0)
        + attribute(NFTA_SET_ELEM_LIST_TABLE, OUR_TABLE)
        + attribute(NFTA_SET_ELEM_LIST_SET, name.encode() + b"\0")
        + nested(NFTA_SET_ELEM_LIST_ELEMENTS, *elements)
    )
