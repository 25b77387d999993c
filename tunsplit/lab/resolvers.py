"""Resolvers that tell which of them was asked: the relay's, the LAN's, and a public one.

Each is a dnsmasq that knows one name, `who.is`: its TXT record is the resolver's role, its addresses are the
resolver's own.
"""

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from tunsplit.lab.addresses import Address
from tunsplit.lab.netns import Namespace
from tunsplit.lab.programs import Program

NAME = "who.is"


@asynccontextmanager
async def start(namespace: Namespace, role: str, own: Iterable[Address]) -> AsyncGenerator[Program]:
    """Run a resolver on these addresses; it answers once the block is entered."""
    listening = [str(address) for address in own]
    options = [
        "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=", "--log-facility=-",
        "--no-resolv", "--no-hosts", "--no-poll", "--bind-interfaces",
        f"--listen-address={','.join(listening)}",
        f"--txt-record={NAME},{role}",
        f"--host-record={NAME},{','.join(listening)}",
    ]  # fmt: skip
    async with namespace.start(["dnsmasq", *options]) as program:
        await program.wait_written("started, version")
        yield program
