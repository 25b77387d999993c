"""Takes questions to port 53 out of the tun and hands them to the DNS proxy; its answers go back into the tun.

Theory of operation. A question is judged like any packet (tasks/admit.py): held, attributed, refused where the app is
blocked. What it opens is a flow like any other too, listed, switched and expired as such, but the device that it leaves
by is one of these:

    Questions   UDP. The datagram's payload goes to the proxy, and the answer comes from the address that was asked.
    Loop        TCP. The segments go back into the tun, from a neighbour that does not exist to our listener
                (tasks/dnsconnections.py) on the tun's own address; the kernel is the other end of the connection.
                The listener's segments come out of the tun and find the flow's other direction.

What a switch has ended hears no answer to what it asked before.
"""

from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address

from tunsplit.engine.attribution import Attribution, Owner
from tunsplit.engine.direction import destination_of, reversed_key
from tunsplit.engine.dnstable import DnsTable
from tunsplit.engine.flow import App, Flow, FlowEvent, Rewrite
from tunsplit.engine.interception import PORTS, Handling, handling
from tunsplit.engine.nat import Nat
from tunsplit.engine.policy import Judgement, Verdict
from tunsplit.engine.rewrites import Way
from tunsplit.engine.slowpath import SlowPath, Unknown, opens_connection
from tunsplit.errors import KernelError, MalformedPacket
from tunsplit.host import IPAddress
from tunsplit.kernel.tun import Tun
from tunsplit.process import Process
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.dnsproxy import Asker, Reply, boottime
from tunsplit.tasks.network import Network
from tunsplit.tasks.side import HEADER, HEADROOM
from tunsplit.tasks.tuns import Tuns
from tunsplit.wire import craft, vnet
from tunsplit.wire.ip import FRAGMENT, NO_OPTIONS, TCP, UDP, parse_untrusted, unpack_u16

FIRST_PORT = 1024  # of those that stand for an app at our listener; they are nobody else's
MOST_TRIES = 64
PLAIN = 28  # bytes of headers without options in IPv4

Ask = Callable[[bytes, Asker, Reply, float], None]  # as DnsProxy.ask


class Conversation:
    """A flow's questions: who asks, and over UDP the way back, which are the same for each of them."""

    def __init__(self) -> None:
        self.app: App | None = None
        self.asker: Asker | None = None
        self.reply: Reply | None = None

    def asker_of(self, flow: Flow, *, client: bool) -> Asker:
        """Who asks in this flow; `client`: the VPN's client."""
        asker = self.asker
        if asker is None or self.app is not flow.app or asker.client is not client:
            asked, verdict = ip_address(destination_of(flow.key)), Verdict(flow.verdict)
            asker = Asker(flow.app, verdict, asked, flow.protocol == TCP, identity=flow.key, client=client)
            self.app, self.asker = flow.app, asker
        return asker


class Questions:
    """The device of questions over UDP."""

    def __init__(self, tuns: Tuns, ask: Ask, is_client: Callable[[Flow], bool]) -> None:
        self._tuns = tuns
        self._ask = ask
        self._is_client = is_client
        self.counters: Counter[str] = Counter()

    def send(self, frame: memoryview, size: int, rewrite: Rewrite) -> None:
        """Take the question out of a packet in a frame buffer."""
        packet = frame[HEADROOM : HEADROOM + size]
        try:
            start, end = datagram_untrusted(packet)
        except MalformedPacket:
            self.counters["dns_malformed"] += 1
            return
        conversation: Conversation = rewrite.next_hop  # type: ignore[assignment]  # opaque to the engine
        flow = rewrite.flow
        try:
            asker = conversation.asker_of(flow, client=self._is_client(flow))
        except KernelError:
            self.counters["dns_askers_unknown"] += 1
            return
        if conversation.reply is None:
            conversation.reply = self._reply_to(flow)
        segment = vnet.unpack(frame, HEADER)[3] or end - start  # a super-packet has several questions of one size
        now = boottime()
        for at in range(start, end, segment or 1):
            self.counters["dns_questions_udp"] += 1
            self._ask(bytes(packet[at : min(at + segment, end)]), asker, conversation.reply, now)

    def _reply_to(self, flow: Flow) -> Reply:
        packet_of, write = craft.Datagrams(reversed_key(flow.key)).packet, self._tuns.of(flow).write

        def reply(answer: bytes) -> None:
            if not flow.passes:
                self.counters["dns_answers_late"] += 1
                return
            packet = packet_of(answer)
            back = flow.reply  # not before: it leads to who holds this function
            back.packets += 1
            back.octets += len(packet)
            write(vnet.NONE + packet)

        return reply


