"""Tells a datagram socket how wide its path is, and no other one.

Theory of operation. The kernel keeps what an ICMP error says about a path's MTU as an exception to the route, for
all sockets that send to that destination; into the tun leads one route, for the apps of both sides. So while the
error is delivered, a route to its destination alone stands over that one; the exception goes with it (fib_nh_release
in net/ipv4/fib_semantics.c, rt6_flush_exceptions in net/ipv6/route.c), and the socket has had its EMSGSIZE. What is to
last is a route with that MTU in a table of the flow's side, and a rule that leads this flow's ports there: the kernel
then cuts or refuses what the app sends, as the app has asked it to (IP_MTU_DISCOVER), and tells it the MTU.

The error has to be delivered within the write: nothing of it may wait while the route above goes. That holds while
the tun has no receive packet steering. TCP puts errors off while its socket is in use, and is not told.

A flow without ports (echo, other protocols), or one too many, is told once, and what it sends on is cut for it.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

from tunsplit.engine.direction import destination_of, source_of
from tunsplit.engine.flow import Flow, Rewrite
from tunsplit.engine.paths import KNOWN_S
from tunsplit.engine.steering import TUN_METRIC, into_tun
from tunsplit.engine.steeringrules import BOUND_TABLES
from tunsplit.errors import KernelError
from tunsplit.host import IPAddress, Route, Rule
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.names import (
    PRIORITY_NARROW,
    ROUTE_PROTOCOL,
    TABLE_NARROW_TUNNEL,
    TABLE_NARROW_UPLINK,
    TABLE_TUN,
)
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.network import Network
from tunsplit.wire.ip import DONT_FRAGMENT, UDP, unpack_u16

MOST_RULES = 256  # the kernel walks them for each route that it looks for
MOST_TOLD = 1024  # flows without a rule
PAUSE_S = 0.02  # between two errors to one flow: each costs five requests, and all sockets look for their route anew
ABOVE_METRIC = TUN_METRIC + 9  # none of the plan's routes into the tun has it

Place = tuple[int, IPAddress]  # a table and a destination
TABLES = {"uplink": TABLE_NARROW_UPLINK, "tunnel": TABLE_NARROW_TUNNEL}

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Told:
    """A flow that has been told: its rule, and where the route behind it is."""

    mtu: int
    since: float
    rule: Rule | None = None
    place: Place | None = None


class Narrow:
    """Flows whose path is narrower than the tun."""

    def __init__(self, answers: Answers, network: Network, rtnetlink: Rtnetlink, tun: str) -> None:
        """`tun` is the tun's name."""
        self._tun = tun
        self._answers = answers
        self._network = network
        self._rtnetlink = rtnetlink
        self._told: OrderedDict[Flow, _Told] = OrderedDict()
        self._routes: dict[Place, Route] = {}
        self._users: Counter[Place] = Counter()
        self._counters = answers.counters

    def too_big(self, rewrite: Rewrite, packet: bytes, mtu: int) -> bool:
        """This packet, rewritten already, is bigger than `mtu`, which is what its path takes.

        Returns:
            Whether the app was told; False where it knows, and means the packet to be cut.
        """
        if rewrite.flow.forwarded:  # a guest's kernel keeps it for the guest alone
            if may_be_cut(packet):
                return False
            self._answers.too_big(rewrite, packet, mtu)
            return True
        told = self._told.get(rewrite.flow)
        if told is not None and told.rule is None:
            return False
        return self._tell(rewrite.flow, mtu, rewrite.last_seen, lambda: self._answers.too_big(rewrite, packet, mtu))

    def heard(self, flow: Flow, error: bytes | bytearray, mtu: int, now: float) -> None:
        """A router has said so of a packet of this flow; `error` is its word as the app is to read it."""
        if flow.forwarded:
            self._answers.write(error, flow)
        elif mtu < self._network.tun_mtu:
            self._tell(flow, mtu, now, lambda: self._answers.write(error, flow))

    def _tell(self, flow: Flow, mtu: int, now: float, write: Callable[[], None]) -> bool:
        told = self._told.get(flow)
        if told is not None and told.mtu == mtu and now - told.since < PAUSE_S:
            return True
        destination = ip_address(destination_of(flow.key))
        above = self._into_tun(destination, self._table_of(source_of(flow.key)))
        if above is None:
            self._counters["path_mtu_not_told"] += 1
            return False
        # Routes of IPv4 that differ in their destination only are one object to the kernel, exceptions included
        # (fib_semantics.c, fib_find_info).
        above = replace(above, metric=ABOVE_METRIC)
        try:
            self._remember(flow, mtu, now)
            self._rtnetlink.replace_route(above)
            try:
                write()
            finally:
                self._rtnetlink.delete_route(above)
        except KernelError as error:  # a device is going away, or memory is short
            self._counters["path_mtu_not_told"] += 1
            logger.info("an app cannot be told its path's MTU", extra={"error": str(error)})
            return False
        self._counters["path_mtu_told"] += 1
        return True

    def _remember(self, flow: Flow, mtu: int, now: float) -> None:
        told = self._told.get(flow)
        if told is not None and (told.mtu == mtu or told.rule is None):
            told.mtu, told.since = mtu, now
            return
        self.forget(flow)
        told = self._told[flow] = _Told(mtu, now)
        rules = len(self.rules())
        if flow.protocol == UDP and rules < MOST_RULES:
            self._add_rule(flow, told)
        elif len(self._told) - rules > MOST_TOLD:
            self.forget(next(flow for flow, told in self._told.items() if told.rule is None))

    def _add_rule(self, flow: Flow, told: _Told) -> None:
        destination = ip_address(destination_of(flow.key))
        table = TABLES[flow.side]
        route = self._into_tun(destination, table, mtu=told.mtu)
        if route is None:
            return
        source_port, port = (int.from_bytes(flow.key[at:][:2], "big") for at in (-4, -2))
        rule = Rule(
            destination.version, PRIORITY_NARROW, iif="lo", to=ip_network(destination), ipproto=UDP,
            sport=(source_port, source_port), dport=(port, port), table=table, protocol=ROUTE_PROTOCOL,
        )  # fmt: skip
        # Several flows go there by one route: the latest word about the path holds for all of them.
        self._rtnetlink.replace_route(route)
        told.place = table, destination
        self._routes[told.place] = route
        self._users[told.place] += 1
        self._rtnetlink.add_rule(rule)
        told.rule = rule

    def _into_tun(self, destination: IPAddress, table: int, *, mtu: int | None = None) -> Route | None:
        """The route to a single destination by the tun; None where the tun cannot have it."""
        link = self._network.snapshot.link(self._tun)
        source = self._network.own_address(destination.version)
        if link is None or source is None:
            return None
        return replace(into_tun(link, ip_network(destination), table, ip_address(source)), mtu=mtu)

    def _table_of(self, source: bytes) -> int:
        """The table by which packets with this address come into the tun."""
        address = ip_address(source)
        for side, table in BOUND_TABLES.items():
            if any(own.ip == address for own in self._network.sides.addresses(side)):
                return table
        return TABLE_TUN

    def forget(self, flow: Flow) -> None:
        """The flow has ended, or is to find out anew."""
        told = self._told.pop(flow, None)
        if told is None:
            return
        try:
            if told.rule is not None:
                self._rtnetlink.delete_rule(told.rule)
            if told.place is not None:
                self._users[told.place] -= 1
                if not self._users[told.place]:
                    del self._users[told.place]
                    self._rtnetlink.delete_route(self._routes.pop(told.place))
        except KernelError as error:
            logger.warning("what a flow was told cannot be taken back", extra={"error": str(error)})

    def forget_all(self) -> None:
        """The network has changed, and the paths with it."""
        for flow in tuple(self._told):
            self.forget(flow)

    def expire(self, now: float) -> int:
        """Let paths be tried again that may have become wider. No fragments are lost by that: 0."""
        for flow, told in tuple(self._told.items()):
            if told.since + KNOWN_S <= now:
                self.forget(flow)
        return 0

    def rules(self) -> set[Rule]:
        """The rules that are ours beside the plan's."""
        return {told.rule for told in self._told.values() if told.rule is not None}


def may_be_cut(packet: bytes) -> bool:
    """Whether routers may cut this packet: one of IPv4 without DF (RFC 791 §3.1)."""
    return packet[0] >> 4 == 4 and not unpack_u16(packet, 6)[0] & DONT_FRAGMENT
