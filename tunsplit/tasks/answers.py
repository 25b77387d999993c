"""What the apps are told: that a packet is refused, too big, or that nobody answers where it was to go.

All of it is written into the tun that the packet came out of, as if by a router next to the host.
"""

from collections import Counter

from tunsplit.engine.flow import Flow, Rewrite
from tunsplit.engine.slowpath import Unknown
from tunsplit.kernel.tun import Tun
from tunsplit.tasks.network import Network
from tunsplit.tasks.tuns import Tuns
from tunsplit.wire import craft, icmp, vnet
from tunsplit.wire.ip import TCP, UDP, parse_untrusted


class Answers:
    """Answers of our own to the apps behind the tun."""

    def __init__(self, tuns: Tuns, network: Network) -> None:
        self._tuns = tuns
        self._network = network
        self.counters: Counter[str] = Counter()

    def refuse(self, unknown: Unknown, *, forwarded: bool = False) -> None:
        """This packet, an app's or a guest's, goes nowhere."""
        if (sender := self._sender(unknown.headers.version)) is not None:
            tun = self._tuns.forwarded if forwarded else self._tuns.own
            _write(tun, craft.refusal(unknown.packet, unknown.headers, sender))

    def ended(self, flow: Flow) -> None:
        """This flow has lost its way: its sender is told as if it had sent one packet more."""
        packet = craft.shortest(flow.protocol, flow.key)
        headers = parse_untrusted(packet, len(packet))
        if (sender := self._sender(headers.version)) is not None:
            _write(self._tuns.of(flow), craft.refusal(packet, headers, sender))

    def unreachable(self, rewrite: Rewrite, packet: bytes) -> None:
        """Nobody answers for the next hop of this packet, which is rewritten already."""
        sent = _as_sent(rewrite, packet)
        headers = parse_untrusted(sent, len(sent))
        kind, code = icmp.UNREACHABLE[headers.version], icmp.HOST_UNREACHABLE[headers.version]
        if (sender := self._sender(headers.version)) is not None:
            _write(self._tuns.of(rewrite.flow), craft.icmp_error(sent, headers, sender, kind, code))

    def no_way(self, rewrite: Rewrite, packet: bytes) -> None:
        """There is no route for this packet, which is rewritten already.

        A connection outlives that (RFC 1122 §4.2.3.9), who sends datagrams is told.
        """
        if rewrite.flow.protocol == TCP:
            self.unreachable(rewrite, packet)
            return
        sent = _as_sent(rewrite, packet)
        headers = parse_untrusted(sent, len(sent))
        if (sender := self._sender(headers.version)) is not None:
            _write(self._tuns.of(rewrite.flow), craft.refusal(sent, headers, sender))

    def too_big(self, rewrite: Rewrite, packet: bytes, mtu: int) -> None:
        """This packet, rewritten already, is bigger than its device takes."""
        sent = _as_sent(rewrite, packet)
        headers = parse_untrusted(sent, len(sent))
        if (sender := self._sender(headers.version)) is not None:
            _write(self._tuns.of(rewrite.flow), craft.too_big(sent, headers, sender, mtu))

    def _sender(self, version: int) -> bytes | None:
        """Who signs our answers; None, and counted, where the tun has no address of this version: no app of ours."""
        if (sender := self._network.own_router(version)) is None:
            self.counters["unanswered"] += 1
        return sender

    def write(self, packet: bytes | bytearray | None, flow: Flow) -> None:
        """Hand a packet to who sends this flow; None is none."""
        _write(self._tuns.of(flow), packet)


def _write(tun: Tun, packet: bytes | bytearray | None) -> None:
    if packet is not None:
        tun.write(vnet.NONE + packet)


def _as_sent(rewrite: Rewrite, packet: bytes) -> bytearray:
    """A packet as the app sent it, but for its checksums: what an ICMP error has to quote."""
    sent = bytearray(packet)
    key = rewrite.flow.key
    sent[rewrite.at : rewrite.end - 4] = key[:-4]
    headers = parse_untrusted(sent, len(sent))
    if headers.has_transport and headers.protocol in (TCP, UDP):
        sent[headers.transport : headers.transport + 4] = key[-4:]
    elif headers.has_transport and headers.protocol in icmp.ECHO_REQUEST:
        sent[headers.transport + 4 : headers.transport + 6] = key[-4:-2]
    return sent
