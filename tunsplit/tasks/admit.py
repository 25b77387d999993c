"""A flow's first packet: attribute, judge, open or refuse.

Theory of operation. What no open flow takes comes here. If the owner can be told at once (his socket and
process are known from before) so is the verdict; else the packet is held and a worker looks for the owner,
giving way to running flows. Every packet ends in one of four ways: sent, refused with an answer to the app,
dropped and counted, or held; and what is held ends in one of the first three when its time is up.

Made by the kernel, and never attributed (a port scan must not cost us a search a packet): RSTs, echo
replies and ICMP errors of no flow.

Not translated is what carries its side's address and was not opened here: a server's answers, and TCP
connections older than tunsplit. They pass if the app belongs on that side.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterable

import trio

from tunsplit.engine.attribution import Attribution, Source, search_all
from tunsplit.engine.direction import ACK, RST, SYN, source_of
from tunsplit.engine.flow import UDP_PAUSE_S, App, Flow, FlowEvent, Rewrite
from tunsplit.engine.hold import Hold
from tunsplit.engine.nat import PORT_POOLS, Nat, Way
from tunsplit.engine.policy import Judgement, Verdict
from tunsplit.engine.slowpath import SlowPath, Unknown
from tunsplit.errors import KernelError
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.dnscapture import DnsCapture
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.network import Network
from tunsplit.tasks.portchoice import PortChoice
from tunsplit.tasks.refusals import REFUSED_S, Key, Refusal, Refusals
from tunsplit.tasks.side import HEADER, HEADROOM, frame_buffer
from tunsplit.tasks.sources import SocketSource
from tunsplit.wire import craft, icmp
from tunsplit.wire.ip import ICMP, ICMPV6, TCP, UDP

WORKERS = 4
QUIET_S = 1.0  # between two lines about failures of judgement

logger = logging.getLogger(__name__)


class Admit:
    """The slow path of first packets."""

    def __init__(
        self,
        *,
        nat: Nat,
        slow: SlowPath,
        source: SocketSource,
        sources: tuple[Source, ...],
        judge: Judge,
        network: Network,
        dns: DnsCapture,
        ports: PortChoice,
        answers: Answers,
        hold: Hold,
        protocols: frozenset[int],
    ) -> None:
        """`sources` are asked in order; `source` is the one of them that knows cookies."""
        self._nat = nat
        self._slow = slow
        self._source = source
        self._sources = sources
        self._judge = judge
        self._network = network
        self._dns = dns
        self._ports = ports
        self._answers = answers
        self._hold = hold
        self._protocols = protocols | {TCP, UDP, ICMP, ICMPV6}
        self._frame = frame_buffer()
        self._queue: deque[Key] = deque()
        self._queued = trio.Event()
        self._holding = trio.Event()
        self._quiet_until = 0.0
        self.refused = Refusals()
        self.counters: Counter[str] = Counter()

    # From the tun

    def passed_by(self, vnet_header: bytes, packet: bytes, now: float) -> None:
        """Take a packet that the fast path could not."""
        outcome = self._slow.translate_untrusted(vnet_header, packet, now)
        if isinstance(outcome, Unknown):
            self.first_packet(outcome, now)
            return
        for ready in outcome:
            self._send(ready.rewrite, ready.vnet, ready.packet)

    def first_packet(self, unknown: Unknown, now: float) -> None:
        """Admit, refuse, drop or hold a packet that no open flow takes."""
        key = (unknown.protocol, unknown.key)
        if key in self._hold:
            self._hold_or_refuse(unknown, now)
        elif self._is_for_nobody(unknown):
            self._slow.refuse_fragments(unknown, now)
        elif unknown.protocol not in self._protocols:
            self.refuse([unknown], Judgement(Verdict.BLOCK, "protocol not listed"), None, now)
        elif (known := self._nat.outbound.find(*key)) is not None and self._is_same_socket(unknown, known, now):
            self._pass(unknown, known, now)
        elif (refusal := self.refused.get(key)) is not None and self._holds(refusal, now):
            self._answer(unknown, now)
        else:
            self._attribute(unknown, now)

    def _is_for_nobody(self, unknown: Unknown) -> bool:
        """Whether the packet is the kernel's own, of no flow, or addressed to many: dropped, counted, never judged."""
        packet, at = unknown.packet, unknown.headers.transport
        if craft.is_multicast(unknown.headers.destination):
            self.counters["multicast"] += 1
        elif unknown.protocol == TCP and packet[at + 13] & RST:
            self.counters["reset_of_no_flow"] += 1
        elif unknown.protocol in icmp.ECHO_REQUEST and packet[at] != icmp.ECHO_REQUEST[unknown.protocol]:
            self.counters["icmp_of_no_flow"] += 1
        else:
            return False
        return True

    def _is_same_socket(self, unknown: Unknown, known: Rewrite, now: float) -> bool:
        """Whether the packet is of the very socket that the open flow is of: a SYN again, a datagram after a pause."""
        cookie, paused = known.flow.cookie, now - known.last_seen > UDP_PAUSE_S
        try:
            found = self._source.cookie(unknown.protocol, unknown.key, all_sockets=paused)
        except KernelError:
            return False  # then it is judged anew, which says what failed
        # A program that sends and ends leaves datagrams in the tun: nobody else has the port.
        gone = found is None and unknown.protocol == UDP and not paused
        return cookie is not None and (found == cookie or gone)

    def _holds(self, refusal: Refusal, now: float) -> bool:
        """Whether the refusal stands: it is young, and no other socket has the four-tuple since.

        A refused connect gives its port back at once, and the kernel may give it to another app's socket.
        """
        if refusal.since + REFUSED_S <= now:
            return False
        return refusal.cookie is None or self._has_cookie(refusal.protocol, refusal.key, refusal.cookie)

    def _has_cookie(self, protocol: int, key: bytes, cookie: bytes) -> bool:
        try:
            return self._source.cookie(protocol, key) == cookie
        except KernelError:
            return False  # then it is judged anew, which says what failed

    def _attribute(self, unknown: Unknown, now: float) -> None:
        try:
            self._source.note_newcomer(unknown.protocol, unknown.key)
            self._judge.prepare()
            for source in self._sources:
                attribution = source.attribute(unknown.protocol, unknown.key)
                if attribution is None:
                    break
                if attribution.owner is not None or source is self._sources[-1]:
                    self._judge_current([unknown], attribution, now)
                    return
        except KernelError as error:
            self._failed([unknown], error, now)
            return
        if self._hold_or_refuse(unknown, now):
            self._queue.append((unknown.protocol, unknown.key))
            self._queued.set()
            self._holding.set()

    def _hold_or_refuse(self, unknown: Unknown, now: float) -> bool:
        if self._hold.add(unknown, now):
            return True
        self.counters["hold_full"] += 1
        self._answer(unknown, now)
        return False

    # Tasks

    async def search(self) -> None:
        """A worker: find the owners of what is held, one flow after the other, until cancelled."""
        while True:
            while not self._queue:
                self._queued = trio.Event()
                await self._queued.wait()
            key = self._queue.popleft()
            if key not in self._hold:  # its time was up before its turn came
                await trio.lowlevel.checkpoint()
                continue
            try:
                await self._search_one(key)
            except Exception as error:  # the kernel's no, or a mistake of ours: it must not cost us the worker
                self._failed(self._hold.release(key), error, trio.current_time())

    async def _search_one(self, key: Key) -> None:
        attribution = None
        for found in search_all(self._sources, *key):
            attribution = found or attribution
            await trio.lowlevel.checkpoint()
            if key not in self._hold:
                return
        if held := self._hold.release(key):
            self.judge(held, attribution or Attribution("nobody found", None), trio.current_time())

    async def release_late(self) -> None:
        """Refuse what is held for too long, until cancelled."""
        while True:
            deadline = self._hold.next_deadline()
            if deadline is None:
                self._holding = trio.Event()
                await self._holding.wait()
                continue
            await trio.sleep_until(deadline)
            now = trio.current_time()
            for held in self._hold.expire(now):
                self.counters["held_too_long"] += 1
                try:
                    self.judge(held, Attribution("held too long", None), now)
                except Exception as error:  # as in `search`
                    self._failed(held, error, now)

    # Verdicts

    def judge(self, packets: list[Unknown], attribution: Attribution, now: float) -> None:
        """Open the flow that these packets began, or refuse it."""
        try:
            self._judge.prepare()
        except KernelError as error:
            self._failed(packets, error, now)
            return
        self._judge_current(packets, attribution, now)

    def _judge_current(self, packets: list[Unknown], attribution: Attribution, now: float) -> None:
        """The same, with the process tree as of this moment."""
        self.counters[f"attributed_{attribution.certainty.value}"] += 1
        first = packets[0]
        known = self._nat.outbound.find(first.protocol, first.key)
        try:
            judgement = self._judge.judge(attribution.owner)
            side = judgement.verdict.value
            if known is not None and not self._goes_on(known.flow, first.protocol, side, attribution, judgement):
                self._nat.end(known.flow, FlowEvent.TIMEOUT, now)
            if judgement.verdict is Verdict.BLOCK:
                self.refuse(packets, judgement, attribution, now)
                return
            if self._nat.outbound.find(first.protocol, first.key) is not None:
                self._pass_all(packets, now)
                return
            way = self._dns.way(first, side, attribution.owner)
            hindrance = f"the {side} has no way there" if way is None else ""
            if way is not None and not self._open(first, way, judgement, attribution, now):
                hindrance = "no room"
            if hindrance:
                self.refuse(packets, Judgement(Verdict.BLOCK, f"{judgement.reason}; {hindrance}"), attribution, now)
            else:
                self._pass_all(packets, now)
        except KernelError as error:
            self._failed(packets, error, now)

    def _goes_on(self, flow: Flow, protocol: int, side: str, attribution: Attribution, judgement: Judgement) -> bool:
        """Whether an open flow may go on with another socket or holder: datagrams may, on the same side."""
        if protocol == TCP or flow.verdict != side:
            return False
        flow.app, flow.owner, flow.sockets = App.of(attribution), attribution.owner, attribution.sockets
        flow.reason, flow.attribution, flow.cookie = judgement.reason, attribution.certainty.value, attribution.cookie
        return True

    def _pass_all(self, packets: list[Unknown], now: float) -> None:
        for packet in packets:
            if (rewrite := self._nat.outbound.find(packet.protocol, packet.key)) is not None:
                self._pass(packet, rewrite, now)

    def _open(self, first: Unknown, way: Way, judgement: Judgement, attribution: Attribution, now: float) -> bool:
        protocol, key = first.protocol, first.key
        app = App.of(attribution)
        opens = protocol != TCP or first.packet[first.headers.transport + 13] & (SYN | ACK) == SYN
        if not self._nat.has_room(now):
            return False
        if self._dns.is_captured(way):
            flow = self._dns.open(first, way, judgement, attribution, now)
            if flow is not None:
                flow.owner, flow.sockets, flow.cookie = attribution.owner, attribution.sockets, attribution.cookie
            return flow is not None
        if not opens:
            if source_of(key) != way.source and not self._network.is_address_of(way.device, source_of(key)):
                return False  # of another side, or of a NAT that has been forgotten
            flow = self._nat.open_untranslated(
                protocol, key, way, now, app=app, reason=judgement.reason, attribution=attribution.certainty.value
            )
            flow.owner, flow.sockets = attribution.owner, attribution.sockets
            return True
        if protocol == UDP and (asked := self._ports.asked_port(key, way)) is not None:
            flow = self._nat.open_untranslated(
                protocol, key, way, now,
                app=app, reason=judgement.reason, attribution=attribution.certainty.value, port=asked,
            )  # fmt: skip
            flow.owner, flow.sockets, flow.cookie = attribution.owner, attribution.sockets, attribution.cookie
            return True
        port = None
        if protocol in PORT_POOLS:
            port = self._ports.choose(protocol, key, way, now)
            if port is None:
                return False
        elif not self._nat.is_free(protocol, key, way, 0):
            return False
        flow = self._nat.open(
            protocol, key, way, port, now,
            app=app, reason=judgement.reason, attribution=attribution.certainty.value, cookie=attribution.cookie,
        )  # fmt: skip
        flow.owner, flow.sockets = attribution.owner, attribution.sockets
        flow.verdict = judgement.verdict.value  # the DNS table may send it by the other side
        self.refused.pop((protocol, key), None)
        return True

    def hold_for(self, longest_s: float) -> None:
        """Hold first packets for so long from now on."""
        self._hold.longest_s = longest_s
        self._holding.set()

    def refuse(
        self, packets: Iterable[Unknown], judgement: Judgement, attribution: Attribution | None, now: float
    ) -> None:
        """Answer each packet so that its app knows at once, and remember the flow as refused."""
        self.counters["refused"] += 1
        for packet in packets:
            key = (packet.protocol, packet.key)
            self.refused.remember(Refusal.of(key, now, judgement.reason, attribution))
            self._answer(packet, now)

    def _failed(self, packets: list[Unknown], error: Exception, now: float) -> None:
        """An organ of judgement failed: nothing is guessed."""
        self.counters["judgement_failed"] += 1
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_S
            traceback = None if isinstance(error, KernelError) else error
            logger.error("a flow cannot be judged and is refused", exc_info=traceback, extra={"error": str(error)})
        for packet in packets:
            if (known := self._nat.outbound.find(packet.protocol, packet.key)) is not None:
                self._nat.end(known.flow, FlowEvent.BLOCK, now)
        self.refuse(packets, Judgement(Verdict.BLOCK, "the kernel gave no answer"), None, now)

    def statistics(self) -> dict[str, int]:
        """Counters, and how much is held and remembered."""
        return {
            **self._hold.statistics(),
            **self._answers.counters,
            "remembered_refusals": len(self.refused),
            **self.counters,
        }

    # Packets

    def _pass(self, unknown: Unknown, rewrite: Rewrite, now: float) -> None:
        for ready in self._slow.pass_on(unknown, rewrite, now):
            self._send(ready.rewrite, ready.vnet, ready.packet)

    def _send(self, rewrite: Rewrite, header: bytes | bytearray, packet: bytes | bytearray) -> None:
        frame = self._frame
        frame[HEADER:HEADROOM] = header
        frame[HEADROOM : HEADROOM + len(packet)] = packet
        rewrite.device.send(frame, len(packet), rewrite)  # type: ignore[attr-defined]  # opaque to the engine

    def _answer(self, unknown: Unknown, now: float) -> None:
        """Tell the app that this packet goes nowhere."""
        self._slow.refuse_fragments(unknown, now)
        self._answers.refuse(unknown)
