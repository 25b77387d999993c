"""Our nftables tables as one process keeps them: put in force, and put anew when they are no longer as it put them.

What changes most is which addresses some sets hold, as when a tunnel comes back with others: that is one batch of
elements, a tenth of a millisecond. For all else both tables are replaced as one, which takes several.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

from tunsplit.kernel import nft
from tunsplit.kernel.nft import Nftables, Sets
from tunsplit.kernel.nftsocket import Move

LivePortsBySet = Mapping[str, Iterable[int]]


class NftTables:
    """Our tables in the network namespace of the calling thread.

    Args:
        live_ports: the ports that NAT holds now, by set; a table that has to be made anew starts with them.
        nftables: sockets that stay open; None: each change opens its own, and waits for what closing them waits for.

    Attributes:
        generation: the number of nftables' ruleset that our last change made; None where that is not known.
        touched: whether the last `apply` found that somebody else had changed what it had put there.
    """

    def __init__(self, live_ports: Callable[[], LivePortsBySet], nftables: Nftables | None) -> None:
        self._live_ports = live_ports
        self._nftables = nftables
        self._bodies: dict[str, str] | None = None  # as last applied
        self._sets: Sets = {}
        self._fingerprints: list[str | None] = []  # as the kernel showed them then
        self.generation: int | None = None
        self.touched = False

    def apply(self, bodies: dict[str, str], sets: Sets) -> bool:
        """Put these in force; return whether anything had to be changed.

        Raises:
            KernelError: nothing was changed.
        """
        with nullcontext(self._nftables) if self._nftables else Nftables() as nftables:
            standing = _fingerprints(nftables)
            self.touched = bool(self._fingerprints) and (self._bodies is None or standing != self._fingerprints)
            if bodies == self._bodies and standing == self._fingerprints:
                if sets == self._sets:
                    return False
                self.generation = nftables.socket.generation() + 1
                moved = nftables.socket.move_elements(_moves(self._sets, sets)) == 0
            else:
                moved = False
            if not moved:
                # The first one of this process takes nothing over from a dead one: its live ports died with it. And
                # who has changed what a set holds may have changed more of it.
                anew = self._bodies is None or None in standing or bodies == self._bodies
                self.generation = nftables.socket.generation() + 1
                elements = self._live_ports() if anew else {}
                nft.apply(bodies, anew=anew, sets=sets, elements=elements, context=nftables.context)
            self._bodies, self._sets, self._fingerprints = bodies, sets, _fingerprints(nftables)
            if nftables.socket.generation() != self.generation:
                # Somebody was at work meanwhile, and what was found may be his: all of it is put anew the next time.
                self._bodies, self._fingerprints, self.generation = None, [], None
        return True

    def distrust(self) -> None:
        """Put them anew the next time, whatever they look like."""
        self._bodies = None


def _fingerprints(nftables: Nftables) -> list[str | None]:
    return [nftables.socket.fingerprint(family) for family in nft.FAMILIES]


def _moves(before: Sets, after: Sets) -> list[Move]:
    """What has to come into each set and to go from it."""
    return [
        Move(
            family,
            name,
            new=tuple(address for address in addresses if address not in before[family][name]),
            gone=tuple(address for address in before[family][name] if address not in addresses),
        )
        for family, held in after.items()
        for name, addresses in held.items()
    ]
