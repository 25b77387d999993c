"""The guard: the firewall once more, in a table that nobody but its owner can take away.

Some facts about owned tables (net/netfilter/nf_tables_api.c; since Linux 5.12), each a test in tests/facts/:

- Who flushes the ruleset passes by a table that is another socket's own, and who deletes it is refused (nft_flush,
  nft_table_lookup). So while somebody has emptied our tables (nft -f /etc/nftables.conf begins with that), the guard
  keeps the way closed until they are put back.
- When its socket is closed it is gone, or since Linux 6.9 (NFT_TABLE_F_PERSIST) an orphan (nft_rcv_nl_event): its rules
  stay in force, and it is everybody's again, to flush and to delete. So a daemon that is killed after somebody has
  emptied our tables, and before they are back, leaves the way closed; against who empties them later there is only
  routing.
- An orphan is adopted by whoever names both flags (nf_tables_updtable), with what it holds, and neither flag can be
  changed otherwise. So a start takes the way over as it is.
- Only the socket that owns it may change it. Therefore it is not the `nft` program that writes it but the library that
  the program consists of, whose context has one socket for as long as it lives. nft 1.0.6 has no word for the flag, and
  each of its `table … { }` blocks would take the flag away, which is refused: so the table is claimed by a message of
  our own, and filled by commands without such a block.
"""

import errno
import re
from collections.abc import Iterable

from tunsplit.errors import KernelError
from tunsplit.kernel import nft
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.libnftables import Context
from tunsplit.kernel.namespace import call_in_new
from tunsplit.kernel.netlink import NLM_F_CREATE, Refused, attribute
from tunsplit.kernel.nftsocket import (
    NFGENMSG,
    NFPROTO,
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWTABLE,
    NFTA_TABLE_NAME,
    NftSocket,
)
from tunsplit.names import NFT_GUARD

TABLE = f"inet {NFT_GUARD}"
OWNER = re.compile(" # progname .*")

# include/uapi/linux/netfilter/nf_tables.h
NFTA_TABLE_FLAGS = 2
NFT_TABLE_F_OWNER, NFT_TABLE_F_PERSIST = 0x2, 0x4
NAMED = NFGENMSG.pack(NFPROTO["inet"], 0, 0) + attribute(NFTA_TABLE_NAME, NFT_GUARD.encode() + b"\0")


class Guard(Closing):
    """A table of our own in the network namespace that the calling thread was in when this was made.

    Attributes:
        persists: whether it outlives us; known once it stands.
    """

    def __init__(self) -> None:
        self._context = Context()
        try:
            self._socket = NftSocket(self._context.share())
        except KernelError:
            self._context.close()
            raise
        self._commands: str | None = None  # as last applied; None: what stands there is an orphan, if anything
        self.persists = False

    def close(self) -> None:
        """Leave the table to whoever comes next, where the kernel lets it outlive us."""
        self._socket.close()
        self._context.close()

    def apply(self, commands: str) -> bool:
        """Fill the table with what these commands add, in one transaction; no commands, no table. Say if that is new.

        An orphan is adopted, and what it holds stays in force until then.

        Raises:
            KernelError: the kernel knows no owners; or said no for another reason.
        """
        if commands == self._commands:
            return False
        changed = True
        if commands:
            if not self._commands:
                self._claim()
            # Another release may have left chains that we know nothing of, and an empty one drops.
            left = self._socket.chains(NFT_GUARD) if self._commands is None else ()
            gone = "".join(f"delete chain {TABLE} {name}\n" for name in left)
            self._context.run(f"flush table {TABLE}\n{gone}{commands}")
        else:
            changed = _delete(self._socket)
        self._commands = commands
        return changed

    def _claim(self) -> None:
        """Make the table our own, whether it is there or not."""
        for flags in (NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST, NFT_TABLE_F_OWNER):
            number = self._socket.change([(NFT_MSG_NEWTABLE, NLM_F_CREATE, claim_of(flags))])
            if number != errno.EOPNOTSUPP:
                break
        if number:
            raise Refused(f"table {TABLE}", number)
        self.persists = bool(flags & NFT_TABLE_F_PERSIST)


def chain(name: str, rules: Iterable[str]) -> str:
    """Commands that fill a chain which no packet enters."""
    return f"add chain {TABLE} {name}\n" + "".join(f"add rule {TABLE} {name} {rule}\n" for rule in rules)


def claim_of(flags: int) -> bytes:
    """What a message says that makes or adopts the table with these flags."""
    return NAMED + attribute(NFTA_TABLE_FLAGS, flags.to_bytes(4, "big"))


def delete() -> bool:
    """Take the guard away that a killed daemon has left; say if there was one."""
    with NftSocket() as socket:
        return _delete(socket)


def _delete(socket: NftSocket) -> bool:
    number = socket.change([(NFT_MSG_DELTABLE, 0, NAMED)])
    if number not in (0, errno.ENOENT):
        raise Refused(f"table {TABLE}", number)
    return number == 0


def listing() -> str:
    """The guard's table as it stands in the kernel, whoever owns it; empty where there is none."""
    with NftSocket() as socket:
        if not socket.has_table(name=NFT_GUARD):
            return ""
    return OWNER.sub("", nft.run("-s", "list", "table", *TABLE.split()))


def normal_form(commands: str) -> str:
    """What `listing` would show of what these commands add; they are tried in a network namespace of their own.

    Raises:
        KernelError: nft says no, or there may be no such namespace.
    """

    def put_and_list() -> str:
        with Guard() as guard:
            guard.apply(commands)
            return listing()

    return call_in_new(put_and_list)
