"""A rule: one `[[app]]` entry, or one of `[tunnel] client`."""

from collections.abc import Iterable
from dataclasses import dataclass

from tunsplit.engine.matchers import KEYS, Matcher
from tunsplit.process import Process


@dataclass(frozen=True, slots=True)
class Rule:
    """One `[[app]]` entry. `number` counts from 1 in the file's order; `label` is what its reason shows.

    With `client` it is an entry of `[tunnel] client` instead: it lists nobody, and says who is the VPN's client.
    """

    number: int
    label: str
    matchers: tuple[Matcher, ...]
    inherit: bool = True
    force: bool = False  # a local resolver that it covers is excluded like any other app
    client: bool = False

    def claims(self, process: Process) -> bool:
        """Whether all matchers agree on this process. An entry without any claims nobody."""
        return bool(self.matchers) and all(matcher.matches(process) for matcher in self.matchers)


def keys_of(rules: Iterable[Rule]) -> frozenset[str]:
    """What the rules ask of a process, by the names of the keys: nothing else need be read."""
    kinds = {type(matcher) for rule in rules for matcher in rule.matchers}
    return frozenset(key for kind, key in KEYS.items() if kind in kinds)
