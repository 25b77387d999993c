"""Resolvers that tell which of them was asked, and write down by whom.

There is the relay's, the LAN's, a public one, and the system's: the one that the host had before there was a VPN.
Each is a dnsmasq that knows `who.is` and every name below it: their addresses are the resolver's own, and the TXT
record of `who.is` is its role. So a name of its own for every question tells, on the wires and in the answers, what
became of that one.
"""

import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import NamedTuple

from tunsplit.lab.addresses import RELAY, RELAY_NAME, Address
from tunsplit.lab.netns import Namespace
from tunsplit.lab.programs import Program

NAME = "who.is"
QUERY = re.compile(r" query\[([^]]+)\] (\S+) from (\S+)$", re.MULTILINE)


class Question(NamedTuple):
    """What a resolver was asked: the name, its type (`A`), and the address from which the question came."""

    name: str
    kind: str
    source: Address


class Resolver:
    """A resolver that runs.

    Attributes:
        role: relay, lan, public or system.
        addresses: its own, by IP version.
    """

    def __init__(self, role: str, own: Iterable[Address], program: Program) -> None:
        self.role = role
        self.addresses = {address.version: address for address in own}
        self._program = program

    def questions(self) -> list[Question]:
        """What it was asked so far, in order; as far as its log goes back, a mebibyte."""
        return [Question(name, kind, ip_address(source)) for kind, name, source in QUERY.findall(self._program.log)]

    async def stop(self) -> None:
        """End it: from now on its port is closed."""
        await self._program.stop()


@asynccontextmanager
async def start(
    namespace: Namespace, role: str, own: Iterable[Address], *, log: bool = True
) -> AsyncGenerator[Resolver]:
    """Run a resolver on these addresses; it answers once the block is entered.

    Args:
        namespace: where.
        role: what its TXT record says.
        own: its addresses, at most one a family.
        log: write down what it is asked; that takes its time.
    """
    own = list(own)
    listening = [str(address) for address in own]
    options = [
        "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=", "--log-facility=-",
        "--no-resolv", "--no-hosts", "--no-poll", "--bind-interfaces",
        f"--listen-address={','.join(listening)}",
        f"--txt-record={NAME},{role}",
        *(f"--address=/{NAME}/{address}" for address in listening),
        f"--host-record={RELAY_NAME},{RELAY[4].ip},{RELAY[6].ip}",
        *(["--log-queries"] if log else []),
    ]  # fmt: skip
    async with namespace.start(["dnsmasq", *options]) as program:
        await program.wait_written("started, version")
        yield Resolver(role, own, program)
