"""Switches: what is said at run time about apps and processes.

Theory of operation. Whatever may change a verdict (the list, a mark by hand, on and off, a reload) ends in all live
flows being judged again (tasks/liveflows.py), before a command returns. What waits in the tun by then meets the new
verdicts.

So does what is said on disk: a path of the list names the file that it leads to, through symlinks, at any time.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tunsplit.config import App as Entry
from tunsplit.config import Config, parse
from tunsplit.engine.attribution import Owner
from tunsplit.engine.policy import Policy
from tunsplit.engine.reasons import Mark, count_descendants
from tunsplit.errors import ConfigError, KernelError, TunsplitError
from tunsplit.kernel.procfs import Processes
from tunsplit.tasks.admit import Admit
from tunsplit.tasks.explain import Explainer
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.liveflows import LiveFlows
from tunsplit.tasks.localresolvers import LocalResolvers
from tunsplit.tasks.network import Network
from tunsplit.tasks.settings import followed, policy_of, steering_of

if TYPE_CHECKING:
    from collections.abc import Callable

PATHS_S = 1.0  # between two looks at where the list's paths lead

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
        live: LiveFlows,
        admit: Admit,
        explainer: Explainer,
        processes: Processes,
        network: Network,
        resolvers: LocalResolvers,
    ) -> None:
        self._config = config
        self._config_file = config_file
        self._list = [Listed(entry, True) for entry in config.apps]
        self._enabled = config.split.enabled
        self._judge = judge
        self._live = live
        self._admit = admit
        self._explainer = explainer
        self._processes = processes
        self._network = network
        self._resolvers = resolvers
        self.on_config: Callable[[Config], None] = lambda _: None
        self.on_change: Callable[[], None] = lambda: None

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

    def descendants(self, pid: int) -> tuple[int, int]:
        """How many living processes descend from this one, and how many there are."""
        self._judge.prepare()
        return count_descendants(pid, self._judge.tree.nodes())

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
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self._config_file}: found bytes that are no UTF-8 at offset {error.start}, expected TOML"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{self._config_file}: found no readable file ({error.strerror}), expected a configuration"
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
        try:
            self._network.steer(steering)
        finally:  # what fails closes both sides; when they come back, it is with this configuration
            self.on_config(self._config)
        return changes

    @property
    def config(self) -> Config:
        """The configuration in force, without what was said at run time."""
        return self._config

    async def follow_paths(self) -> None:
        """Judge by the paths of the list as they lead, until cancelled. A file system may take its time to tell."""
        while True:
            await trio.sleep(PATHS_S)
            policy = self._judge.policy
            by_now = await trio.to_thread.run_sync(followed, policy, abandon_on_cancel=True)
            if by_now is policy or self._judge.policy is not policy:
                continue
            try:
                self._judge.prepare()
            except KernelError:  # the judge tells of it
                continue
            logger.info("paths on the list lead elsewhere than before")
            self._judge.set_policy(by_now)
            self._changed()

    # How it is done

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
        self._live.rejudge_all()
        self.on_change()
        self._judge.save_now()

    def explain(
        self, *, pid: int | None, exe: str | None, protocol: str | None, source: str | None, destination: str | None
    ) -> Json:
        """The whole chain of judgement, without sending a packet."""
        return self._explainer.explain(pid=pid, exe=exe, protocol=protocol, source=source, destination=destination)


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
                changes.append(f"[{section}] {key} " + ("takes effect at the next start" if late else "changed"))
    return changes
