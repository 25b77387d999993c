"""What becomes of a flow to a resolver's port: answered by us, sent on a side, or refused.

Theory of operation. Questions in clear text, port 53, are taken out of their flow and asked again by the DNS proxy,
wherever they were addressed: the table says of whom. Encrypted ones, port 853 (RFC 7858, RFC 9250), cannot be asked
again; they reach a resolver that the table gives to the app that asks, on the side that the table gives, and no
other. With `intercept = "listed"` both hold for the listed resolvers alone: elsewhere an excluded app asks as it
likes, and an included one not at all.
"""

from enum import Enum

from tunsplit.engine.dnstable import DnsTable, Route
from tunsplit.host import IPAddress

CLEAR, ENCRYPTED = 53, 853
PORTS = frozenset(port.to_bytes(2, "big") for port in (CLEAR, ENCRYPTED))  # as they end a four-tuple


class Handling(Enum):
    """What becomes of a flow to a resolver's port."""

    ANSWER = "answer"
    TUNNEL = "tunnel"
    UPLINK = "uplink"
    REFUSE = "refuse"


SIDES = {
    Route.TUNNEL: Handling.TUNNEL,
    Route.OUTSIDE: Handling.UPLINK,
    Route.LAN: Handling.UPLINK,
    Route.REFUSED: Handling.REFUSE,
}


def handling(
    table: DnsTable, port: int, asked: IPAddress, *, excluded: bool, tunnel_up: bool, client: bool = False
) -> Handling:
    """Say what becomes of a flow to this resolver.

    Args:
        table: what applies.
        port: 53 or 853.
        asked: the address that the app names.
        excluded: whether the app is judged to be on the uplink.
        tunnel_up: whether the tunnel can be used.
        client: whether the app is the VPN's client, which asks system DNS wherever it addresses its questions.
    """
    if table.listed_only and not client and not table.is_listed(asked):
        return Handling.UPLINK if excluded else Handling.REFUSE
    if port == CLEAR:
        return Handling.ANSWER
    choice = table.choose(excluded=excluded, tunnel_up=tunnel_up, asked=asked, client=client)
    return next((SIDES[server.route] for server in choice.servers if server.address == asked), Handling.REFUSE)
