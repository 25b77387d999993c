"""nft's words for devices, addresses and chains."""

import re
from collections.abc import Iterable, Iterator

from tunsplit.errors import KernelError
from tunsplit.host import IPAddress, IPNetwork

WRITABLE = re.compile(r"[A-Za-z0-9_.@:+=#,-]+")


def chain_words(name: str, hook: str, rules: Iterable[str], *, policy: str = "accept") -> str:
    """A chain, with its hook and priority; without one it is there to be jumped to."""
    lines = [f"{hook}; policy {policy};"] if hook else []
    return f"chain {name} {{\n" + "".join(f"\t{line}\n" for line in [*lines, *rules]) + "}\n"


def chain_commands(chain: str, hook: str, rules: Iterable[str], *, policy: str) -> str:
    """The same of a table that stands already; `chain` is family, table and name.

    Rules between a chain's braces, outside those of its table, are passed over by nft 1.0.6 and older.
    """
    lines = [f"add chain {chain} {{ {hook}; policy {policy}; }}", *(f"add rule {chain} {rule}" for rule in rules)]
    return "".join(f"{line}\n" for line in lines)


def can_hold(device: str) -> bool:
    """Whether nft's language can hold the device's name; the kernel's is any bytes but blanks and slashes."""
    return WRITABLE.fullmatch(device) is not None


def device_set(devices: Iterable[str]) -> str:
    """A set of devices, each once; empty for none.

    Raises:
        KernelError: a device has a name that nft's language cannot hold.
    """
    devices = tuple(dict.fromkeys(devices))
    for device in devices:
        if not can_hold(device):
            raise KernelError(f"device {device!r}: nft cannot hold this name; rename the device")
    return "{ " + ", ".join(f'"{device}"' for device in devices) + " }" if devices else ""


def address_matches(field: str, addresses: Iterable[IPAddress | IPNetwork]) -> Iterator[str]:
    """One match a family."""
    found = tuple(dict.fromkeys(addresses))
    for version, family in ((4, "ip"), (6, "ip6")):
        if own := [address for address in found if address.version == version]:
            yield f"{family} {field} {{ {listed(own)} }}"


def family_word(address: IPAddress) -> str:
    """How a match of this address begins."""
    return "ip" if address.version == 4 else "ip6"


def listed(items: Iterable[object]) -> str:
    """What stands between the braces of a set."""
    return ", ".join(str(item) for item in items)
