"""Where questions go: every platform's table, as data, and what it comes to with the resolvers at hand.

The data is `TABLE`; DESIGN.md shows it as `as_markdown` writes it. A list of custom resolvers that mixes private and
public addresses is partitioned: each resolver follows its own row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from ipaddress import IPv6Address, ip_network

from tunsplit.host import IPAddress


class Route(Enum):
    """How a question leaves, kept from every other way."""

    TUNNEL = "tunnel"
    OUTSIDE = "outside"
    LAN = "lan"  # outside, and to a private address only
    REFUSED = "refused"


class Setting(Enum):
    """Which resolvers are configured."""

    DEFAULT = "default"  # none: the relay's
    PRIVATE = "private custom"
    PUBLIC = "public custom"


class Resolver(Enum):
    """Whom a question is sent to, in the table's words."""

    RELAY = "relay"
    CUSTOM = "it"
    SYSTEM = "system DNS"


@dataclass(frozen=True, slots=True)
class Cell:
    """What becomes of one class of apps; `resolver` is None where the platform supports no such setting."""

    route: Route
    resolver: Resolver | None = None
    footnote: int = 0

    @property
    def words(self) -> str:
        """The cell as the documentation shows it."""
        if self.resolver is None:
            return "refused: not supported"
        return f"{ROUTE_WORDS[self.route]}, to {self.resolver.value}{MARKS[self.footnote]}"


MARKS = ("", " ¹", " ²")
ROUTE_WORDS = {Route.TUNNEL: "in tunnel", Route.OUTSIDE: "outside", Route.LAN: "LAN"}
FOOTNOTES = (
    "Unless a local resolver is in use: it asks in its own name, and is an included app, so its questions go in the "
    "tunnel.",
    "Only with `lan.allow`; otherwise DNS does not work (SERVFAIL).",
)

RELAY = Cell(Route.TUNNEL, Resolver.RELAY)
LAN = Cell(Route.LAN, Resolver.CUSTOM)
TUNNEL = Cell(Route.TUNNEL, Resolver.CUSTOM)
BESIDE = Cell(Route.OUTSIDE, Resolver.CUSTOM, footnote=1)
SHARED = Cell(Route.LAN, Resolver.CUSTOM, footnote=2)
SYSTEM = Cell(Route.OUTSIDE, Resolver.SYSTEM)
UNSUPPORTED = Cell(Route.REFUSED)

DEFAULT, PRIVATE, PUBLIC = Setting.DEFAULT, Setting.PRIVATE, Setting.PUBLIC

# platform → setting → what a normal app gets, what an excluded app gets
TABLE: dict[str, dict[Setting, tuple[Cell, Cell]]] = {
    "windows": {DEFAULT: (RELAY, RELAY), PRIVATE: (LAN, LAN), PUBLIC: (TUNNEL, TUNNEL)},
    "linux": {DEFAULT: (RELAY, RELAY), PRIVATE: (LAN, LAN), PUBLIC: (TUNNEL, BESIDE)},
    "android": {DEFAULT: (RELAY, SYSTEM), PRIVATE: (SHARED, SYSTEM), PUBLIC: (TUNNEL, SYSTEM)},
    "linux-2021": {DEFAULT: (RELAY, RELAY), PRIVATE: (LAN, LAN), PUBLIC: (TUNNEL, TUNNEL)},
    "macos": {DEFAULT: (RELAY, RELAY), PRIVATE: (UNSUPPORTED, UNSUPPORTED), PUBLIC: (TUNNEL, TUNNEL)},
    "per-app": {DEFAULT: (RELAY, SYSTEM), PRIVATE: (LAN, SYSTEM), PUBLIC: (TUNNEL, SYSTEM)},
}

PRIVATE_RANGES = tuple(
    ip_network(text)
    for text in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "127.0.0.0/8",
        "fe80::/10", "fc00::/7", "::1",
    )
)  # fmt: skip


def is_private(address: IPAddress) -> bool:
    """Whether a resolver's address counts as private; 100.64.0.0/10 (RFC 6598) is public."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in prefix for prefix in PRIVATE_RANGES if prefix.version == address.version)


@dataclass(frozen=True, slots=True)
class Server:
    """A resolver, how it is reached, and the row of the table that says so."""

    address: IPAddress
    route: Route
    row: str

    def __hash__(self) -> int:
        # Asked for with each question; addresses and routes are dear to hash.
        return hash(self.row)


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of a question: the resolvers to try, in order.

    No resolver and another route than REFUSED: none can be had just now, which is SERVFAIL. `row` says why, in words
    that users' scripts may rely on, such as "linux · public custom · excluded app".
    """

    route: Route
    servers: tuple[Server, ...]
    row: str


