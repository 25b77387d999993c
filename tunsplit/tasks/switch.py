"""Switches: what is said at run time about apps and processes, and what becomes of live flows.

Theory of operation. Whatever may change a verdict (the list, a mark by hand, on and off, a reload; an exec, a user or a
new holder seen by events) ends in `rejudge`: each flow in question is judged again by what it was attributed to. One
whose verdict is no longer its side ends at once, in both directions:

    TCP    its socket is destroyed; the kernel's RST comes into the tun a moment later and is passed on, so that the
           peer hears of it on the old side; then the flow is refused, so that no late packet opens it anew.
    UDP    its socket is destroyed, so that the app does not wait; a datagram sent after that is judged anew.
    other  the next packet is judged anew.

All of it is done before a command returns. What waits in the tun by then meets the new verdicts.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import trio

from tunsplit.config import App as Entry
from tunsplit.config import Config, parse
from tunsplit.engine.attribution import Owner
from tunsplit.engine.flow import Flow, FlowEvent, FlowState
from tunsplit.engine.nat import Nat
from tunsplit.engine.policy import Judgement, Policy
from tunsplit.engine.reasons import Mark
from tunsplit.errors import ConfigError, KernelError, TunsplitError
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.process import Process
from tunsplit.tasks.admit import Admit
from tunsplit.tasks.explain import Explainer
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.localresolvers import LocalResolvers
from tunsplit.tasks.network import Network
from tunsplit.tasks.settings import policy_of, steering_of
from tunsplit.tasks.sources import SocketSource
from tunsplit.wire.ip import TCP, UDP

RST_S = 0.005  # how long the kernel may take to send the RST of a destroyed socket: 0.3 ms, seen
MOST_BATCHES = 32  # of packets that wait in the tun while a switch is carried out
HOLDERS_S = 4.0  # between two looks at who holds the sockets of live flows
# What takes a new start, by what it would change under running flows: sections, and keys of others.
FIXED = ("tun", "control")
FIXED_KEYS = {"split": ("protocols",), "dns": ("listen", "take_over")}

Json = dict[str, object]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of the list; `saved`: it is in the file."""

    entry: Entry
    saved: bool


