"""Our table of nftables' family netdev: what leaves by a device below IP, packet sockets included.

Some facts about the egress hook (net/core/dev.c, nf_hook_egress; net/netfilter/nft_chain_filter.c; since Linux 5.16):

- Every frame that is queued for a device meets it, also one whose socket passes the queue by (PACKET_QDISC_BYPASS). An
  AF_XDP socket does not pass there, even in copy mode.
- Whose frame is dropped gets ENOBUFS.
- A hook belongs to a device and goes with it. Since Linux 6.16 a chain keeps the name, and whatever bears it, now or
  later, has the hook from its first moment; before, the chain goes too where it has no other device, and a name that
  nobody bears is refused, with the whole transaction.

So it has a transaction of its own, which may fail: the firewall of IP stands without it.
"""

from contextlib import ExitStack, nullcontext

from tunsplit.errors import KernelError
from tunsplit.host import EgressTable
from tunsplit.kernel import nft
from tunsplit.kernel.namespace import call_in_new
from tunsplit.kernel.nft import Nftables
from tunsplit.kernel.tun import Tun
from tunsplit.names import NFT_TABLE

FAMILY = "netdev"
TABLE = f"{FAMILY} {NFT_TABLE}"


class Egress:
    """That table in the network namespace of the calling thread, as one process keeps it.

    Args:
        nftables: sockets that stay open; None: each change opens its own.

    Attributes:
        generation: the number of nftables' ruleset that our last change made; None where that is not known.
        complaint: why the table could not be put in force; None where it stands as wanted.
    """

    def __init__(self, nftables: Nftables | None) -> None:
        self._nftables = nftables
        self._body: str | None = None  # as last applied
        self._by_name = True  # whether devices may be named that are to come
        self._fingerprint: str | None = None  # as the kernel showed it then
        self.generation: int | None = None
        self.complaint: str | None = None

    def apply(self, wanted: EgressTable) -> bool:
        """Have this table, or none; return whether anything was changed. It is tried anew each time that it fails."""
        with nullcontext(self._nftables) if self._nftables else Nftables() as nftables:
            bodies = (wanted.body, wanted.body_now) if self._by_name else (wanted.body_now,)
            for body in dict.fromkeys(bodies):
                try:
                    changed = self._put(nftables, body)
                except KernelError as error:
                    self._body, self.generation, self.complaint = None, None, str(error)
                else:
                    self._by_name, self.complaint = body == wanted.body, None
                    return changed
        return False

    def _put(self, nftables: Nftables, body: str) -> bool:
        standing = nftables.socket.fingerprint(FAMILY)
        if (body == self._body and standing == self._fingerprint) or (not body and standing is None):
            return False
        self.generation = nftables.socket.generation() + 1
        nftables.context.run(_commands(body, nftables.socket.chains(NFT_TABLE, FAMILY)))
        self._body, self._fingerprint = body, nftables.socket.fingerprint(FAMILY)
        if nftables.socket.generation() != self.generation:
            # Somebody was at work meanwhile, and what was found may be his.
            self._body = self.generation = None
        return True

    def distrust(self) -> None:
        """Put it anew the next time, whatever it looks like."""
        self._body = None


def _commands(body: str, standing: list[str]) -> str:
    """What makes the table this one, in a transaction; counters go on."""
    if not body:
        return f"delete table {TABLE}\n"
    gone = "".join(f"delete chain {TABLE} {name}\n" for name in standing)
    return f"table {TABLE}\nflush table {TABLE}\n{gone}table {TABLE} {{\n{body}}}\n"


def normal_form(wanted: EgressTable) -> str:
    """What `nft.listing` would show of it; tried in a network namespace of its own, with the devices that are there.

    Empty where the kernel refuses it, for then there is none.
    """

    def put_and_list() -> str:
        with ExitStack() as stack:
            for device in wanted.devices:
                stack.enter_context(Tun(device))
            egress = Egress(None)
            egress.apply(wanted)
            return nft.listing(FAMILY) or ""

    return call_in_new(put_and_list)
