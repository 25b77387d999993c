"""Paths that are narrower than their device (RFC 1191, RFC 8201), each known to one side only.

Theory of operation. A router's word that a packet was too big is kept here, per destination and per device, instead
of in the kernel's routes: the tun's are shared by the apps of both sides, and what a server or network does to a flow
of the one would show in the other's. Flows of TCP are believed only when their next large segment shows that the
quoted one was under way: anybody can send such an error, but he has to guess a sequence number in the window
(RFC 5927 §7). A datagram has nothing to be checked by; its ports are all that has to be guessed.

What was learned is forgotten after ten minutes (RFC 1191 §6.3), when a wider path may be tried again.
"""

from collections import OrderedDict

from tunsplit.wire.ip import SMALLEST_PATH

KNOWN_S = 600.0  # net.ipv4.route.mtu_expires
MOST_KNOWN = 4096  # destinations
SUSPECTED_S = 60.0
MOST_SUSPECTED = 256  # flows
WINDOW = 4 << 20  # octets that may be under way: the kernel's own limit for a sender (net.ipv4.tcp_wmem)
UNLIMITED = 1 << 17  # more than any packet has


class Paths:
    """What is known of the paths by one device."""

    def __init__(self, mtu: int) -> None:
        """`mtu` is the device's own, in bytes of an IP packet."""
        self.mtu = mtu
        self._known: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._suspected: OrderedDict[bytes, tuple[int, int, float]] = OrderedDict()

    def learn(self, destination: bytes, mtu: int, now: float) -> bool:
        """A router takes no more than `mtu` bytes on the way there; False if it tells nothing new or nothing possible.

        Below what every path of its IP version takes nothing is believed: IPv6 has 1280 (RFC 8201 §4), IPv4 what
        Linux believes (net.ipv4.route.min_pmtu).
        """
        mtu = self._believable(destination, mtu)
        if mtu >= self.mtu_to(destination):
            return False
        self._known.pop(destination, None)
        self._known[destination] = mtu, now
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return True

    def suspect(self, four_tuple: bytes, sequence: int, mtu: int, now: float) -> None:
        """The same about a segment of TCP that a flow may have sent; `four_tuple` as it leaves the device."""
        self._suspected.pop(four_tuple, None)
        self._suspected[four_tuple] = sequence, mtu, now
        if len(self._suspected) > MOST_SUSPECTED:
            self._suspected.popitem(last=False)

    def confirm(self, four_tuple: bytes, destination: bytes, end: int, now: float) -> bool:
        """A flow of TCP sends up to the sequence number `end`: may what is suspected of it have been under way?

        True if it is believed from now on.
        """
        suspected = self._suspected.get(four_tuple)
        # Either way round: what is sent next may be what was lost, or what was lost before it.
        if suspected is None or (end - suspected[0] + WINDOW) % (1 << 32) > 2 * WINDOW:
            return False
        del self._suspected[four_tuple]
        self.learn(destination, suspected[1], now)
        return True

    def mtu_to(self, destination: bytes) -> int:
        """How large a packet to there may be."""
        known = self._known.get(destination)
        return self.mtu if known is None else min(known[0], self.mtu)

    @property
    def narrowest(self) -> int:
        """No path is narrower than this, nor said to be; UNLIMITED where none is narrower than the device."""
        told = [mtu for mtu, _ in self._known.values()]
        told += [max(mtu, SMALLEST_PATH[4]) for _, mtu, _ in self._suspected.values()]
        return min(told, default=UNLIMITED)

    def expire(self, now: float) -> bool:
        """Forget what is old; whether there was any."""
        before = len(self._known) + len(self._suspected)
        while self._known and next(iter(self._known.values()))[1] + KNOWN_S <= now:
            self._known.popitem(last=False)
        while self._suspected and next(iter(self._suspected.values()))[2] + SUSPECTED_S <= now:
            self._suspected.popitem(last=False)
        return before != len(self._known) + len(self._suspected)

    def __len__(self) -> int:
        return len(self._known)

    @staticmethod
    def _believable(destination: bytes, mtu: int) -> int:
        return max(mtu, SMALLEST_PATH[4 if len(destination) == 4 else 6])
