"""Opens a flow whose verdict lets it pass: translated, or as an answer to what came in.

Theory of operation. Not translated is what carries its side's address and was not opened here: a server's answers, and
TCP connections older than tunsplit. They pass if that side is their app's.

A UDP server's answer looks like any datagram. That it answers something, and what was asked, connection tracking knows:
it leaves from the address and the port that were asked. Asked on the other side, it does not leave at all: whoever asks
at one side's address and is answered from the other's knows that both are one host.

A connected socket keeps the address that it once got, also when the host has lost it; no answer reaches it then, nor an
error. The kernel lets it send on with IPv6. So it is ended, and its app, which is told by that, connects anew.
"""

from collections.abc import Callable

from tunsplit.engine.attribution import Attribution, Certainty
from tunsplit.engine.direction import source_of
from tunsplit.engine.flow import App, Flow
from tunsplit.engine.nat import Nat
from tunsplit.engine.policy import Judgement
from tunsplit.engine.rewrites import Way
from tunsplit.engine.slowpath import Unknown, opens_connection, segment_of
from tunsplit.tasks.dnscapture import DnsCapture
from tunsplit.tasks.ipsec import CLAIMED
from tunsplit.tasks.network import Network
from tunsplit.tasks.portchoice import Asked, PortChoice
from tunsplit.tasks.sources import SocketSource
from tunsplit.wire.ip import TCP, UDP

# What hinders a flow that its verdict would let pass.
NO_ROOM = "no room"
NO_WAY = "the {} has no way there"  # which side
OTHER_SIDES = "it answers what came in on another side"
NOT_LOCAL = "it has an address that this host has no more"


class Opening:
    """Opens flows."""

    def __init__(
        self,
        nat: Nat,
        network: Network,
        source: SocketSource,
        dns: DnsCapture,
        ports: PortChoice,
        claimed: Callable[[int, bytes, Way], bool],
    ) -> None:
        """`claimed` says whether a policy of IPsec claims a flow, by protocol, four-tuple and way."""
        self._nat = nat
        self._source = source
        self._network = network
        self._dns = dns
        self._ports = ports
        self._claimed = claimed

    def open(self, first: Unknown, way: Way, judgement: Judgement, attribution: Attribution, now: float) -> str:
        """Open the flow; what hinders that, or nothing."""
        protocol, key = first.protocol, first.key
        app = App.of(attribution)
        user = app.uid if app else None
        if not self._nat.has_room(now, user):
            return NO_ROOM
        own = source_of(key)
        if own != self._network.own_address(first.headers.version) and not self._network.is_local(own):
            self._source.end(protocol, key, attribution.cookie)
            return NOT_LOCAL
        if self._dns.is_captured(way):
            flow = self._dns.open(first, way, judgement, attribution, now)
            if flow is None:
                return NO_ROOM
            self._nat.own(flow, attribution.owner, attribution.sockets)
            flow.cookie = attribution.cookie
            return ""
        if self._claimed(protocol, key, way):
            return CLAIMED
        if protocol == TCP and not opens_connection(first.packet, first.headers):
            if own != way.source and not self._network.is_address_of(way.device, own):
                return OTHER_SIDES  # or of a NAT that has been forgotten
            flow = self._open_untranslated(first, way, judgement, attribution, now)
            self._nat.outbound.control(flow.original, first.packet[first.headers.transport + 13])
            return ""
        if protocol == UDP:
            asked_at = self._network.own_addresses(first.headers.version)
            if (asked := self._ports.asked(key, way, asked_at)) is not None:
                if not self._network.is_address_of(way.device, asked.address):
                    return OTHER_SIDES
                self._open_untranslated(first, way, judgement, attribution, now, asked)
                return ""
        port = self._ports.choose(protocol, key, way, now, user, segment_of(first))
        if port is None:
            return NO_ROOM
        flow = self._nat.open(
            protocol, key, way, port or None, now,
            app=app, reason=judgement.reason, attribution=attribution.certainty,
            cookie=attribution.cookie,
        )  # fmt: skip
        self._nat.own(flow, attribution.owner, attribution.sockets)
        flow.verdict = judgement.verdict.value  # the DNS table may send it by the other side
        return ""

    def _open_untranslated(
        self,
        first: Unknown,
        way: Way,
        judgement: Judgement,
        attribution: Attribution,
        now: float,
        asked: Asked | None = None,
    ) -> Flow:
        # Then the socket found is the listener, which is not to end with the connection.
        unaccepted = attribution.certainty is Certainty.INHERITED
        flow = self._nat.open_untranslated(
            first.protocol, first.key, way, now,
            app=App.of(attribution), reason=judgement.reason, attribution=attribution.certainty, asked=asked,
            unaccepted=unaccepted,
        )  # fmt: skip
        self._nat.own(flow, attribution.owner, attribution.sockets)
        flow.cookie = None if unaccepted else attribution.cookie
        return flow