class Loop:
    """The device of questions over TCP: back into the tun."""

    def __init__(self, tun: Tun) -> None:
        self._tun = tun

    def send(self, frame: memoryview, size: int, _: Rewrite) -> None:
        """Write the packet in a frame buffer, rewritten already, to the tun."""
        self._tun.write(frame[HEADER : HEADROOM + size])


class DnsCapture:
    """Says which flows are the proxy's, and opens them."""

    def __init__(
        self,
        *,
        tuns: Tuns,
        nat: Nat,
        network: Network,
        answers: Answers,
        ask: Ask,
        table: DnsTable,
        is_resolver: Callable[[Process], bool],
        is_client: Callable[[Owner | None], bool],
        random_below: Callable[[int], int],
    ) -> None:
        self._is_resolver = is_resolver
        self._is_client = is_client
        self._nat = nat
        self._tuns = tuns
        self._network = network
        self._answers = answers
        self._random_below = random_below
        self._questions = Questions(tuns, ask, lambda flow: is_client(flow.owner))
        self._loop = Loop(tuns.own)
        self.counters = self._questions.counters
        self._back = SlowPath(nat.inbound(self._loop), self.counters, outbound=False)
        self.table = table
        self.listeners: dict[int, int] = {}  # our listener's port, by IP version

    # For admit

    def way(self, first: Unknown, verdict: str, owner: Owner | None) -> Way | None:
        """How a flow of an app judged to be on this side leaves; None: not at all.

        Raises:
            KernelError: what its owner is cannot be known.
        """
        found = self.handling(first.protocol, first.key, verdict, owner)
        if found is Handling.ANSWER:
            return self._captured(first.protocol, first.headers.version, verdict)
        side = verdict if found is None else found.value
        return None if found is Handling.REFUSE else self._network.way(
            side, first.headers.version, destination_of(first.key)
        )  # fmt: skip

    def handling(self, protocol: int, key: bytes, verdict: str, owner: Owner | None) -> Handling | None:
        """What becomes of a flow to a resolver's port; None: it is none, or is left alone.

        A local resolver that is beside the tunnel, which only `force` or a word by hand can do, asks whom it likes: a
        recursive one could not work otherwise.

        Raises:
            KernelError: whether its owner is one, or the VPN's client, cannot be known.
        """
        if protocol not in (TCP, UDP) or key[-2:] not in PORTS:
            return None
        excluded = verdict == Verdict.UPLINK.value
        if excluded and owner is not None and all(map(self._is_resolver, owner.holders)):
            return None
        asked, port = ip_address(destination_of(key)), int.from_bytes(key[-2:], "big")
        return handling(
            self.table, port, asked, excluded=excluded, tunnel_up=self._network.tunnel_up, client=self._is_client(owner)
        )

    def explain(self, verdict: str, asked: IPAddress | None = None, *, client: bool = False) -> dict[str, object]:
        """What the table says to an app on this side that asks this resolver; None: our own stub."""
        excluded = verdict == Verdict.UPLINK.value
        choice = self.table.choose(excluded=excluded, tunnel_up=self._network.tunnel_up, asked=asked, client=client)
        servers = [{"address": str(server.address), "route": server.route.value} for server in choice.servers]
        return {"row": choice.row, "route": choice.route.value, "resolvers": servers}

    def _captured(self, protocol: int, version: int, verdict: str) -> Way | None:
        if protocol == UDP:
            return Way(verdict, self._questions, Conversation(), b"")
        peer = self._network.own_router(version)
        return None if peer is None or version not in self.listeners else Way(verdict, self._loop, None, peer)

    def is_captured(self, way: Way) -> bool:
        """Whether what leaves this way comes to us."""
        return way.device is self._questions or way.device is self._loop

    def has_captured(self, flow: Flow) -> bool:
        """Whether this flow's questions are answered by us: then where they go is the table's matter."""
        return flow.original.device is self._questions or flow.original.device is self._loop

    def open(
        self,
        first: Unknown,
        way: Way,
        judgement: Judgement,
        attribution: Attribution,
        now: float,
        *,
        forwarded: bool = False,
    ) -> Flow | None:
        """Open a captured flow, an app's or a guest's; None: it is none that can be opened."""
        protocol, key, how = first.protocol, first.key, "" if forwarded else attribution.certainty.value
        app = App.of(attribution)
        if protocol == UDP:
            return self._nat.open_untranslated(
                protocol, key, way, now, app=app, reason=judgement.reason, attribution=how, forwarded=forwarded
            )
        if not opens_connection(first.packet, first.headers):
            return None
        if (outside := self._outside(way, first.headers.version)) is None:
            return None
        return self._nat.open(
            protocol, key, way, None, now,
            app=app, reason=judgement.reason, attribution=how, cookie=attribution.cookie, outside=outside,
            forwarded=forwarded,
        )  # fmt: skip

    def _outside(self, way: Way, version: int) -> bytes | None:
        """A four-tuple to our listener that no other flow has."""
        own = self._network.own_address(version)
        if own is None:
            return None
        listener = self.listeners[version].to_bytes(2, "big")
        for _ in range(MOST_TRIES):
            port = FIRST_PORT + self._random_below(0x10000 - FIRST_PORT)
            outside = way.source + own + port.to_bytes(2, "big") + listener
            if self._nat.inbound(self._loop).find(TCP, reversed_key(outside)) is None:
                return outside
        return None

    # For the listener

    def flow_of(self, peer: bytes, port: int, version: int) -> Flow | None:
        """The flow that stands behind a peer at our listener; None: nobody's."""
        own = self._network.own_address(version)
        if own is None or version not in self.listeners:
            return None
        key = own + peer + self.listeners[version].to_bytes(2, "big") + port.to_bytes(2, "big")
        rewrite = self._nat.inbound(self._loop).find(TCP, key)
        return rewrite.flow if rewrite is not None else None

    def passed_by(self, vnet_header: bytes, packet: bytes, now: float) -> bool:
        """Take a segment of our listener's; False: the packet is none."""
        if not self._is_listeners(packet):
            return False
        outcome = self._back.translate_untrusted(vnet_header, packet, now)
        if isinstance(outcome, Unknown):  # a switch has ended the flow: so ends the connection
            self._answers.refuse(outcome)
        else:
            for ready in outcome:
                self._tuns.of(ready.rewrite.flow).write(ready.vnet + ready.packet)
        return True

    def _is_listeners(self, packet: bytes) -> bool:
        """Whether this is what our listener sends: as the kernel writes it, without options or extension headers."""
        version = packet[0] >> 4 if packet else 0
        at, protocol_at, source_at, size = (20, 9, 12, 4) if version == 4 else (40, 6, 8, 16)
        return (
            version in self.listeners
            and len(packet) >= at + 20
            and packet[protocol_at] == TCP
            and unpack_u16(packet, at)[0] == self.listeners[version]
            and packet[source_at : source_at + size] == self._network.own_address(version)
        )

    # Changes

    def review(self, now: float) -> None:
        """End the flows to resolvers' ports that would go another way now."""
        for flow in self._nat:
            if flow.protocol in (TCP, UDP) and flow.key[-2:] in PORTS and not self._goes_on(flow):
                self._nat.end(flow, FlowEvent.BLOCK, now)

    def _goes_on(self, flow: Flow) -> bool:
        try:
            found = self.handling(flow.protocol, flow.key, flow.verdict, flow.owner)
        except KernelError:
            return False  # then its next packet is judged anew, which says what failed
        if found is Handling.ANSWER:
            return self.has_captured(flow)
        return not self.has_captured(flow) and flow.side == (flow.verdict if found is None else found.value)


def datagram_untrusted(packet: memoryview) -> tuple[int, int]:
    """Where the payload of a whole UDP datagram begins and ends.

    Raises:
        MalformedPacket: it is a fragment, or its lengths do not fit.
    """
    size = len(packet)
    if size > PLAIN and packet[0] == NO_OPTIONS and packet[9] == UDP and not unpack_u16(packet, 6)[0] & FRAGMENT:
        start = PLAIN
        (length,) = unpack_u16(packet, start - 4)
        if length == size - start + 8:
            return start, size
    headers = parse_untrusted(packet, size)
    start = headers.transport + 8
    if headers.protocol != UDP or headers.identification is not None or start > headers.size:
        raise MalformedPacket("no whole datagram")
    (length,) = unpack_u16(packet, headers.transport + 4)
    if length and not 8 <= length <= headers.size - headers.transport:  # 0: a super-packet of more than 64 KiB
        raise MalformedPacket("UDP length does not fit")
    return start, headers.transport + length if length else headers.size
