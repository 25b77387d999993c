"""Network address translation: the table of flows, and the fast path through it.

Theory of operation. An app's packet carries the tun's address (or, bound, that of a side); on its side
it has to carry the side's. So every flow has two rewrites: the original's, found by the four-tuple that
the app sends, and the reply's, found by the four-tuple that comes in **on the device that the flow uses**,
so that nothing from the other side ever matches. Both are worked out once, when the flow opens; a packet
then costs one look-up, one copy of 12 or 36 bytes, and two sums.

Mapping and filtering (RFC 4787, RFC 5382, RFC 5508): one inside address and port keeps one outside port
towards all destinations (endpoint-independent mapping), only those it has sent to may answer (address- and
port-dependent filtering). When TCP's ports run out, one port serves several destinations.

Invariants: a flow's two rewrites open and expire together. No two flows have the same four-tuple, nor the
same reply four-tuple on one device. A port is live as long as a flow uses it. What has ended is referred to
nowhere: a flow is in one bucket of those that may be idle by a second, and leaves it when it ends.

What comes out of the tun of forwarded packets is looked for among the flows of guests alone, which no socket of this
host has: the same four-tuple may be there twice. What comes back is looked for among all.

Who can guess a flow's ports can forge its end, and NAT knows nothing of windows (RFC 9293 §3.10.7.4): only the app's
TCP can tell. So a flow that seems to be over is asked for before it is forgotten, and goes on if its socket does.

When the table is full, the flow that closed first gives way; if none is closing, the new one is refused. When
ports run out, so do some of these, then what is idle for longest. Who has his share of either
makes room among his own.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from heapq import nsmallest
from itertools import islice

from tunsplit.engine.attribution import Owner
from tunsplit.engine.direction import Direction, destination_of, reversed_key, source_of
from tunsplit.engine.flow import ACCEPT, CLOSE, CLOSING, GO_ON, TIMEOUT, App, Flow, FlowEvent, Mapping
from tunsplit.engine.ports import BATCH, LOOKED_AT, PortPool
from tunsplit.engine.rewrites import Way, rewrites
from tunsplit.engine.shares import Shares, User
from tunsplit.engine.timewait import Connection
from tunsplit.wire.ip import ICMP, ICMPV6, TCP, UDP

PORT_POOLS = {TCP: "tcp", UDP: "udp", ICMP: "echo", ICMPV6: "echo"}  # others are translated by address alone
FLOWS = "flows"  # of the table, as shares have it
MOST_FLOWS = 131_072
MOST_FROM_OUTSIDE = 16_384  # of those that a packet of anybody's is enough to open
EXPIRED = 128  # flows that are due before others get their turn: a millisecond
NEVER_FAST = 1 << 16  # longer than any packet
LOOK_S = 1.0  # between two looks at all flows for idle ones, after there were none
IDLE_S = 10.0  # without a packet, after which a flow gives its port to another if there is none left


class Nat:
    """The table of flows. The only writer of rewrites.

    Attributes:
        sockets: inodes of flows' sockets, and of some that have ended since `find_sockets`: to tell in a moment that
            none of them is concerned.
    """

    def __init__(self, pools: dict[str, PortPool], *, most_flows: int = MOST_FLOWS) -> None:
        self.pools = pools
        self.outbound = Direction(outbound=True, on_close=self.close)
        self.on_end: Callable[[Flow], None] = lambda _: None
        self.goes_on: Callable[[Flow], bool] = lambda _: False
        self.forwarded = Direction(outbound=True, on_close=self.close, owned=False)
        self.counters: Counter[str] = Counter()
        self._most_flows = most_flows
        self._inbound: dict[Hashable, Direction] = {}
        self.sockets: set[int] = set()
        self._open = 0
        self._shares = Shares({FLOWS: most_flows, **{name: pool.size for name, pool in pools.items()}})
        self._port_users: defaultdict[str, dict[int, User]] = defaultdict(dict)
        self._none_idle_until: dict[tuple[str, bool, User], float] = {}  # by pool, and whose flows were looked at
        self._closing: dict[Flow, None] = {}
        self._from_outside: dict[Flow, None] = {}
        self._mappings: defaultdict[Hashable, dict[bytes, Mapping]] = defaultdict(dict)
        self._port_uses: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._due: defaultdict[int, dict[Flow, None]] = defaultdict(dict)  # a small set takes twice as much as a dict
        self._checked = 0

    def __len__(self) -> int:
        return self._open

    def __iter__(self) -> Iterator[Flow]:
        return iter([rewrite.flow for direction in (self.outbound, self.forwarded) for rewrite in direction])

    def inbound(self, device: Hashable) -> Direction:
        """The replies that may come in on this device."""
        if device not in self._inbound:
            self._inbound[device] = Direction(outbound=False, on_close=self.close)
        return self._inbound[device]

    def forget_device(self, device: Hashable) -> None:
        """The device is gone; its flows have been ended before."""
        self._inbound.pop(device, None)
        self._mappings.pop(device, None)

    def mapped_port(self, protocol: int, key: bytes, way: Way) -> int | None:
        """The outside port that this inside address and port has already, if it is free towards this destination."""
        mapping = self._mappings[way.device].get(_inside(protocol, key, way.source))
        if mapping is not None and self.is_free(protocol, key, way, mapping.port):
            return mapping.port
        return None

    def is_free(self, protocol: int, key: bytes, way: Way, port: int) -> bool:
        """Whether no other flow has the reply four-tuple that this port would give."""
        outside = _outside(key, way.source, port)
        return self.inbound(way.device).find(protocol, reversed_key(outside)) is None

    def has_room(self, now: float, user: User = None) -> bool:
        """Make room for one more flow of a user; False where the table is full of live ones, or his share of it is."""
        if not self._shares.has_room(FLOWS, user):
            if not self._end_oldest_closing(now, lambda flow: flow.user == user):
                self.counters["user_full"] += 1
                return False
        elif self._open >= self._most_flows and not self._end_oldest_closing(now, lambda _: True):
            self.counters["table_full"] += 1
            return False
        return True

    def _end_oldest_closing(self, now: float, which: Callable[[Flow], bool]) -> bool:
        oldest = next(filter(which, self._closing), None)
        if oldest is None:
            return False
        self.end(oldest, TIMEOUT, now)
        return True

    def may_have_port(self, pool: str, user: User) -> bool:
        """Whether a user may have one more of a pool's ports."""
        return self._shares.has_room(pool, user)

    def free_port(self, pool: str, now: float, *, user: User, his: bool) -> bool:
        """End some flows for their ports: of this pool, those that closed first, else those idle for longest.

        To find idle ones costs a look at every flow; where there were none, nobody looks for a second. False: there
        are none. `his`: this user's own alone.
        """

        def may_go(flow: Flow) -> bool:
            return PORT_POOLS.get(flow.protocol) == pool and not (his and flow.user != user)

        going = list(islice(filter(may_go, self._closing), LOOKED_AT))
        asked = pool, his, user if his else None
        if not going and now >= self._none_idle_until.get(asked, now):
            idle = [flow for flow in self if may_go(flow) and flow.last_seen + IDLE_S <= now]
            going = nsmallest(BATCH, idle, key=lambda flow: flow.last_seen)
            if not going:
                self._none_idle_until[asked] = now + LOOK_S
        for flow in going:
            self.end(flow, TIMEOUT, now)
        return bool(going)

    def open(
        self,
        protocol: int,
        key: bytes,
        way: Way,
        port: int | None,
        now: float,
        *,
        app: App | None = None,
        reason: str = "",
        attribution: str = "",
        cookie: bytes | None = None,
        outside: bytes = b"",
        forwarded: bool = False,
    ) -> Flow:
        """Open a flow: from here on `translate` finds it.

        `port` is the outside port or echo identifier, drawn from the protocol's pool or `mapped_port`; None
        for protocols without. The caller has asked `is_free` and `has_room`. Or `outside` is the whole four-tuple,
        of which no part is the pools': for a device that leads to nobody but ourselves.
        """
        outside = outside or _outside(key, way.source, port)
        flow = Flow(protocol, key, outside, way.side, now, app, reason, attribution, cookie, forwarded=forwarded)
        reply_key = reversed_key(outside)
        inbound = self.inbound(way.device)
        if inbound.find(protocol, reply_key) is not None:
            raise ValueError("two flows with one reply four-tuple")
        flow.original, flow.reply = rewrites(flow, way, now)
        self._enter(flow, now)
        inbound.add(protocol, reply_key, flow.reply)
        if port is not None:
            flow.pooled = True
            self._use(flow, port, way)
        return flow

    def open_untranslated(
        self,
        protocol: int,
        key: bytes,
        way: Way,
        now: float,
        *,
        app: App | None,
        reason: str,
        attribution: str,
        asked: tuple[bytes, int] | None = None,
        unaccepted: bool = False,
        forwarded: bool = False,
    ) -> Flow:
        """Open a flow of which only the original direction is ours; what comes in is the kernel's.

        It carries its side's address already; or it is the answer of a UDP server, perhaps bound to every address, and
        leaves from the address and the port that were `asked` (RFC 1122 §4.1.3.5). Of answers, and connections that are
        `unaccepted`, others decide how many there are: the oldest gives way to a new one, and is judged once more if it
        goes on.
        """
        outside = key if asked is None else _outside(key, *asked)
        flow = Flow(
            protocol, key, outside, way.side, now, app, reason, attribution, translated=False, forwarded=forwarded
        )
        flow.original, flow.reply = rewrites(flow, way, now)
        flow.answers, flow.unaccepted = asked is not None, unaccepted
        if unaccepted:
            flow.original.shortest = NEVER_FAST
        if (flow.answers or unaccepted) and len(self._from_outside) >= MOST_FROM_OUTSIDE:
            self.end(next(iter(self._from_outside)), FlowEvent.TIMEOUT, now)
        self._enter(flow, now)
        if flow.answers or unaccepted:
            self._from_outside[flow] = None
        if flow.answers:
            self.inbound(way.device).answered[reversed_key(outside)] = flow.reply
        return flow

    def let_only_reset_pass(self, flow: Flow) -> None:
        """Of this TCP flow, whose socket is being ended, nothing leaves any more but the RST."""
        flow.ending = True
        flow.original.shortest = NEVER_FAST

    def own(self, flow: Flow, owner: Owner | None, sockets: tuple[int, ...]) -> None:
        """Say whose a flow is, and by which sockets (inodes) that was found."""
        flow.owner, flow.sockets = owner, sockets
        self.sockets.update(sockets)

    def find_sockets(self) -> set[int]:
        """The sockets of all flows, as inodes. Costs a look at each."""
        self.sockets = {inode for flow in self for inode in flow.sockets}
        return set(self.sockets)

    def close(self, flow: Flow) -> None:
        """Both ways are closed, or one was reset: the flow lingers for the last packets."""
        flow.move(CLOSE)
        self._closing[flow] = None
        self._leave_bucket(flow)
        self._enter_bucket(flow, self._checked + int(flow.idle_s) + 1)

    def reopen(self, flow: Flow, now: float) -> None:
        """The socket of a flow that lingers opens its connection once more: the flow goes on.

        A server that still knows a connection with this four-tuple, whose end never reached it, answers the SYN with an
        ACK; the RST that this brings is meant for the old one, and the SYN follows again (RFC 9293 §3.5.1).
        """
        flow.closed_ways = 0
        self._go_on(flow, now)

    def _go_on(self, flow: Flow, now: float) -> None:
        flow.move(GO_ON)
        del self._closing[flow]
        self._leave_bucket(flow)
        self._enter_bucket(flow, max(int(now + flow.idle_s), self._checked) + 1)

    def end(self, flow: Flow, event: FlowEvent, now: float) -> None:
        """Take the flow out at once: no packet of it passes any more, in either direction."""
        flow.move(event)
        self._open -= 1
        self._shares.give_back(FLOWS, flow.user)
        self._closing.pop(flow, None)
        self._from_outside.pop(flow, None)
        self._leave_bucket(flow)
        self._origin(flow).remove(flow.protocol, flow.key)
        if flow.translated:
            self.inbound(flow.original.device).remove(flow.protocol, reversed_key(flow.outside))
            self._release(flow, now)
        else:
            self.inbound(flow.original.device).answered.pop(reversed_key(flow.outside), None)
        self.on_end(flow)
        # They refer to each other: cut, they are freed at once, and the collector finds next to nothing to do.
        del flow.original, flow.reply

    def expire(self, now: float) -> Iterator[int]:
        """End the flows that were idle for too long: how many, time and again, so that others get their turn.

        Costs what is due, not what is open.
        """
        while self._checked < int(now):
            if not self._due:
                self._checked = int(now)
                return
            due = list(islice(self._due.get(self._checked + 1, ()), EXPIRED))
            self._checked += len(due) < EXPIRED
            gone = 0
            for flow in due:
                deadline = flow.last_seen + flow.idle_s
                if deadline > now:
                    self._leave_bucket(flow)
                    self._enter_bucket(flow, int(deadline) + 1)
                elif flow.state is CLOSING and self.goes_on(flow):
                    self._go_on(flow, now)
                else:
                    self.end(flow, TIMEOUT, now)
                    gone += 1
            if due:
                yield gone

    def flows_of(self, devices: Iterable[Hashable]) -> list[Flow]:
        """The flows that leave by one of these devices."""
        wanted = set(devices)
        return [flow for flow in self if flow.original.device in wanted]

    def statistics(self) -> dict[str, int]:
        """Sizes of everything that grows, and counters."""
        ports = {
            f"ports_{name}_{place}": n for name, pool in self.pools.items() for place, n in pool.statistics().items()
        }
        return {
            "flows": self._open,
            "closing": len(self._closing),
            "from_outside": len(self._from_outside),
            "mappings": sum(map(len, self._mappings.values())),
            **ports,
            **self.counters,
        }

    def _origin(self, flow: Flow) -> Direction:
        return self.forwarded if flow.forwarded else self.outbound

    def _enter(self, flow: Flow, now: float) -> None:
        origin = self._origin(flow)
        if origin.find(flow.protocol, flow.key) is not None:
            raise ValueError("two flows with one four-tuple")
        origin.add(flow.protocol, flow.key, flow.original)
        flow.move(ACCEPT)
        self._enter_bucket(flow, max(int(now + flow.idle_s), self._checked) + 1)
        if not self._checked:
            self._checked = int(now)
        flow.user = flow.app.uid if flow.app else None
        self._shares.take(FLOWS, flow.user)
        self._open += 1
        self.counters["opened"] += 1

    def _enter_bucket(self, flow: Flow, second: int) -> None:
        flow.due = second
        self._due[second][flow] = None

    def _leave_bucket(self, flow: Flow) -> None:
        bucket = self._due[flow.due]
        del bucket[flow]
        if not bucket:
            del self._due[flow.due]

    def _use(self, flow: Flow, port: int, way: Way) -> None:
        inside = _inside(flow.protocol, flow.key, way.source)
        mapping = self._mappings[way.device].get(inside)
        if mapping is None:
            mapping = self._mappings[way.device][inside] = Mapping(inside, port)
        if mapping.port == port:  # else TCP's ports have run out, and this one is another mapping's
            mapping.uses += 1
            flow.mapping = mapping
        pool = PORT_POOLS[flow.protocol]
        uses = self._port_uses[pool]
        if not uses[port]:
            self._port_users[pool][port] = flow.user
            self._shares.take(pool, flow.user)
        uses[port] += 1

    def _release(self, flow: Flow, now: float) -> None:
        if not flow.pooled:
            return
        if (mapping := flow.mapping) is not None:
            mapping.uses -= 1
            if not mapping.uses:
                del self._mappings[flow.original.device][mapping.inside]
        pool = PORT_POOLS[flow.protocol]
        uses, port = self._port_uses[pool], int.from_bytes(flow.outside[-4:-2], "big")
        uses[port] -= 1
        if not uses[port]:
            del uses[port]
            self._shares.give_back(pool, self._port_users[pool].pop(port))
            self.pools[pool].give_back(port, now, _connection(flow) if flow.protocol == TCP else None)


def _inside(protocol: int, key: bytes, source: bytes) -> bytes:
    """What has one outside port on a device: an inside address and port, while the device's own is `source`."""
    return bytes((protocol,)) + source + source_of(key) + key[-4:-2]


def _connection(flow: Flow) -> Connection:
    # IP counts more octets than TCP does: each packet's headers, which are more than SYN and FIN.
    return Connection(flow.outside[:-4] + flow.outside[-2:], flow.syn, flow.opened, flow.original.octets)


def _outside(key: bytes, source: bytes, port: int | None) -> bytes:
    ports = key[-4:] if port is None else port.to_bytes(2, "big") + key[-2:]
    return source + destination_of(key) + ports
