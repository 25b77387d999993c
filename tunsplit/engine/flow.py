"""A flow: one conversation of one app, and the states that it passes through.

            first packet          verdict: a side            FIN both ways, RST
     (none) ───────────▶ HELD ──────────────────────▶ OPEN ────────────────────▶ CLOSING ──linger──▶ GONE
                          └ verdict: block, or none in time ─▶ REFUSED ──linger──▶ GONE
        OPEN ──idle──▶ GONE       OPEN, CLOSING ── its side is lost ─▶ REFUSED
        CLOSING ── its socket goes on, or opens again ─▶ OPEN

HELD permits nothing but waiting. OPEN and CLOSING permit packets in both directions. REFUSED permits
nothing, and remembers that the answer was given. GONE is forgotten: the next packet is a first packet.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from tunsplit.engine.attribution import Attribution, Owner
from tunsplit.wire.ip import ICMP, ICMPV6, TCP, UDP


class FlowState(StrEnum):
    """What a flow permits just now."""

    HELD = "held"
    OPEN = "open"
    REFUSED = "refused"
    CLOSING = "closing"
    GONE = "gone"


class FlowEvent(StrEnum):
    """What can happen to a flow."""

    ACCEPT = "accept"
    BLOCK = "block"
    CLOSE = "close"
    GO_ON = "go on"
    TIMEOUT = "timeout"


# For what runs once a flow or more: Python 3.11 takes 0.5 µs to find a member of an enumeration.
OPEN, CLOSING = FlowState.OPEN, FlowState.CLOSING
ACCEPT, CLOSE, GO_ON, TIMEOUT = FlowEvent.ACCEPT, FlowEvent.CLOSE, FlowEvent.GO_ON, FlowEvent.TIMEOUT


TRANSITIONS = {
    (FlowState.HELD, FlowEvent.ACCEPT): FlowState.OPEN,
    (FlowState.HELD, FlowEvent.BLOCK): FlowState.REFUSED,
    (FlowState.HELD, FlowEvent.TIMEOUT): FlowState.REFUSED,  # app still unknown: fail closed, never leak
    (FlowState.OPEN, FlowEvent.CLOSE): FlowState.CLOSING,
    (FlowState.OPEN, FlowEvent.BLOCK): FlowState.REFUSED,  # its side was lost
    (FlowState.OPEN, FlowEvent.TIMEOUT): FlowState.GONE,
    (FlowState.CLOSING, FlowEvent.GO_ON): FlowState.OPEN,  # what looked like the end was not that of its connection
    (FlowState.CLOSING, FlowEvent.BLOCK): FlowState.REFUSED,
    (FlowState.CLOSING, FlowEvent.TIMEOUT): FlowState.GONE,
    (FlowState.REFUSED, FlowEvent.TIMEOUT): FlowState.GONE,
}

# Seconds without a packet after which a flow is gone.
TCP_ESTABLISHED_S = 7440.0  # RFC 5382 REQ-5: not less than 2 hours 4 minutes
TCP_TRANSITORY_S = 240.0  # RFC 5382 REQ-5: not less than 4 minutes
LINGER_S = 10.0  # for the last packets of what has closed; the port rests after that
UDP_PAUSE_S = 0.010  # after which all sockets that may send a flow are asked for, not only the likeliest
UDP_S = 300.0  # RFC 4787 REQ-5: 5 minutes recommended
DNS_S = 30.0  # RFC 4787 REQ-5 a: less for a well-known port; most questions come from a port of their own
DNS_PORT = (53).to_bytes(2, "big")
ECHO_S = 60.0  # RFC 5508 REQ-1: not less than 60 seconds
OTHER_S = 600.0


class App(NamedTuple):
    """Whom a flow belongs to, as far as it was found."""

    pid: int
    exe: str
    uid: int

    @classmethod
    def of(cls, attribution: Attribution) -> "App | None":
        """What users are shown of the owner."""
        if attribution.owner is None:
            return None
        process = attribution.owner.process
        return cls(process.pid, process.executable.path if process.executable else "", process.uid)


@dataclass(slots=True, eq=False)
class Rewrite:
    """One direction of a flow, worked out when it opens: what to write where. Plain data, but for its counters.

    `four_tuple` replaces what is there `at` its place. Finished checksums, of the IP header and of the transport (at
    `check_at`), fall by `ip_delta` and `transport_delta`; an unfinished one covers the addresses but not the
    ports, and rises by `pseudo_delta`. Packets of less than `shortest` bytes are none of this flow's. `device`
    and `next_hop` say where the packet goes then; both are opaque here.
    """

    flow: "Flow"
    four_tuple: bytes
    check_at: int
    shortest: int
    ip_delta: int
    transport_delta: int
    pseudo_delta: int
    device: Hashable
    next_hop: object
    last_seen: float = 0.0
    packets: int = 0
    octets: int = 0

    @property
    def at(self) -> int:
        """Where the four-tuple of a packet without options begins."""
        return 12 if len(self.four_tuple) == 12 else 8

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.at + len(self.four_tuple)


@dataclass(slots=True, eq=False)
class Mapping:
    """The outside port, or echo identifier, of one inside address and port; kept while a flow uses it."""

    inside: bytes
    port: int
    uses: int = 0


@dataclass(slots=True, eq=False)
class Flow:
    """One conversation, both directions.

    `key` is the four-tuple of the original direction as the app sends it, `outside` the same as it leaves the side.
    `translated` is False for what carries its side's own address already: a server's answers, and connections older
    than tunsplit; their inbound half is the kernel's. `unaccepted`: a connection to a listener that no process has
    taken yet, and every packet of it is looked at. `answers`: a UDP server's, to what came in. `owner` and
    `sockets` (inodes) are what it was judged by, for when that changes, and `verdict` is what came of it: its side,
    unless the DNS table sends it elsewhere. `forwarded`: it is a guest's, no app's. `ending`: of a TCP flow that
    has lost its side nothing leaves any more but its socket's RST; `resets` are
    the sequence numbers of that: where what was dropped begins, and its own. `pooled`: its outside port is NAT's.
    `user` is the uid of the app that opened it, for what one user may have.
    `syn` is what a TCP connection was opened with as it left, from TCP's header on; nothing if it was not opened here.
    `due` is the second in which the table looks whether the flow has been idle for too long.
    """

    protocol: int
    key: bytes
    outside: bytes
    side: str
    opened: float
    app: App | None
    reason: str
    attribution: str
    cookie: bytes | None = None
    owner: Owner | None = None
    sockets: tuple[int, ...] = ()
    state: FlowState = FlowState.HELD
    translated: bool = True
    unaccepted: bool = False
    answers: bool = False
    pooled: bool = False
    forwarded: bool = False
    ending: bool = False
    resets: tuple[int, ...] = ()
    verdict: str = ""
    closed_ways: int = 0
    syn: bytes = b""
    due: int = 0
    user: int | None = None
    mapping: Mapping | None = None
    original: Rewrite = field(init=False, repr=False)
    reply: Rewrite = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """A flow leaves by the side that it was judged for, unless somebody says otherwise."""
        self.verdict = self.verdict or self.side

    def move(self, event: FlowEvent) -> None:
        """Pass to the next state. A pair that is not in the table is our own bug: KeyError."""
        self.state = TRANSITIONS[self.state, event]

    @property
    def passes(self) -> bool:
        """Whether packets of this flow may pass."""
        return self.state is OPEN or self.state is CLOSING

    @property
    def finished(self) -> bool:
        """Whether both ends have sent their last."""
        return self.closed_ways == 3

    @property
    def last_seen(self) -> float:
        """When the last packet of either direction passed, in seconds of the caller's clock."""
        return max(self.original.last_seen, self.reply.last_seen)

    @property
    def idle_s(self) -> float:
        """How many seconds without a packet this flow may live on for."""
        if self.state is CLOSING:
            return LINGER_S
        if self.protocol == TCP:
            if not self.translated:
                return TCP_TRANSITORY_S if self.unaccepted else TCP_ESTABLISHED_S
            established = self.reply.packets and self.original.packets > 1
            return TCP_ESTABLISHED_S if established else TCP_TRANSITORY_S
        if self.protocol == UDP:
            return DNS_S if self.key[-2:] == DNS_PORT else UDP_S
        return ECHO_S if self.protocol in (ICMP, ICMPV6) else OTHER_S
