"""A guest's first packet: judged by the configuration alone, then opened or refused.

Theory of operation. What comes out of the tun of forwarded packets is a container's or a virtual machine's; the host's
own rules have rewritten its source perhaps (masquerade). It is no socket's of this host, whatever port it carries, and
is never attributed; all guests are on one side. From there on a flow is like any other: translated, listed, its
questions for names answered as the table says, ended when its side is lost. Its replies go back into that tun, and
conntrack and routing take them to the guest.

A connection that is older than tunsplit is refused: it carries an address that it cannot keep.
"""

from collections import Counter
from collections.abc import Callable

from tunsplit.engine.attribution import Attribution
from tunsplit.engine.flow import Flow, FlowEvent, FlowState, Rewrite
from tunsplit.engine.nat import Nat
from tunsplit.engine.policy import Judgement, Verdict
from tunsplit.engine.rewrites import Way
from tunsplit.engine.slowpath import Ready, SlowPath, Unknown, is_for_nobody, opens_connection, segment_of
from tunsplit.errors import KernelError
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.dnscapture import DnsCapture
from tunsplit.tasks.ipsec import CLAIMED
from tunsplit.tasks.opening import NO_ROOM, NO_WAY
from tunsplit.tasks.portchoice import PortChoice
from tunsplit.tasks.refusals import Refusal, Refusals
from tunsplit.wire.ip import ICMP, ICMPV6, TCP, UDP

NOBODY = Attribution("forwarded", None)  # of this host


class Forward:
    """Admits guests' flows."""

    def __init__(
        self,
        *,
        nat: Nat,
        slow: SlowPath,
        judge: Callable[[], Judgement],
        dns: DnsCapture,
        ports: PortChoice,
        answers: Answers,
        claimed: Callable[[int, bytes, Way], bool],
        send: Callable[[Ready], None],
        protocols: frozenset[int],
    ) -> None:
        """`judge` gives the verdict over all guests; `claimed` as for `Opening`; `send` takes what may go."""
        self._nat = nat
        self._slow = slow
        self._judge = judge
        self._dns = dns
        self._ports = ports
        self._answers = answers
        self._claimed = claimed
        self._send = send
        self._protocols = protocols | {TCP, UDP, ICMP, ICMPV6}
        self.refused = Refusals()
        self.counters: Counter[str] = Counter()

    def passed_by(self, vnet_header: bytes, packet: bytes, now: float) -> None:
        """Take a packet that the fast path could not."""
        outcome = self._slow.translate_untrusted(vnet_header, packet, now)
        if isinstance(outcome, Unknown):
            self.first_packet(outcome, now)
            return
        for ready in outcome:
            self._send(ready)

    def first_packet(self, unknown: Unknown, now: float) -> None:
        """Open, refuse or drop what no open flow takes."""
        if why := is_for_nobody(unknown):
            self.counters[f"forwarded_{why}"] += 1
            self._slow.refuse_fragments(unknown, now)
            return
        if (known := self._nat.forwarded.find(unknown.protocol, unknown.key)) is not None:
            if known.flow.state is FlowState.OPEN:  # a SYN once more
                self._pass(unknown, known, now)
                return
            self._nat.end(known.flow, FlowEvent.TIMEOUT, now)
        judgement = self._judge()
        if hindrance := self._hindrance(unknown, judgement, now):
            self._refuse(unknown, hindrance, now)

    def _hindrance(self, first: Unknown, judgement: Judgement, now: float) -> str:
        """Open a flow and pass its first packet; or say why that cannot be."""
        if first.protocol not in self._protocols:
            return "protocol not listed"
        if judgement.verdict is Verdict.BLOCK:
            return judgement.reason
        side = judgement.verdict.value
        try:
            way = self._dns.way(first, side, None)
            if way is None:
                return f"{judgement.reason}; {NO_WAY.format(side)}"
            if not self._dns.is_captured(way) and self._claimed(first.protocol, first.key, way):
                return f"{judgement.reason}; {CLAIMED}"
            if (flow := self._open(first, way, judgement, now)) is None:
                return f"{judgement.reason}; {NO_ROOM}"
        except KernelError as error:
            self.counters["forwarded_failed"] += 1
            return f"the kernel gave no answer: {error}"
        self._pass(first, flow.original, now)
        return ""

    def _open(self, first: Unknown, way: Way, judgement: Judgement, now: float) -> Flow | None:
        protocol, key = first.protocol, first.key
        if protocol == TCP and not opens_connection(first.packet, first.headers):
            return None
        if not self._nat.has_room(now):
            return None
        if self._dns.is_captured(way):
            return self._dns.open(first, way, judgement, NOBODY, now, forwarded=True)
        port = self._ports.choose(protocol, key, way, now, syn=segment_of(first))
        if port is None:
            return None
        flow = self._nat.open(protocol, key, way, port or None, now, reason=judgement.reason, forwarded=True)
        flow.verdict = judgement.verdict.value  # the DNS table may send it by the other side
        self.refused.pop((protocol, key), None)
        return flow

    def _refuse(self, packet: Unknown, reason: str, now: float) -> None:
        """Answer, so that the guest knows at once, and remember it for who asks."""
        self.counters["forwarded_refused"] += 1
        self.refused.remember(Refusal.of((packet.protocol, packet.key), now, reason, None))
        self._slow.refuse_fragments(packet, now)
        self._answers.refuse(packet, forwarded=True)

    def _pass(self, unknown: Unknown, rewrite: Rewrite, now: float) -> None:
        for ready in self._slow.pass_on(unknown, rewrite, now):
            self._send(ready)

    def judge_again(self, now: float) -> None:
        """End the flows that are no longer on their side, or have to be refused; what was refused is judged anew."""
        judgement = self._judge()
        self.refused.clear()
        for flow in self._nat:
            if flow.forwarded and flow.verdict != judgement.verdict.value:
                self._nat.end(flow, FlowEvent.BLOCK, now)
            elif flow.forwarded:
                flow.reason = judgement.reason
