"""Chooses NAT's outside ports, and keeps the kernel's hands off them.

A port may be nobody else's: no socket is bound to it, no connection that the kernel tracks (a masqueraded
guest's, above all) uses it towards the same peer. Until it has rested after use, packets to it reach
nobody but us (the sets of live ports in the nft table).
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tunsplit.engine.direction import destination_of, source_of
from tunsplit.engine.nat import PORT_POOLS, Nat
from tunsplit.engine.nftsets import SET_ECHO4, SET_ECHO6, SET_TCP, SET_UDP
from tunsplit.engine.ports import PortPool
from tunsplit.engine.rewrites import Way
from tunsplit.engine.timewait import Connection
from tunsplit.errors import KernelError
from tunsplit.kernel.conntrack import Conntrack
from tunsplit.kernel.liveports import LivePorts, TableMissing
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.wire.ip import TCP, UDP

SETS = {"tcp": (SET_TCP,), "udp": (SET_UDP,), "echo": (SET_ECHO4, SET_ECHO6)}
MOST_TRIES = 64

logger = logging.getLogger(__name__)


class Asked(NamedTuple):
    """Where a question came in: the host's packed address, and port."""

    address: bytes
    port: int


class PortChoice:
    """Ports for new flows."""

    def __init__(self, nat: Nat, live_ports: LivePorts, diag: SockDiag, conntrack: Conntrack) -> None:
        """`on_missing` is called when the nft table turns out to be gone; the network task puts it back."""
        self._nat = nat
        self._live_ports = live_ports
        self._diag = diag
        self._conntrack = conntrack
        self.on_missing: Callable[[], None] = lambda: None
        self.counters: Counter[str] = Counter()

    def choose(
        self, protocol: int, key: bytes, way: Way, now: float, user: int | None = None, syn: bytes = b""
    ) -> int | None:
        """A port for this flow of a user, 0 for one of a protocol without, or None where there is none to be had.

        `syn` is what a TCP connection opens with, from TCP's header on.

        Raises:
            KernelError: the kernel cannot be told, or asked.
        """
        if protocol not in PORT_POOLS:
            return 0 if self._nat.is_free(protocol, key, way, 0) else None
        if (port := self._nat.mapped_port(protocol, key, way)) is not None:
            return port
        name = PORT_POOLS[protocol]
        pool = self._nat.pools[name]
        connection = Connection(way.source + destination_of(key) + key[-2:], syn, now, 0) if protocol == TCP else None
        for _ in range(MOST_TRIES):
            if pool.must_reserve:
                self._reserve(name, pool, now)
            has_share = self._nat.may_have_port(name, user)
            port = pool.draw(connection) if has_share else None
            if port is None:
                if (port := self._shared(protocol, key, way)) is not None:
                    return port
                if not self._nat.free_port(name, now, user=user, his=not has_share):
                    break
                continue
            try:
                taken = self._is_taken(protocol, key, way, port)
            except KernelError:
                pool.put_back(port)
                self._tell(self._live_ports.delete, name, [port])
                raise
            if not taken:
                return port
            pool.refuse(port, now)
            self._tell(self._live_ports.delete, name, [port])
            self.counters["port_in_use"] += 1
        self.counters["ports_exhausted"] += 1
        return None

    def asked(self, key: bytes, way: Way, own: Iterable[bytes]) -> Asked | None:
        """Where the question came in that this datagram answers; None: it answers none.

        A UDP server that is bound to every address answers from the tun's; the kernel remembers who asked, and where.

        Args:
            key: the datagram's four-tuple.
            way: its own way out.
            own: the addresses of all sides.

        Raises:
            KernelError: the kernel cannot be asked.
        """
        port, peer_port = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
        source, peer = source_of(key), destination_of(key)
        # Who is bound to one of them was asked there alone. The likeliest of all is the one that new flows get.
        candidates = (source,) if source in own else dict.fromkeys((way.source, *own))
        for address in candidates:
            # By the reply's tuple: a port that was redirected is not the one that was asked.
            entry = self._conntrack.find(UDP, address, peer, port, peer_port)
            if entry is not None and entry.original.source == peer:
                return Asked(entry.original.destination, entry.original.destination_port)
        return None

    def rest(self, now: float) -> None:
        """Give the kernel back the ports that have rested, and see that the table which holds the others is there.

        Raises:
            KernelError: the kernel cannot be told.
        """
        if not self._live_ports.is_there():
            self._missing()
        for name, pool in self._nat.pools.items():
            if ports := pool.rested(now):
                self._tell(self._live_ports.delete, name, ports)

    def taken(self) -> Mapping[str, list[int]]:
        """All ports that are ours just now, by nft set."""
        return {one: self._nat.pools[name].taken() for name, sets in SETS.items() for one in sets}

    def _reserve(self, name: str, pool: PortPool, now: float) -> None:
        try:
            self._tell(self._live_ports.add, name, pool.reserve(now))
        except KernelError:  # the kernel would answer their packets: none of them may be used
            pool.give_up()
            raise

    def _shared(self, protocol: int, key: bytes, way: Way) -> int | None:
        """A live port that serves another destination already: TCP tells the flows apart by their four-tuples."""
        if protocol != TCP:
            return None
        for _ in range(MOST_TRIES):
            port = self._nat.pools["tcp"].some_live()
            if port is not None and self._nat.is_free(protocol, key, way, port):
                return port
        return None

    def _is_taken(self, protocol: int, key: bytes, way: Way, port: int) -> bool:
        if protocol not in (TCP, UDP):
            return False
        if self._diag.is_bound(protocol, 4 if len(way.source) == 4 else 6, port):
            return True
        peer_port = int.from_bytes(key[-2:], "big")
        return self._conntrack.has_entry(protocol, destination_of(key), way.source, peer_port, port)

    def _tell(self, change: Callable[[str, list[int]], None], name: str, ports: list[int]) -> None:
        for one in SETS[name]:
            try:
                change(one, ports)
            except TableMissing:
                self._missing()

    def _missing(self) -> None:
        # Somebody flushed the table. The network task puts it back, with all live ports; until then the kernel
        # answers their packets with resets, which come into the tun and end there.
        self.counters["table_missing"] += 1
        logger.warning("our nft table is gone and is put back")
        self.on_missing()
