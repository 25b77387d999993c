"""nftables: our tables in nft's own words.

Some facts about nftables:

- A file is one transaction (net/netfilter/nf_tables_api.c): all of it or nothing, and packets see it at once.
- `flush table` empties chains; sets keep their elements and named counters their values.
- Whoever closes a socket of nfnetlink waits until what the last transaction took out is freed, an RCU grace period
  (nft_rcv_nl_event): 5 to 20 ms, several times what the transaction itself took. So a daemon keeps its own open.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping

from tunsplit.errors import KernelError
from tunsplit.host import IPAddress
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.libnftables import Context, brief
from tunsplit.kernel.namespace import call_in_new
from tunsplit.kernel.nftsocket import NftSocket
from tunsplit.names import NFT_TABLE

FAMILIES = ("inet", "arp")  # what one transaction changes
ALL_FAMILIES = (*FAMILIES, "netdev")
MAIN = f"inet {NFT_TABLE}"  # where the sets, the counters and the records are
TIMEOUT_S = 30.0

# What a set of live ports holds, in a listing.
PORTS = re.compile(r"(set nat_\w+ \{\n(?:\t\t(?!elements)[^\n]*\n)*)\t\telements = \{[^}]*\}\n")

Sets = Mapping[str, Mapping[str, tuple[IPAddress, ...]]]  # family → set → what it holds


def run(*arguments: str, text: str = "") -> str:
    """Run nft; return what it prints.

    Raises:
        KernelError: nft is not installed, or said no; with its own words.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["nft", *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
            check=False,
        )
    except FileNotFoundError as error:
        raise KernelError("nft: no such program; install the package nftables") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"nft: {error}") from error
    if done.returncode:
        raise KernelError(f"nft {' '.join(arguments)}: {brief(done.stderr)}")
    return done.stdout


def apply(
    bodies: Mapping[str, str],
    *,
    anew: bool,
    sets: Sets | None = None,
    elements: Mapping[str, Iterable[int]] | None = None,
    context: Context | None = None,
) -> None:
    """Put our tables in force with these bodies, in one transaction.

    Args:
        bodies: family → sets, counters and chains.
        anew: nothing of the old tables is kept. Otherwise sets keep their elements and counters their values.
        sets: what these sets hold from now on, and nothing else.
        elements: of the sets of the inet table, to be added.
        context: one that stays open; None: there is one for this alone.
    """
    text = ""
    for family, body in bodies.items():
        table = f"{family} {NFT_TABLE}"
        text += f"table {table}\n{'delete' if anew else 'flush'} table {table}\ntable {table} {{\n{body}}}\n"
    for family, held in (sets or {}).items():
        for name, addresses in held.items():
            text += f"flush set {family} {NFT_TABLE} {name}\n" + _added(f"{family} {NFT_TABLE} {name}", addresses)
    for name, keys in (elements or {}).items():
        text += _added(f"{MAIN} {name}", keys)
    if context is not None:
        context.run(text)
        return
    with Context() as own:
        own.run(text)


def _added(place: str, keys: Iterable[object]) -> str:
    listed = ", ".join(map(str, keys))
    return f"add element {place} {{ {listed} }}\n" if listed else ""


def delete() -> list[str]:
    """Remove our tables; return those that were there."""
    with NftSocket() as socket:
        standing = [f"{family} {NFT_TABLE}" for family in ALL_FAMILIES if socket.has_table(family)]
    if standing:
        run("-f", "-", text="".join(f"table {table}\ndelete table {table}\n" for table in standing))
    return standing


def listing(family: str = "inet") -> str | None:
    """Our table as it stands in the kernel, without live ports and counter values; None: there is none."""
    with NftSocket() as socket:
        if not socket.has_table(family):
            return None
    return PORTS.sub(r"\1", run("-s", "list", "table", family, NFT_TABLE))


def normal_form(bodies: Mapping[str, str], sets: Sets | None = None) -> dict[str, str]:
    """What `listing` would show of these bodies and sets; they are tried in a network namespace of their own.

    Raises:
        KernelError: nft says no, or there may be no such namespace.
    """

    def put_and_list() -> dict[str, str]:
        apply(bodies, anew=True, sets=sets)
        return {family: listing(family) or "" for family in bodies}

    return call_in_new(put_and_list)


def comments(listed: str) -> list[str]:
    """The comments in a listing."""
    return re.findall(r'comment "([^"]*)"', listed)


class Nftables(Closing):
    """Nftables for one who keeps his sockets open, in the network namespace that the calling thread was in."""

    def __init__(self) -> None:
        self.context = Context()
        self.socket = NftSocket()

    def close(self) -> None:
        """Close both sockets."""
        self.context.close()
        self.socket.close()
