"""The demo's table: what was tried, what was to be seen where, and whether it was. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from tunsplit.lab.addresses import Address

Side = Literal["uplink", "tunnel"]


@dataclass(frozen=True)
class Trial:
    """One conversation of one app with the internet's server."""

    app: str
    protocol: str
    destination: Address
    side: Side  # where it is to be seen
    address: Address  # that the server is to see


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        uplink: frames of the server's address that were seen on the uplink.
        tunnel: the same for the tunnel.
        sources: addresses from which the server was sent packets.
        answer: what the client printed: the address that the server saw, or nothing for an echo.
        error: what it printed when it failed.
    """

    trial: Trial
    uplink: int
    tunnel: int
    sources: Collection[Address]
    answer: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """It worked, its own side has seen it, the other nothing, and the server just the one address."""
        right, wrong = (self.uplink, self.tunnel) if self.trial.side == "uplink" else (self.tunnel, self.uplink)
        return (
            not self.error
            and right > 0
            and wrong == 0
            and list(self.sources) == [self.trial.address]
            and self.answer in ("", str(self.trial.address))
            and bool(self.answer or self.trial.protocol == "icmp")
        )


def tabulate(outcomes: Iterable[Outcome], *, brief: bool = False) -> Table:
    """The table as it is shown; brief, it fits into 80 columns."""
    table = Table(title="Who was seen where", title_justify="left")
    for heading in ("app", "protocol", "destination"):
        table.add_column(heading)
    for heading in ("on the uplink", "in the tunnel"):
        table.add_column(heading, justify="right")
    for heading in ("server saw", "expected", "ok"):
        table.add_column(heading)
    for outcome in outcomes:
        trial = outcome.trial
        table.add_row(
            trial.app,
            trial.protocol,
            str(trial.destination),
            count(outcome.uplink, brief=brief),
            count(outcome.tunnel, brief=brief),
            outcome.error or ", ".join(map(str, outcome.sources)) or "nothing",
            trial.side if brief else f"{trial.side}, {trial.address}",
            "[green]yes[/]" if outcome.ok else "[bold red]NO[/]",
        )
    return table


def get_exit_code(outcomes: Collection[Outcome]) -> int:
    """0 if there were trials and all went as expected, else 1."""
    return 0 if outcomes and all(outcome.ok for outcome in outcomes) else 1


def count(packets: int, *, brief: bool = False) -> str:
    """So many packets, in words; brief, the bare number."""
    if brief and packets:
        return str(packets)
    return "–" if packets == 0 else f"{packets} packet{'s' if packets > 1 else ''}"
