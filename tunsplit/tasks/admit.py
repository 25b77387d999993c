"""A flow's first packet: attribute, judge, open or refuse.

Theory of operation. What no open flow takes comes here. If the owner can be told at once (his socket and
process are known from before) so is the verdict; else the packet is held. A task looks for the owners of all who wait
at once, users in turn, and gives way to running flows. Every packet ends in one of four ways: sent, refused with an
answer to the app, dropped and counted, or held; and what is held ends in one of the first three when its time is up.

Made by the kernel, and never attributed (a port scan must not cost us a search a packet): RSTs, echo
replies and ICMP errors of no flow.

A connection that came in and that no process has accepted yet is judged by its listener, and looked at packet by packet
until somebody has: from then on it is judged by who that is.
"""

import logging
from collections import Counter
from collections.abc import Iterable

import trio

from tunsplit.engine.attribution import Attribution, Source, search_all
from tunsplit.engine.direction import SYN
from tunsplit.engine.flow import CLOSING, DNS_PORT, UDP_PAUSE_S, App, Flow, FlowEvent, Rewrite
from tunsplit.engine.hold import Hold
from tunsplit.engine.nat import Nat
from tunsplit.engine.policy import Judgement, Verdict
from tunsplit.engine.slowpath import Ready, SlowPath, Unknown, is_for_nobody
from tunsplit.engine.turns import Turns
from tunsplit.errors import KernelError
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.dnscapture import DnsCapture
from tunsplit.tasks.handovers import Handovers
from tunsplit.tasks.heirs import Heirs
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.network import Network
from tunsplit.tasks.opening import NO_WAY, Opening
from tunsplit.tasks.refusals import REFUSED_S, Key, Refusal, Refusals
from tunsplit.tasks.side import HEADER, HEADROOM, frame_buffer
from tunsplit.tasks.sources import SocketSource
from tunsplit.wire.ip import ICMP, ICMPV6, TCP, UDP

