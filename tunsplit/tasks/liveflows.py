"""Live flows when verdicts change: those that have lost their side end at once, in both directions.

Theory of operation. A flow is judged again by what it was attributed to. One whose verdict is no longer its own ends:

    TCP    its socket is destroyed; the kernel's RST comes into the tun a moment later and is passed on, so that the
           peer hears of it on the old side; then the flow is refused, so that no late packet opens it anew.
    UDP    its socket is destroyed, so that the app does not wait; a datagram sent after that is judged anew.
    other  the next packet is judged anew.

Events tell who became another program or user, and who was born; that a descriptor was passed over a unix socket nobody
tells, so all holders are looked for now and then.
"""

import logging
import time
from collections.abc import Callable, Iterable

import trio

from tunsplit.engine.attribution import Owner
from tunsplit.engine.flow import Flow, FlowEvent, FlowState
from tunsplit.engine.nat import Nat
from tunsplit.engine.policy import Judgement, Verdict
from tunsplit.errors import KernelError
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.process import Process
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.refusals import Refusal, Refusals
from tunsplit.wire.ip import TCP, UDP

RST_S = 0.005  # how long the kernel may take to send the RST of a destroyed socket: 0.3 ms, seen
MOST_BATCHES = 32  # of packets that wait in the tun while a switch is carried out
HOLDERS_S = 4.0  # between two looks at who holds the sockets of live flows

logger = logging.getLogger(__name__)


class LiveFlows:
    """Judges open flows again, and ends them."""

    def __init__(
        self,
        *,
        judge: Judge,
        nat: Nat,
        refused: Refusals,
        diag: SockDiag,
        processes: Processes,
        carry: Callable[[], int],
    ) -> None:
        """`carry` takes one batch of packets from the tun to their side, and gives back how many there were."""
        self._judge = judge
        self._nat = nat
        self._refused = refused
        self._diag = diag
        self._processes = processes
        self._carry = carry

    def rejudge_all(self) -> None:
        """Judge all flows again, and forget what was refused."""
        self._refused.clear()
        self.rejudge(self._nat)

    def rejudge(self, flows: Iterable[Flow]) -> None:
        """Judge flows again; those that have lost their side, or cannot be judged, end at once."""
        losers: list[tuple[Flow, Judgement]] = []
        for flow in flows:
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
        except KernelError as error:
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
        self._refused.clear()

    def on_exec(self, process: Process) -> None:
        """A process runs another program: live flows whose sockets it has inherited have one holder more."""
        flows = [flow for flow in self._nat if flow.sockets]
        inodes = {inode for flow in flows for inode in flow.sockets}
        held = self._processes.held_of(process.pid, inodes) if inodes else set()
        heirs = []
        for flow in flows:
            if flow.owner is not None and not held.isdisjoint(flow.sockets):
                others = [one for one in flow.owner.holders if (one.pid, one.start_time) != process[:2]]
                flow.owner = flow.owner._replace(holders=(*others, process))
                heirs.append(flow)
        self.rejudge(heirs)

    def _end(self, losers: list[tuple[Flow, Judgement]]) -> None:
        resets = []
        began = trio.current_time()
        for flow, judgement in losers:
            if flow.protocol == UDP:  # until this is done, what it has sent already opens nothing
                self._refused.remember(Refusal.of_flow(flow, began, judgement.reason))
            if flow.protocol in (TCP, UDP) and self._destroy(flow) and flow.protocol == TCP:
                resets.append(flow)
        deadline = time.monotonic() + RST_S
        while any(flow.state is FlowState.OPEN for flow in resets) and time.monotonic() < deadline:
            if not self._carry():
                time.sleep(RST_S / 50)
        for _ in range(MOST_BATCHES):  # what the sockets had sent already
            if not self._carry():
                break
        now = trio.current_time()
        for flow, judgement in losers:
            if flow.state in (FlowState.OPEN, FlowState.CLOSING):
                self._nat.end(flow, FlowEvent.BLOCK, now)
            if flow.protocol == UDP:
                self._refused.pop((flow.protocol, flow.key), None)
            if flow.protocol == TCP:
                self._refused.remember(Refusal.of_flow(flow, now, f"switched: {judgement.reason}"))
        logger.info("flows ended by a switch", extra={"count": len(losers)})

    def _destroy(self, flow: Flow) -> bool:
        try:
            return self._diag.destroy(flow.protocol, flow.key, flow.cookie)
        except KernelError as error:
            logger.warning(
                "a socket cannot be ended: its app hears of it with its next packet", extra={"error": str(error)}
            )
            return False

    async def watch_holders(self) -> None:
        """Look now and then whether the sockets of live flows have other holders, until cancelled.

        No event tells of a descriptor that was passed over a unix socket.
        """
        while True:
            await trio.sleep(HOLDERS_S)
            by_inode: dict[int, list[Flow]] = {}
            for flow in self._nat:
                for inode in flow.sockets:
                    by_inode.setdefault(inode, []).append(flow)
            held: dict[int, frozenset[tuple[int, int]]] = {}
            try:
                for found in self._processes.scan_all(set(by_inode)) if by_inode else ():
                    if found is None:
                        await trio.lowlevel.checkpoint()
                    else:
                        held[found[0]] = found[1]
                self._judge.prepare()
                self._compare({id(flow): flow for flows in by_inode.values() for flow in flows}.values(), held)
            except KernelError as error:
                logger.warning("holders of sockets cannot be found", extra={"error": str(error)})

    def _compare(self, flows: Iterable[Flow], held: dict[int, frozenset[tuple[int, int]]]) -> None:
        changed: list[tuple[Flow, Owner]] = []
        for flow in flows:
            keys = frozenset().union(*(held.get(inode, frozenset()) for inode in flow.sockets))
            if not keys or keys == _holders(flow.owner):
                continue  # who has none any more is sending its last packets
            processes = [process for pid, start in keys if (process := self._processes.read(pid)) is not None
                         and process.start_time == start]  # fmt: skip
            if processes and flow.owner is not None:
                changed.append((flow, Owner(tuple(processes), flow.owner.certainty)))
        for flow, owner in changed:  # all of them are known: a failure before leaves them for the next look
            flow.owner = owner
        self.rejudge(flow for flow, _ in changed if flow.passes)


def _holders(owner: Owner | None) -> set[tuple[int, int]]:
    return {(process.pid, process.start_time) for process in owner.holders} if owner else set()
