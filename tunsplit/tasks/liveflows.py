"""Live flows when verdicts change: those that have lost their side end at once, in both directions.

Theory of operation. A flow is judged again by what it was attributed to. One whose verdict is no longer its own ends:

    TCP    its socket is destroyed; the kernel's RST comes into the tun a moment later and is passed on, so that the
           peer hears of it on the old side; then the flow is refused, so that no late packet opens it anew.
    UDP    its socket is destroyed, so that the app does not wait, but for a server's; a datagram sent after that is
           judged anew.
    other  the next packet is judged anew.

While that is done packets are carried, and what is heard before each of them may end others: these join in.

Events tell who became another program or user, and who was born; that a descriptor was passed over a unix socket nobody
tells, so all holders are looked for now and then (tasks/holders.py).
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import trio

from tunsplit.engine.attribution import Owner
from tunsplit.engine.flow import Flow, FlowEvent, FlowState
from tunsplit.engine.nat import Nat
from tunsplit.engine.policy import Judgement, Verdict
from tunsplit.errors import KernelError
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.process import Process
from tunsplit.tasks.halfopen import HalfOpen
from tunsplit.tasks.holders import Held
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.refusals import Refusal, Refusals
from tunsplit.wire.ip import TCP, UDP

RST_S = 0.005  # how long the kernel may take to send the RST of a destroyed socket: 0.3 ms, seen
MOST_RST_S = 4 * RST_S  # where others are to be ended meanwhile
MOST_BATCHES = 32  # of packets that wait in the tun while a switch is carried out

logger = logging.getLogger(__name__)


class LiveFlows:
    """Judges open flows again, and ends them."""

    def __init__(
        self,
        *,
        judge: Judge,
        nat: Nat,
        refused: Refusals,
        half_open: HalfOpen,
        diag: SockDiag,
        processes: Processes,
        carry: Callable[[], int],
    ) -> None:
        """`carry` takes one batch of packets from the tun to their side, and gives back how many there were."""
        self._judge = judge
        self._nat = nat
        self._refused = refused
        self._half_open = half_open
        self._diag = diag
        self._processes = processes
        self._carry = carry
        self._ending: list[tuple[Flow, Judgement]] = []  # by what is being carried out now …
        self._resets: list[Flow] = []  # … of these a RST is to come
        self._reset_until = 0.0  # monotonic

    def forget_refusals(self) -> None:
        """What was refused may be allowed; but not what the sockets of flows that are just being ended had sent."""
        kept = [self._refused.get((flow.protocol, flow.key)) for flow, _ in self._ending]
        self._refused.clear()
        for refusal in kept:
            if refusal is not None:
                self._refused.remember(refusal)

    def rejudge_all(self) -> None:
        """Judge all flows again, and forget what was refused."""
        self.forget_refusals()
        self.rejudge(flow for flow in self._nat if not flow.forwarded)

    def tunnel_changed(self) -> None:
        """The tunnel has come or gone, and so the side of the VPN's client has changed."""
        if not self._judge.policy.clients:
            return
        try:
            self._judge.prepare()
        except KernelError as error:
            logger.error("the VPN's client is judged by what was known of it", extra={"error": str(error)})
        self.rejudge_all()

    def rejudge(self, flows: Iterable[Flow]) -> None:
        """Judge flows again; those that have lost their side, or cannot be judged, end at once."""
        losers: list[tuple[Flow, Judgement]] = []
        for flow in flows:
            if flow.ending:
                continue
            judgement = self._judge_again(flow)
            if judgement.verdict.value != flow.verdict:
                losers.append((flow, judgement))
            else:
                flow.reason = judgement.reason
        if losers:
            self._end(losers)

    def _judge_again(self, flow: Flow) -> Judgement:
        try:
            judgement = self._judge.judge(flow.owner)
            if judgement.verdict.value != flow.verdict and self._has_lost_holders(flow):
                judgement = self._judge.judge(flow.owner)
        except Exception as error:  # the kernel's no, or a mistake of ours
            if not isinstance(error, KernelError):
                logger.exception("a flow cannot be judged again")
            # Nobody asks again for this change, so what cannot be judged ends.
            return Judgement(Verdict.BLOCK, f"cannot be judged: {error}")
        return judgement

    def _has_lost_holders(self, flow: Flow) -> bool:
        """Whether some of several holders have closed the flow's socket since; they are forgotten then."""
        if flow.owner is None or len(flow.owner.holders) < 2:
            return False
        sockets = set(flow.sockets)
        left = tuple(one for one in flow.owner.holders if self._processes.held_of(one.pid, sockets))
        if not left or len(left) == len(flow.owner.holders):
            return False
        flow.owner = flow.owner._replace(holders=left)
        return True

    def on_change(self, changed: set[tuple[int, int]]) -> None:
        """Processes stand elsewhere than before: judge the flows that they hold."""
        self.rejudge([flow for flow in self._nat if changed & _holders(flow.owner)])
        self.forget_refusals()

    def on_exec(self, process: Process) -> None:
        """A process runs another program: live flows whose sockets it has inherited have one holder more."""
        # Programs start all the time, and flows may be many: those that inherit no socket must not cost a look at each.
        held = self._processes.sockets_of(process.pid) if len(self._nat) else None
        if not held or held.isdisjoint(self._nat.sockets):
            return
        heirs = []
        for flow in self._nat:
            if flow.owner is not None and not held.isdisjoint(flow.sockets):
                others = [one for one in flow.owner.holders if (one.pid, one.start_time) != process[:2]]
                flow.owner = flow.owner._replace(holders=(*others, process))
                heirs.append(flow)
        self.rejudge(heirs)

    def _end(self, losers: list[tuple[Flow, Judgement]]) -> None:
        in_progress = bool(self._ending)
        self._ending += losers
        try:
            self._end_sockets(losers)
            if not in_progress:  # else these are ended with those that are just being ended
                self._carry_what_was_sent()
        finally:
            if not in_progress:
                ended, self._ending, self._resets = self._ending, [], []
                self._end_now(ended)

    def _carry_what_was_sent(self) -> None:
        """Take packets out of the tun, so that the RSTs reach the peers, and nothing older is judged anew."""
        latest = time.monotonic() + MOST_RST_S
        while any(flow.state is FlowState.OPEN for flow in self._resets):
            if time.monotonic() >= min(self._reset_until, latest):
                break
            if not self._carry():
                time.sleep(RST_S / 50)
        for _ in range(MOST_BATCHES):
            if not self._carry():
                break

    def _end_now(self, losers: list[tuple[Flow, Judgement]]) -> None:
        now = trio.current_time()
        for flow, judgement in losers:
            if flow.passes:
                self._half_open.remember(flow, now)
                self._nat.end(flow, FlowEvent.BLOCK, now)
            if flow.protocol == UDP:
                self._refused.pop((flow.protocol, flow.key), None)
            if flow.protocol == TCP:
                self._refused.remember(Refusal.of_flow(flow, now, f"switched: {judgement.reason}"))
        logger.info("flows ended by a switch", extra={"count": len(losers)})

    def _end_sockets(self, losers: list[tuple[Flow, Judgement]]) -> None:
        """Destroy the sockets; nothing of TCP leaves any more but the RSTs, and all others end here."""
        began = trio.current_time()
        for flow, _ in losers:
            if flow.protocol == TCP and flow.passes:  # its holder may have sent as what it has become
                self._nat.let_only_reset_pass(flow)
        for flow, judgement in losers:
            if flow.protocol == UDP:  # until this is done, what it has sent already opens nothing
                self._refused.remember(Refusal.of_flow(flow, began, judgement.reason))
            if _is_ended_by_its_socket(flow) and self._destroy(flow) and flow.protocol == TCP:
                self._resets.append(flow)
            if flow.protocol != TCP and flow.passes:
                # Before anything is carried: its holder may have sent as what it has become.
                self._nat.end(flow, FlowEvent.BLOCK, began)
        self._reset_until = time.monotonic() + RST_S

    def _destroy(self, flow: Flow) -> bool:
        try:
            return self._diag.destroy(flow.protocol, flow.key, flow.cookie)
        except KernelError as error:
            logger.warning(
                "a socket cannot be ended: its app hears of it with its next packet", extra={"error": str(error)}
            )
            return False

    # As an asker of tasks/holders.py

    def wanted_sockets(self) -> set[int]:
        """The sockets of live flows, as inodes."""
        return self._nat.find_sockets()

    def take_holders(self, held: Held) -> Iterator[None]:
        """Judge those again whose sockets have other holders than before.

        Raises:
            KernelError: a holder cannot be read; all are left as they were for the next look.
        """
        try:
            self._judge.prepare()
        except KernelError:  # the judge tells of it; a storm of births must not end the flows of those who have none
            return
        self._compare([flow for flow in self._nat if not held.keys().isdisjoint(flow.sockets)], held)
        yield

    def holders_unknown(self) -> None:
        """End the flows of which nobody can tell any more whose they are."""
        judgement = Judgement(Verdict.BLOCK, "cannot be judged: nobody can look who holds its socket")
        if losers := [(flow, judgement) for flow in self._nat if flow.sockets and flow.passes and not flow.ending]:
            self._end(losers)

    def _compare(self, flows: Iterable[Flow], held: Held) -> None:
        changed: list[tuple[Flow, Owner]] = []
        for flow in flows:
            keys = frozenset().union(*(held.get(inode, frozenset()) for inode in flow.sockets))
            if keys == _holders(flow.owner):
                continue
            processes = [process for pid, start in keys if (process := self._processes.read(pid)) is not None
                         and process.start_time == start]  # fmt: skip
            if processes and flow.owner is not None:
                changed.append((flow, Owner(tuple(processes), flow.owner.certainty)))
        for flow, owner in changed:  # all of them are known: a failure before leaves them for the next look
            flow.owner = owner
        self.rejudge(flow for flow, _ in changed if flow.passes)


def _is_ended_by_its_socket(flow: Flow) -> bool:
    # A UDP server's waits for others' questions, not for answers: an error there would end many a server.
    return flow.protocol == TCP or (flow.protocol == UDP and not flow.answers)


def _holders(owner: Owner | None) -> set[tuple[int, int]]:
    return {(process.pid, process.start_time) for process in owner.holders} if owner else set()
