"""Files that name resolvers by link: DHCP leases, and the records of resolvconf.

Some facts about them:

| file | who writes it | what it says |
|-|-|-|
| /run/resolvconf/interface/LINK.* | resolvconf(8); `interfaces/` is openresolv's | resolv.conf's words |
| /run/dhcpcd/hook-state/resolv.conf/LINK.* | dhcpcd-run-hooks(8), without resolvconf | the same |
| /var/lib/dhcp/dhclient*.leases, … | dhclient.leases(5) | blocks; the last one of a link counts |
| /run/systemd/netif/leases/INDEX | systemd-networkd | KEY=value, private: the last resort, without resolved |

A VPN's client that replaces resolv.conf itself leaves these as they were. /run is shared by all network namespaces and
these tell of links by name only, so they are of use where the namespace is that of pid 1.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from tunsplit.host import IPAddress, NamedServers
from tunsplit.kernel.resolvconf import MOST_BYTES, MOST_SERVERS, address_untrusted, parse_untrusted

ROOT = Path("/")
RECORDS = ("run/resolvconf/interface", "run/resolvconf/interfaces", "run/dhcpcd/hook-state/resolv.conf")
DHCLIENT = ("var/lib/dhcp", "var/lib/dhclient", "var/lib/NetworkManager")
NETWORKD = "run/systemd/netif/leases"
FOLDERS = (*RECORDS, *DHCLIENT, NETWORKD)

MOST_FILES = 64
LEASES_SIZE = 1 << 20  # of dhclient's, which grow until they are rewritten

T = TypeVar("T")

BEGIN = re.compile(r"lease6?\s*\{")
STATEMENT = re.compile(r"\s*(interface|option\s+(?:domain-name-servers|dhcp6\.name-servers))\s+([^;]{1,4096});")


def read_records(root: Path = ROOT) -> list[NamedServers]:
    """What resolvconf and dhcpcd have noted for each link."""
    found = []
    for folder in RECORDS:
        for file in _files(root / folder):
            # A link's name may hold dots itself (a VLAN's): the last part is the program's, or there is none.
            names = dict.fromkeys((file.name, file.name.rpartition(".")[0], file.name.partition(".")[0]))
            if addresses := parse_untrusted(_read(file)).servers:
                found += [NamedServers("resolvconf", addresses, name) for name in names if name]
    return found


def read_leases(root: Path = ROOT) -> list[NamedServers]:
    """The resolvers of the DHCP leases of each link."""
    found = []
    for folder in DHCLIENT:
        for file in _files(root / folder):
            if file.name.startswith("dhclient") and file.name.endswith((".lease", ".leases")):
                found += dhclient_untrusted(_read(file, LEASES_SIZE))
    for file in _files(root / NETWORKD):
        addresses = networkd_untrusted(_read(file))
        if addresses and file.name.isascii() and file.name.isdecimal():
            found.append(NamedServers("DHCP lease", addresses, int(file.name[:10])))
    return found


def dhclient_untrusted(text: bytes) -> list[NamedServers]:
    """Read dhclient.leases(5): of each link the last lease that names resolvers."""
    last: dict[str, tuple[IPAddress, ...]] = {}
    link: str = ""
    addresses: tuple[IPAddress, ...] = ()
    for line in text[-LEASES_SIZE:].decode("ascii", "replace").split("\n"):
        if BEGIN.match(line):
            link, addresses = "", ()
        elif line.startswith("}"):
            last[link] = addresses
        elif statement := STATEMENT.match(line):
            if statement[1] == "interface":
                link = statement[2].strip('"')
            else:
                addresses = _addresses(re.split(r"[,\s]+", statement[2]))
    return [NamedServers("DHCP lease", addresses, link) for link, addresses in last.items() if link and addresses]


def networkd_untrusted(text: bytes) -> tuple[IPAddress, ...]:
    """The resolvers of one of systemd-networkd's leases: DNS=ADDRESS ADDRESS and so on."""
    for line in text.decode("ascii", "replace").split("\n"):
        if line.startswith("DNS="):
            return _addresses(line[4:].split())
    return ()


def _addresses(texts: Iterable[str]) -> tuple[IPAddress, ...]:
    found = dict.fromkeys(address for text in texts if (address := address_untrusted(text)) is not None)
    return tuple(found)[:MOST_SERVERS]


def _files(folder: Path) -> list[Path]:
    nothing: list[Path] = []
    return sorted(_or_nothing(lambda: [file for file in folder.iterdir() if file.is_file()], nothing))[:MOST_FILES]


def _read(file: Path, most: int = MOST_BYTES) -> bytes:
    def end() -> bytes:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - most))
            return stream.read(most)

    return _or_nothing(end, b"")


def _or_nothing(read: Callable[[], T], nothing: T) -> T:
    """What cannot be read, or is gone meanwhile, names nobody."""
    try:
        return read()
    except OSError:
        return nothing
