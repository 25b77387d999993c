"""Whose datagram it may have been: UDP ports whose socket died while packets waited in the tun.

Theory of operation. A datagram carries a port and no socket. Who is found on that port when the datagram is read need
not have sent it: its sender may have closed its socket since, and somebody else have bound the port. That sender lived
when the datagram entered the tun, so it died after the tun was last seen empty. Deaths are therefore remembered until
then, and while one is that could be the sender's, whoever has the port now is not believed.

A tun that is never empty is a queue all the same: what lay in it when a death was told has been carried once as many
packets as it holds have been. For a datagram that is held the deaths of its port are kept until it is judged.
"""

from collections import defaultdict
from collections.abc import Iterable

MOST = 16_384  # deaths remembered; with more, anybody on any port may have died
# A tun holds 500 packets (drivers/net/tun.c, TUN_READQ_SIZE), and a turn that does not empty it carries at least 8.
TURNS = 256
SOMEBODY = b""  # a cookie that nobody has

_Deaths = defaultdict[bytes, set[bytes]]


class PortDeaths:
    """The dead by port, in two generations: the elder goes when the tun cannot hold a packet of its time."""

    def __init__(self) -> None:
        self._young, self._old = _Deaths(set), _Deaths(set)
        self._kept: dict[bytes, set[bytes]] = {}  # for what is held
        self._unknown = [False, False]  # of the young and the old: who died was not told
        self._noted = self._turns = 0

    def __bool__(self) -> bool:
        """Whether anybody is remembered."""
        return bool(self._young or self._old or self._kept or True in self._unknown)

    def note(self, port: bytes, cookie: bytes) -> None:
        """Remember a socket that died on this port, two bytes as on the wire."""
        if self._noted >= MOST:
            self.note_unknown()
        else:
            self._young[port].add(cookie)
            self._noted += 1

    def note_unknown(self) -> None:
        """Remember that nobody knows who has died: it may have been on any port."""
        self._unknown[0] = True
        self._young.clear()
        self._noted = 0

    def doubts(self, port: bytes, known: Iterable[bytes | None], *, held: bool = False) -> bool:
        """Whether a datagram from this port may be of a dead socket that is none of the `known`, by cookie.

        `held`: it has been read before, and the tun may have been empty since.
        """
        dead = self._of(port)
        return not (dead | self._kept.get(port, set()) if held else dead) <= set(known)

    def carried(self, *, emptied: bool, held: Iterable[bytes]) -> None:
        """A turn has taken packets out of the tun, all of them or many; datagrams of the ports `held` are kept back."""
        if not emptied:
            self._turns += 1
            if self._turns < TURNS:
                return
        kept = {port: self._of(port) | self._kept.get(port, set()) for port in held}
        self._kept = {port: dead for port, dead in kept.items() if dead}
        self._old = _Deaths(set) if emptied else self._young
        self._unknown = [False, self._unknown[0] and not emptied]
        self._young = _Deaths(set)
        self._noted = self._turns = 0

    def _of(self, port: bytes) -> set[bytes]:
        dead = self._young.get(port, set()) | self._old.get(port, set())
        return dead | {SOMEBODY} if any(self._unknown) else dead