SEARCHED = 64  # flows that one pass over all processes serves: more, and others wait long for their verdicts
PAUSE = 8  # verdicts, before others get their turn: 3 ms
QUIET_S = 1.0  # between two lines about failures of judgement
BLOCK = Verdict.BLOCK

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
        opening: Opening,
        answers: Answers,
        hold: Hold,
        handovers: Handovers,
        heirs: Heirs,
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
        self._opening = opening
        self._answers = answers
        self._hold = hold
        self._handovers = handovers
        self._heirs = heirs
        self._protocols = protocols | {TCP, UDP, ICMP, ICMPV6}
        self._frame = frame_buffer()
        self._waiting = Turns()
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
            self.send(ready)

    def first_packet(self, unknown: Unknown, now: float) -> None:
        """Admit, refuse, drop or hold a packet that no open flow takes."""
        key = (unknown.protocol, unknown.key)
        if key in self._hold:
            self._hold_or_refuse(unknown, now)
        elif why := is_for_nobody(unknown):
            self.counters[why] += 1
            self._slow.refuse_fragments(unknown, now)
        elif unknown.protocol not in self._protocols:
            self.refuse([unknown], Judgement(Verdict.BLOCK, "protocol not listed"), None, now)
        elif (
            (known := self._nat.outbound.find(*key)) is not None
            and not _is_over(known.flow)
            and self._is_same_socket(unknown, known, now)
        ):
            if known.flow.state is CLOSING and not known.flow.unaccepted:
                self._nat.reopen(known.flow, now)
            self._pass(unknown, known, now)
        elif (refusal := self.refused.get(key)) is not None and self._holds(refusal, now):
            self._answer(unknown, now)
        else:
            self._attribute(unknown, now)

    def _is_same_socket(self, unknown: Unknown, known: Rewrite, now: float) -> bool:
        """Whether the packet is of the very socket that the open flow is of: a SYN again, a datagram after a pause."""
        cookie, paused = known.flow.cookie, now - known.last_seen > UDP_PAUSE_S
        self._catch_up()
        if not known.flow.passes:
            return False
        try:
            if known.flow.unaccepted:
                opens = unknown.packet[unknown.headers.transport + 13] & SYN
                return not opens and not self._source.is_accepted(unknown.key)
            found = self._source.cookie(unknown.protocol, unknown.key, all_sockets=paused)
            # A program that sends and ends leaves datagrams in the tun: nobody else has the port.
            gone = found is None and unknown.protocol == UDP and not paused
            if cookie is None or not (found == cookie or gone):
                return False
            return unknown.protocol != UDP or not (
                self._handovers.doubts(unknown.key, {cookie})
                or self._heirs.doubts(unknown.key, known.flow.owner, known.flow.sockets)
            )
        except KernelError:
            return False  # then it is judged anew, which says what failed

    def _catch_up(self) -> None:
        """Let what has become of processes take effect: flows that have lost their side by it end here."""
        try:
            self._judge.prepare()
            self._judge.tell()
        except KernelError:
            # One user's fork storm must not end the flows of others: they go on by what was known of their holders.
            self.counters["judged_late"] += 1

    def _holds(self, refusal: Refusal, now: float) -> bool:
        """Whether the refusal stands: it is young, and no other socket has the four-tuple since.

        A refused connect gives its port back at once, and the kernel may give it to another app's socket.
        """
        if refusal.since + REFUSED_S <= now:
            return False
        try:
            return refusal.cookie is None or self._source.cookie(refusal.protocol, refusal.key) == refusal.cookie
        except KernelError:
            return False  # then it is judged anew, which says what failed

    def _attribute(self, unknown: Unknown, now: float) -> None:
        user = None
        try:
            if self._waiting:
                user = self._source.user(unknown.protocol, unknown.key)
            # Who has others waiting waits too: to take in is dearer than to search for many at once.
            if user not in self._waiting:
                self._judge.prepare()
                for source in self._sources:
                    attribution = source.attribute(unknown.protocol, unknown.key)
                    if attribution is None:
                        break
                    if attribution.owner is not None or source is self._sources[-1]:
                        self._judge_current([unknown], attribution, now)
                        return
                user = self._source.user(unknown.protocol, unknown.key)
        except KernelError as error:
            self._failed([unknown], error, now)
            return
        if self._hold_or_refuse(unknown, now, user):
            self._waiting.add(user, (unknown.protocol, unknown.key))
            self._queued.set()
            self._holding.set()

    def _hold_or_refuse(self, unknown: Unknown, now: float, user: int | None = None) -> bool:
        if self._hold.add(unknown, now, user):
            return True
        self.counters["hold_full"] += 1
        self._answer(unknown, now)
        return False

    # Tasks

    async def search(self) -> None:
        """Find the owners of what is held, until cancelled: of all who wait at once, and so many as a pass serves."""
        while True:
            while not self._waiting:
                self._queued = trio.Event()
                await self._queued.wait()
            # Of some the time was up before their turn came.
            if not (keys := [key for key in self._waiting.take(SEARCHED) if key in self._hold]):
                await trio.lowlevel.checkpoint()
                continue
            try:
                await self._search_some(keys)
            except Exception as error:  # the kernel's no, or a mistake of ours: it must not cost us the task
                for key in keys:
                    if held := self._hold.release(key):
                        self._failed(held, error, trio.current_time())

    async def _search_some(self, keys: list[Key]) -> None:
        self._judge.prepare()  # the search goes by who was born
        for number, found in enumerate(search_all(self._sources, keys)):
            if found is not None and (held := self._hold.release(found[0])):
                self.judge(held, found[1], trio.current_time())
            if found is None or not number % PAUSE:
                await trio.lowlevel.checkpoint()
            if not any(key in self._hold for key in keys):
                return
        for key in keys:
            if held := self._hold.release(key):
                self.judge(held, Attribution("nobody found", None), trio.current_time())

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
        self._judge_current(packets, attribution, now, held=True)

    def _judge_current(
        self, packets: list[Unknown], attribution: Attribution, now: float, *, held: bool = False
    ) -> None:
        """The same, with the process tree as of this moment."""
        self.counters[f"attributed_{attribution.certainty}"] += 1
        first = packets[0]
        known = self._nat.outbound.find(first.protocol, first.key)
        try:
            if attribution.owner is None and known is not None and self._is_left(known.flow):
                self._pass_all(packets, now)
                return
            # By the source port 53 it is a local resolver that answers, perhaps by the socket that makes it one.
            asks_by = () if first.key[-4:-2] == DNS_PORT else attribution.sockets
            judgement = self._judge.judge(attribution.owner, asks_by)
            side = judgement.verdict
            if side is not BLOCK and (what := self._changes_hands(first, attribution, known, side, held=held)):
                # Dropped without a word, which would reach who has the port now. If it is his, he asks again.
                self.counters[f"{what}_changed_hands"] += len(packets)
                for packet in packets:
                    self._slow.refuse_fragments(packet, now)
                return
            if known is not None and not self._goes_on(known.flow, first.protocol, side, attribution, judgement):
                self._nat.end(known.flow, FlowEvent.TIMEOUT, now)
            if side is BLOCK:
                self.refuse(packets, judgement, attribution, now)
                return
            if self._nat.outbound.find(first.protocol, first.key) is not None:
                self._pass_all(packets, now)
                return
            way = self._dns.way(first, side, attribution.owner)
            if way is None:
                hindrance = NO_WAY.format(side)
            else:
                hindrance = self._opening.open(first, way, judgement, attribution, now)
            if hindrance:
                self.refuse(packets, Judgement(Verdict.BLOCK, f"{judgement.reason}; {hindrance}"), attribution, now)
            else:
                self.refused.pop((first.protocol, first.key), None)
                self._pass_all(packets, now)
        except KernelError as error:
            self._failed(packets, error, now)

    def _changes_hands(
        self, first: Unknown, attribution: Attribution, known: Rewrite | None, side: str, *, held: bool
    ) -> str | None:
        """What a datagram's sender may have had before those who have it now, and whose side may be another."""
        if first.protocol != UDP or attribution.owner is None:
            return None
        same_side = known.flow.cookie if known is not None and known.flow.verdict == side else None
        if self._handovers.doubts(first.key, {attribution.cookie, same_side}, held=held):
            return "port"
        return "socket" if self._heirs.doubts(first.key, attribution.owner, attribution.sockets, held=held) else None

    def _is_left(self, flow: Flow) -> bool:
        """Whether a connection has been accepted, answered and closed too soon for us, who know its listener's side."""
        return flow.unaccepted and not self._source.is_accepted(flow.key)

    def _goes_on(self, flow: Flow, protocol: int, side: str, attribution: Attribution, judgement: Judgement) -> bool:
        """Whether an open flow may go on with another socket or holder: datagrams may, on the same side."""
        if protocol == TCP or flow.verdict != side:
            return False
        self._nat.own(flow, attribution.owner, attribution.sockets)
        flow.app = App.of(attribution)
        flow.reason, flow.attribution, flow.cookie = judgement.reason, attribution.certainty, attribution.cookie
        return True

    def _pass_all(self, packets: list[Unknown], now: float) -> None:
        # To find the owner and to open the flow takes time, in which the side may have lost the address that it has.
        self._network.hear()
        for packet in packets:
            if (rewrite := self._nat.outbound.find(packet.protocol, packet.key)) is not None:
                self._pass(packet, rewrite, now)

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
        if unknown.headers.identification is not None:  # what it was cut into waits for it
            for ready in self._slow.pass_on(unknown, rewrite, now):
                self.send(ready)
            return
        frame, size = self._frame, len(unknown.packet)
        packet = frame[HEADROOM : HEADROOM + size]
        frame[HEADER:HEADROOM] = unknown.vnet
        packet[:] = unknown.packet
        self._slow.write_into(packet, unknown, rewrite, now)
        rewrite.device.send(frame, size, rewrite)  # type: ignore[attr-defined]  # opaque to the engine

    def send(self, ready: Ready) -> None:
        """Send what may go by its device."""
        frame, size = self._frame, len(ready.packet)
        frame[HEADER:HEADROOM] = ready.vnet
        frame[HEADROOM : HEADROOM + size] = ready.packet
        ready.rewrite.device.send(frame, size, ready.rewrite)  # type: ignore[attr-defined]  # opaque to the engine

    def _answer(self, unknown: Unknown, now: float) -> None:
        """Tell the app that this packet goes nowhere."""
        self._slow.refuse_fragments(unknown, now)
        self._answers.refuse(unknown)


def _is_over(flow: Flow) -> bool:
    """Whether both ends have closed a connection, so that what still has to be judged, a SYN, begins another."""
    return flow.protocol == TCP and flow.finished and not flow.unaccepted
