"""What on the host is no longer as our last plan had it, though the plan has not changed: somebody else's doing."""

from collections.abc import Collection, Iterable

from tunsplit.host import HostPlan, Route, Rule
from tunsplit.kernel.rtnetlink import describe


class Drift:
    """Gathers, while a plan is put in force, what the plan before it had already put there.

    `before` is that plan; None where there is none, and nothing is somebody else's doing. `found`: (kind, words).
    """

    def __init__(self, before: HostPlan | None) -> None:
        self._before = before
        self.found: list[tuple[str, str]] = []

    def note_tables(self) -> None:
        """Take note that our nft tables were not as they had been put there."""
        if self._before is not None:
            self.found.append(("tables", "nft tables"))

    def note_sysctls(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Take the values that have to be written."""
        if self._before is not None:
            settled = {one.path for one in self._before.sysctls}
            self.found += [("sysctls", f"sysctl {path}") for path, _ in wanted if path in settled]

    def note_routes(self, missing: Iterable[Route], surplus: Iterable[Route]) -> None:
        """Take the routes that have to be put in and taken out."""
        if self._before is not None:
            self._note("routes", missing, surplus, self._before.routes)

    def note_rules(self, missing: Iterable[Rule], surplus: Iterable[Rule]) -> None:
        """Take the rules that have to be put in and taken out."""
        if self._before is not None:
            self._note("rules", missing, surplus, self._before.rules)

    def _note(
        self,
        kind: str,
        missing: Iterable[Route | Rule],
        surplus: Iterable[Route | Rule],
        before: Collection[Route | Rule],
    ) -> None:
        self.found += [(kind, describe(one)) for one in missing if one in before]
        self.found += [(kind, f"foreign {describe(one)}") for one in surplus if one not in before]
