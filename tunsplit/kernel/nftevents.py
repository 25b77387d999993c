"""What others do to our nftables tables, as it happens.

Some facts about the events of nftables (net/netfilter/nf_tables_api.c, nft_commit_notify, nf_tables_gen_notify):

- A transaction's messages name their table in the first attribute, whatever they are about; the last message, of a new
  generation, has the pid and the name of the program that asked. A flushed ruleset is one deleted table after another.
- The ports that come and go with our own flows are left out by their sender's port, before they wake anybody.
"""

from typing import NamedTuple

from tunsplit.kernel.netlink import ATTRIBUTE, NETLINK_NETFILTER, attributes, iterate_messages
from tunsplit.kernel.netlinkevents import NetlinkEvents
from tunsplit.kernel.nftsocket import NFGENMSG, NFNL_SUBSYS_NFTABLES, NFTA_GEN_ID, OUR_TABLE

NFNLGRP_NFTABLES = 7
NFT_MSG_NEWGEN = 15
NFTA_TABLE = 1  # of every message but a generation's
NFTA_GEN_PROC_PID, NFTA_GEN_PROC_NAME = 2, 3
BUFFER = 1 << 20  # bytes: others' rulesets may be long


class TableChange(NamedTuple):
    """A change of our tables: the generation that it made, and who made it; None where that is not known (any more)."""

    generation: int | None
    by: str | None


class TableEvents(NetlinkEvents):
    """Changes of our tables in the network namespace that the calling thread was in when this was made.

    Those that come from the netlink port `ignore_port` are left out.
    """

    def __init__(self, *, ignore_port: int = 0) -> None:
        groups = [NFNLGRP_NFTABLES]
        super().__init__("nftables' events", NETLINK_NETFILTER, groups, queue=BUFFER, unheard=ignore_port)

    def read(self) -> list[TableChange]:
        """Read what has happened to our tables since, a transaction each; never blocks.

        Raises:
            KernelError: no more news will come.
        """
        changes: list[TableChange] = []
        touched = False
        for datagram in self._datagrams():
            if datagram is None:
                touched = True  # ours may have been among them
                continue
            for kind, _, _, _, body in iterate_messages(datagram):
                if kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN:
                    if touched:
                        changes.append(_describe(body))
                    touched = False
                else:
                    touched |= _is_about_ours(kind, body)
        return [*changes, TableChange(None, None)] if touched else changes


def _is_about_ours(kind: int, body: bytes) -> bool:
    at = NFGENMSG.size
    if kind >> 8 != NFNL_SUBSYS_NFTABLES or len(body) < at + ATTRIBUTE.size:
        return False
    size, attribute = ATTRIBUTE.unpack_from(body, at)
    return attribute == NFTA_TABLE and body[at + ATTRIBUTE.size : at + size] == OUR_TABLE


def _describe(body: bytes) -> TableChange:
    found = attributes(body, NFGENMSG.size)
    number, pid = (int.from_bytes(found.get(kind, b""), "big") for kind in (NFTA_GEN_ID, NFTA_GEN_PROC_PID))
    name = found.get(NFTA_GEN_PROC_NAME, b"?").rstrip(b"\0").decode(errors="replace")
    return TableChange(number, f"{name} (pid {pid})")