@dataclass(frozen=True)
class DnsTable:
    """One platform's table with the resolvers at hand; each list is in order of preference.

    `relay` is the tunnel's own resolver, `system` what the host had before us. With `listed_only`, only questions to
    a resolver of these lists follow the table (`intercept = "listed"`).
    """

    platform: str
    custom: tuple[IPAddress, ...] = ()
    relay: tuple[IPAddress, ...] = ()
    system: tuple[IPAddress, ...] = ()
    lan_allow: bool = False
    fallback: bool = False
    listed_only: bool = False

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What is configured; both kinds of custom for a mixed list."""
        return tuple(dict.fromkeys(_setting(address) for address in self.custom)) or (DEFAULT,)

    def is_listed(self, address: IPAddress) -> bool:
        """Whether it is one of the resolvers at hand."""
        return address in self.custom or address in self.relay or address in self.system

    def choose(
        self, *, excluded: bool, tunnel_up: bool, asked: IPAddress | None = None, client: bool = False
    ) -> Choice:
        """Where a question of an excluded, or a normal, app goes.

        The VPN's client asks system DNS outside the tunnel, whatever the platform, and also while the tunnel's device
        is up: one that stays while its client looks for the server again carries nothing.

        Args:
            excluded: the app's verdict is the uplink.
            tunnel_up: the tunnel can be used; matters to `fallback` alone.
            asked: the resolver that the app asked; None: our own stub. It goes first if it is one to try.
            client: the app is the VPN's client.
        """
        if client:
            row = f"{self.platform} · system DNS · tunnel client"
            return Choice(
                Route.OUTSIDE, _first(asked, [Server(address, Route.OUTSIDE, row) for address in self.system]), row
            )
        if self.listed_only and asked is not None and not self.is_listed(asked):
            return self._unlisted(asked, excluded=excluded)
        found: list[Server] = []
        refused = ""
        for setting, addresses in self._partitions():
            cell = TABLE[self.platform][setting][excluded]
            row = f"{self.platform} · {setting.value} · {_class(excluded)}"
            if cell.route is Route.REFUSED:
                refused = row
            found += self._servers(cell, addresses, row, fall_back=self.fallback and excluded and not tunnel_up)
        if servers := _first(asked, found):
            return Choice(servers[0].route, servers, servers[0].row)
        if refused:
            return Choice(Route.REFUSED, (), refused)
        setting = self.settings[0]
        row = f"{self.platform} · {setting.value} · {_class(excluded)}"
        return Choice(TABLE[self.platform][setting][excluded].route, (), row)

    def _partitions(self) -> Iterator[tuple[Setting, tuple[IPAddress, ...]]]:
        """Each resolver with its row: the list's order is kept."""
        if not self.custom:
            yield DEFAULT, ()
        for address in self.custom:
            yield _setting(address), (address,)

    def _servers(self, cell: Cell, custom: Iterable[IPAddress], row: str, *, fall_back: bool) -> Iterator[Server]:
        route, addresses = cell.route, custom
        if fall_back and route is Route.TUNNEL:
            route, addresses, row = Route.OUTSIDE, self.system, f"{row} · fallback"
        elif cell.resolver is Resolver.RELAY:
            addresses = self.relay
        elif cell.resolver is Resolver.SYSTEM:
            addresses, row = self.system, f"{self.platform} · system DNS · {_class(True)}"
        elif cell.resolver is None or (cell is SHARED and not self.lan_allow):
            return
        yield from (Server(address, route, row) for address in addresses)

    def _unlisted(self, asked: IPAddress, *, excluded: bool) -> Choice:
        row = f"{self.platform} · not listed · {_class(excluded)}"
        if not excluded:
            return Choice(Route.REFUSED, (), row)
        return Choice(Route.OUTSIDE, (Server(asked, Route.OUTSIDE, row),), row)


def _first(asked: IPAddress | None, servers: Iterable[Server]) -> tuple[Server, ...]:
    """Each server once, the one that was asked before the others."""
    return tuple(sorted(dict.fromkeys(servers), key=lambda server: server.address != asked))


@lru_cache(maxsize=256)
def _setting(address: IPAddress) -> Setting:
    return PRIVATE if is_private(address) else PUBLIC


def _class(excluded: bool) -> str:
    return "excluded app" if excluded else "normal app"


def as_markdown() -> str:
    """The table and its footnotes, as DESIGN.md has them."""
    lines = ["| platform | setting | normal app | excluded app |", "|-|-|-|-|"]
    for platform, rows in TABLE.items():
        for setting, (normal, excluded) in rows.items():
            lines.append(f"| `{platform}` | {setting.value} | {normal.words} | {excluded.words} |")
    notes = [f"{mark.strip()} {note}  " for mark, note in zip(MARKS[1:], FOOTNOTES, strict=True)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"
