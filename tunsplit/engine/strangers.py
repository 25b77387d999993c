"""What the kernel answers to strangers, and that should not come into the tun, in the words of nft.

Theory of operation. What this host sends comes into the tun to be judged, the kernel's own answers too: a reset for
whoever knocks at a port where nobody listens, an echo reply, a listener's SYN/ACK. The first two are of no flow and
are dropped there; of the last each is the first packet of one. In a flood of such they would fill the tun's queue,
which all apps share, and apps' packets would be lost. So the first two never get there, and the last not without end.
"""

from collections.abc import Iterable, Iterator

from tunsplit.engine.nftwords import chain_words, device_set, listed
from tunsplit.host import FAMILIES, IPAddress

MOST_ACCEPTED = "500/second burst 100 packets"  # of connections from outside, each IP version: a judgement costs 300 µs


def chain(tun: str, addresses: Iterable[IPAddress]) -> str:
    """The chain; `addresses` are the tun's own.

    Raises:
        KernelError: the device has a name that nft's language cannot hold.
    """
    # After conntrack, which a rule asks.
    return chain_words("unanswered", "type filter hook postrouting priority srcnat + 11", _unanswered(tun, addresses))


def _unanswered(tun: str, addresses: Iterable[IPAddress]) -> Iterator[str]:
    into, drop = f"oifname {device_set([tun])}", "counter name answered_nobody drop"
    yield f"{into} icmp type echo-reply {drop}"
    yield f"{into} icmpv6 type echo-reply {drop}"
    own = list(addresses)
    for version, family in zip(FAMILIES, ("ip", "ip6"), strict=True):
        # What carries the tun's address is our own resolver's answer to an app, over TCP.
        ours = [address for address in own if address.version == version]
        others = f"{family} saddr != {{ {listed(ours)} }}" if ours else f"meta nfproto ipv{version}"
        # A connection whose handshake is complete is assured (nf_conntrack_proto_tcp.c): its reset passes.
        yield f"{into} {others} tcp flags rst ct direction reply ct status and assured == 0 {drop}"
        yield f"{into} {others} tcp flags & (syn | ack) == syn | ack limit rate over {MOST_ACCEPTED} {drop}"