class Switch:
    """Carries switches out."""

    def __init__(
        self,
        config: Config,
        config_file: str,
        *,
        judge: Judge,
        nat: Nat,
        admit: Admit,
        diag: SockDiag,
        source: SocketSource,
        processes: Processes,
        network: Network,
        carry: Callable[[], int],
        resolvers: LocalResolvers,
    ) -> None:
        """`carry` takes one batch of packets from the tun to their side, and gives back how many there were."""
        self._config = config
        self._config_file = config_file
        self._list = [Listed(entry, True) for entry in config.apps]
        self._enabled = config.split.enabled
        self._judge = judge
        self._nat = nat
        self._admit = admit
        self._diag = diag
        self._explainer = Explainer(judge, source, network, nat)
        self._processes = processes
        self._network = network
        self._carry = carry
        self._resolvers = resolvers
        self.on_config: Callable[[Config], None] = lambda _: None

    # The list

    def apps(self) -> list[Json]:
        """The list as it applies now."""
        self._judge.prepare()
        matches: dict[int, list[int]] = {}
        for one in self._judge.tree.listed():
            for reason in one.reasons:
                if reason.rule is not None:
                    matches.setdefault(reason.rule, []).append(one.pid)
        shown = []
        for number, listed in enumerate(self._list, start=1):
            entry = listed.entry.given()
            if not entry["force"]:
                del entry["force"]
            shown.append({**entry, "rule": number, "saved": listed.saved, "matches": matches.get(number, [])})
        return shown

    def add_app(self, path: str, *, force: bool = False) -> bool:
        """Put a path on the list; False: it was there.

        Raises:
            ConfigError: it covers a local resolver, and not by `force`.
        """
        entries = [listed.entry for listed in self._list]
        if Entry(path=path, force=True) in entries or (not force and Entry(path=path) in entries):
            return False
        self._set_list([*self._list, Listed(Entry(path=path, force=force), False)])
        return True

    def hints(self) -> list[str]:
        """What is to be known of the local resolvers that run."""
        judge = self._judge
        try:
            return self._resolvers.hints(judge.policy.mode, lambda process: judge.judge(Owner((process,))).verdict)
        except KernelError as error:
            return [f"whether a local resolver is in use cannot be known: {error}"]

    def remove_app(self, path: str) -> bool:
        """Take what has this path off the list; False: nothing had."""
        left = [listed for listed in self._list if listed.entry.path != path]
        if len(left) == len(self._list):
            return False
        self._set_list(left)
        return True

    def clear_apps(self) -> int:
        """Empty the list; how many there were."""
        count = len(self._list)
        self._set_list([])
        return count

    def _set_list(self, entries: list[Listed]) -> None:
        before, self._list = self._list, entries
        try:
            self._apply(refuse_resolvers=len(entries) > len(before))
        except TunsplitError:
            self._list = before
            raise

    # Processes by hand

    def pids(self) -> list[Json]:
        """Every listed process, with its reasons."""
        self._judge.prepare()
        shown: list[Json] = []
        for one in self._judge.tree.listed():
            line = self._judge.tree.lineage(one.pid, one.start_time) if one.start_time is not None else []
            user = line[0].uid if line else None
            reasons = [reason.words for reason in one.reasons]
            shown.append({"pid": one.pid, "exe": one.path, "user": user, "reasons": reasons})
        return shown

    def add_pid(self, pid: int, start_time: int, *, included: bool = False) -> None:
        """Exclude (or include) a process by hand, with its descendants."""
        self._judge.prepare()
        if self._judge.tree.birth(pid, start_time) is None:
            raise TunsplitError(f"there is no process {pid} any more")
        self._judge.tree.mark(pid, start_time, Mark.INCLUDED if included else Mark.EXCLUDED)
        self._changed()

    def remove_pid(self, pid: int) -> bool:
        """Forget what was said about a process by hand; False: nothing was."""
        self._judge.prepare()
        process = self._processes.read(pid)
        if process is None or not self._judge.tree.mark(pid, process.start_time, None):
            return False
        self._changed()
        return True

    def clear_pids(self) -> int:
        """Forget all that was said by hand; how many processes it had been said about."""
        self._judge.prepare()
        count = sum(reason.mark is not None and reason.ancestor is None
                    for one in self._judge.tree.listed() for reason in one.reasons)  # fmt: skip
        self._judge.tree.clear_marks()
        self._changed()
        return count

    # Splitting as a whole

    def set_enabled(self, enabled: bool) -> None:
        """Switch splitting on or off."""
        self._enabled = enabled
        self._apply()

    def reload(self) -> list[str]:
        """Read the configuration again; what changed, in words. What was said at run time still holds.

        Raises:
            ConfigError: the file is wrong; the configuration in force stays.
        """
        try:
            text = Path(self._config_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self._config_file}: found no readable file ({error}), expected a configuration"
            ) from None
        new = parse(text, self._config_file)
        changes = _differences(self._config, new)
        self._refuse_resolvers(policy_of(new))  # what it raises leaves everything as it was
        steering = steering_of(new)
        if new.split.enabled != self._config.split.enabled:
            self._enabled = new.split.enabled
        runtime = [listed for listed in self._list if not listed.saved and listed.entry not in new.apps]
        self._list = [*(Listed(entry, True) for entry in new.apps), *runtime]
        kept = {section: getattr(self._config, section) for section in FIXED}
        for section, keys in FIXED_KEYS.items():
            old = getattr(self._config, section)
            kept[section] = getattr(new, section).replaced(**{key: getattr(old, key) for key in keys})
        self._config = new.replaced(**kept)
        self._admit.hold_for(new.split.hold)
        logging.getLogger().setLevel(new.log.level.upper())
        self._apply()
        self._network.steer(steering)
        self.on_config(self._config)
        return changes

    @property
    def config(self) -> Config:
        """The configuration in force, without what was said at run time."""
        return self._config

    # Live flows

    def rejudge(self, flows: Iterable[Flow]) -> None:
        """Judge flows again; those that have lost their side end, at once."""
        losers: list[tuple[Flow, Judgement]] = []
        for flow in flows:
            judgement = self._judge.judge(flow.owner)
            if judgement.verdict.value != flow.verdict and self._has_lost_holders(flow):
                judgement = self._judge.judge(flow.owner)
            if judgement.verdict.value != flow.verdict:
                losers.append((flow, judgement))
            else:
                flow.reason = judgement.reason
        if losers:
            self._end(losers)

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
        self._admit.forget_refusals()

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

    def _refuse_resolvers(self, policy: Policy) -> None:
        self._resolvers.refuse_covering(policy, self._judge.tree.lineage)

    def _apply(self, *, refuse_resolvers: bool = False) -> None:
        """Bring the list and the mode in force."""
        split = self._config.split.replaced(enabled=self._enabled)
        apps = tuple(listed.entry for listed in self._list)
        policy = policy_of(self._config.replaced(apps=apps, split=split))
        self._judge.prepare()
        if refuse_resolvers:
            self._refuse_resolvers(policy)
        self._judge.set_policy(policy)
        self._changed()

    def _changed(self) -> None:
        self._judge.tree.changed()  # told by this, whatever it is
        self._admit.forget_refusals()
        self.rejudge(self._nat)
        self._judge.save_now()

    def _end(self, losers: list[tuple[Flow, Judgement]]) -> None:
        resets = []
        began = trio.current_time()
        for flow, judgement in losers:
            if flow.protocol == UDP:  # until this is done, what it has sent already opens nothing
                self._admit.remember_refused(flow, judgement, began)
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
                self._admit.refused.pop((flow.protocol, flow.key), None)
            if flow.protocol == TCP:
                self._admit.remember_refused(flow, judgement._replace(reason=f"switched: {judgement.reason}"), now)
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
        changed = []
        for flow in flows:
            keys = frozenset().union(*(held.get(inode, frozenset()) for inode in flow.sockets))
            if not keys or keys == _holders(flow.owner):
                continue  # who has none any more is sending its last packets
            processes = [process for pid, start in keys if (process := self._processes.read(pid)) is not None
                         and process.start_time == start]  # fmt: skip
            if processes and flow.owner is not None:
                flow.owner = Owner(tuple(processes), flow.owner.certainty)
                changed.append(flow)
        self.rejudge(flow for flow in changed if flow.state in (FlowState.OPEN, FlowState.CLOSING))

    def explain(
        self, *, pid: int | None, exe: str | None, protocol: str | None, source: str | None, destination: str | None
    ) -> Json:
        """The whole chain of judgement, without sending a packet."""
        return self._explainer.explain(pid=pid, exe=exe, protocol=protocol, source=source, destination=destination)


def _holders(owner: Owner | None) -> set[tuple[int, int]]:
    return {(process.pid, process.start_time) for process in owner.holders} if owner else set()


def _differences(old: Config, new: Config) -> list[str]:
    """What a reload changes, in words."""
    changes = []
    for section in new.__struct_fields__:
        if section == "apps":
            before, after = set(old.apps), set(new.apps)
            changes += [f"[[app]] added: {entry.path or entry}" for entry in new.apps if entry not in before]
            changes += [f"[[app]] removed: {entry.path or entry}" for entry in old.apps if entry not in after]
            continue
        was, now = getattr(old, section), getattr(new, section)
        for key in now.__struct_fields__:
            if getattr(was, key) != getattr(now, key):
                late = section in FIXED or key in FIXED_KEYS.get(section, ())
                changes.append(f"[{section}] {key}" + (" takes effect at the next start" if late else ""))
    return changes
