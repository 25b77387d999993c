"""The demo's table of DNS: what a platform's table says, and what was seen. Pure.

The table is written down here once more, in the lab's words: it judges the program's own.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from rich.table import Table

from tunsplit.lab.addresses import PUBLIC_RESOLVER, RESOLVERS
from tunsplit.lab.dnsclient import encode_name
from tunsplit.lab.frames import Seen
from tunsplit.lab.trials import Side, count

Cell = tuple[str, Side] | None  # who answers, and on which side; None: the platform supports no such setting

RELAY: Cell = ("relay", "tunnel")
LAN: Cell = ("lan", "uplink")
SYSTEM: Cell = ("system", "uplink")
INSIDE: Cell = ("public", "tunnel")
OUTSIDE: Cell = ("public", "uplink")

# platform → setting → (normal app, excluded app)
TABLE: Mapping[str, Mapping[str, tuple[Cell, Cell]]] = {
    "windows": {"default": (RELAY, RELAY), "private": (LAN, LAN), "public": (INSIDE, INSIDE)},
    "linux": {"default": (RELAY, RELAY), "private": (LAN, LAN), "public": (INSIDE, OUTSIDE)},
    "android": {"default": (RELAY, SYSTEM), "private": (LAN, SYSTEM), "public": (INSIDE, SYSTEM)},
    "linux-2021": {"default": (RELAY, RELAY), "private": (LAN, LAN), "public": (INSIDE, INSIDE)},
    "macos": {"default": (RELAY, RELAY), "private": (None, None), "public": (INSIDE, INSIDE)},
    "per-app": {"default": (RELAY, SYSTEM), "private": (LAN, SYSTEM), "public": (INSIDE, SYSTEM)},
}
CUSTOM: Mapping[str, Collection[str]] = {"default": (), "private": ("lan",), "public": ("public",)}
REFUSED = "REFUSED"  # what is answered where there is no such setting
ROLE = {str(address): role for role, own in RESOLVERS.items() for address in own.values()}


@dataclass(frozen=True)
class DnsTrial:
    """One cell of a platform's table."""

    setting: str
    app: str
    cell: Cell


@dataclass(frozen=True)
class DnsOutcome:
    """What became of the questions of a cell.

    Attributes:
        answers: what each came to: who answered, or the code, or an error.
        uplink: frames with its questions that left by the uplink.
        tunnel: the same for the tunnel.
    """

    trial: DnsTrial
    answers: Collection[str]
    uplink: int
    tunnel: int

    @property
    def ok(self) -> bool:
        """The right resolver answered all of them, and they were seen on its side only."""
        if self.trial.cell is None:
            return set(self.answers) == {REFUSED} and self.uplink == self.tunnel == 0
        role, side = self.trial.cell
        right, wrong = (self.uplink, self.tunnel) if side == "uplink" else (self.tunnel, self.uplink)
        return set(self.answers) == {role} and right >= len(self.answers) and wrong == 0


def configure(platform: str, setting: str, version: int = 4) -> dict[str, dict[str, object]]:
    """Sections of a configuration for this row of the table; all its resolvers have addresses of one family."""
    return {
        "dns": {
            "platform": platform,
            "custom": [str(RESOLVERS[role][version]) for role in CUSTOM[setting]],
            "system": [str(RESOLVERS["system"][version])],
        },
        "tunnel": {"dns": [str(RESOLVERS["relay"][version])]},
        "lan": {"allow": True},  # of `android`, footnote 2; the others' tables do not ask for it
    }


def asks_for(seen: Seen, name: str) -> bool:
    """Whether a frame, or the packet that an error in it quotes, has this name, in any case of letters."""
    wire = encode_name(name).lower()
    return any(wire in part.payload.lower() for part in (seen, seen.quoted) if part is not None)


def tabulate(platform: str, outcomes: Iterable[DnsOutcome]) -> Table:
    """The table as it is shown."""
    title = f"Both ask {PUBLIC_RESOLVER[4]}; who answers is what platform {platform} says"
    table = Table(title=title, title_justify="left")
    for heading in ("custom resolver", "app", "expected", "answered by"):
        table.add_column(heading)
    for heading in ("on the uplink", "in the tunnel"):
        table.add_column(heading, justify="right")
    table.add_column("ok")
    for outcome in outcomes:
        trial = outcome.trial
        table.add_row(
            {"default": "none", "private": "a private one", "public": "a public one"}[trial.setting],
            trial.app,
            "refused: not supported" if trial.cell is None else f"{trial.cell[0]}, {trial.cell[1]}",
            ", ".join(dict.fromkeys(outcome.answers)),
            count(outcome.uplink),
            count(outcome.tunnel),
            "[green]yes[/]" if outcome.ok else "[bold red]NO[/]",
        )
    return table
