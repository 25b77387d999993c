"""The host's links, addresses, routes, rules and neighbours: read, changed, and watched.

Some facts about rtnetlink:

- IPv4's table is checked against the request before a deletion, field by field, but a field that the request leaves
  out fits any route: a route that was replaced is not deleted, lest its successor is (fib_trie.c, fib_table_delete).
- In IPv6 a second route of the same destination and metric is a second path, not an error (ip6_fib.c,
  fib6_add_rt2node): replacing says what is meant in both families.
- Asking for a table that was never used is ENOENT (fib_frontend.c, inet_dump_fib).
- The same rule twice is EEXIST with NLM_F_EXCL only (fib_rules.c, rule_exists).
- An event carries the port of the socket whose request caused it, so our own changes can be told from others'.
"""

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path

from tunsplit.errors import KernelError
from tunsplit.host import (
    FAMILIES,
    TABLE_MAIN,
    Address,
    IPAddress,
    IPInterface,
    Link,
    Neighbour,
    NextHop,
    Route,
    Rule,
    Snapshot,
)
from tunsplit.kernel import rtmessages as rt
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkSocket,
    Refused,
    attribute,
    iterate_messages,
    nested,
)
from tunsplit.kernel.netlinkevents import NetlinkEvents
from tunsplit.names import ROUTE_PROTOCOL, TABLES

NETLINK_ROUTE = 0
CLOSED = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENETDOWN, errno.ENODEV}
GONE = {errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL}

REMEMBERED = 1024  # messages of a few hundred bytes, and what they mean

IPV6_SWITCH = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")


class Rtnetlink(Closing):
    """Requests to the network namespace that the calling thread was in when this was made; each is answered at once.

    Every method raises KernelError, with the call, the object and the kernel's reason.
    """

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_ROUTE, strict=True)

    @property
    def port(self) -> int:
        """The netlink port that marks the events which our own requests cause."""
        return self._netlink.port

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    # What is there.

    def snapshot(self) -> Snapshot:
        """Read the whole network configuration: links, addresses, rules, the routes of main and of our tables."""
        switch = _switch()
        families = [4] if switch is None else FAMILIES
        return Snapshot(
            links=tuple(self.links()),
            addresses=tuple(address for family in families for address in self.addresses(family)),
            routes=tuple(
                route for family in families for table in (TABLE_MAIN, *TABLES) for route in self.routes(family, table)
            ),
            rules=tuple(rule for family in families for rule in self.rules(family)),
            ipv6=switch is not None,
            ipv6_enabled=switch == "0",
        )

    def links(self) -> list[Link]:
        """Read all devices."""
        body = rt.IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute(rt.IFLA_EXT_MASK, rt.U32.pack(rt.RTEXT_FILTER_SKIP_STATS))
        return [rt.decode_link(found) for _, found in self._netlink.dump("list of links", rt.RTM_GETLINK, body)]

    def addresses(self, family: int) -> list[Address]:
        """Read all addresses of a family, 4 or 6."""
        body = rt.IFADDRMSG.pack(rt.FAMILY_NUMBER[family], 0, 0, 0, 0)
        answers = self._netlink.dump(f"list of IPv{family} addresses", rt.RTM_GETADDR, body)
        return [address for _, found in answers if (address := rt.decode_address(found))]

    def routes(self, family: int, table: int) -> list[Route]:
        """Read the routes of one table."""
        what = f"list of IPv{family} routes of table {table}"
        try:
            answers = self._netlink.dump(what, rt.RTM_GETROUTE, rt.encode_table(family, table))
        except Refused as refused:
            if refused.errno == errno.ENOENT:
                return []
            raise
        return [route for _, found in answers for route in _decode_routes(found)]

    def rules(self, family: int) -> list[Rule]:
        """Read the routing rules of a family, by priority."""
        body = rt.FIB_RULE_HDR.pack(rt.FAMILY_NUMBER[family], 0, 0, 0, 0, 0, 0)
        answers = self._netlink.dump(f"list of IPv{family} rules", rt.RTM_GETRULE, body)
        return [rule for _, found in answers if (rule := _decode_rule(found))]

    def route_get(self, destination: IPAddress, *, mark: int = 0, oif: int | None = None) -> NextHop | None:
        """Ask which way a packet with `mark` from a socket bound to device `oif` takes; None: the way is closed."""
        what = f"route to {destination} with mark {mark:#x}"
        try:
            answer = self._netlink.get(what, rt.RTM_GETROUTE, 0, rt.encode_question(destination, mark, oif))
        except Refused as refused:
            if refused.errno in CLOSED:
                return None
            raise
        return rt.decode_next_hop(answer)

    def is_local(self, address: IPAddress) -> bool:
        """Ask whether packets to this address are for this host."""
        try:
            answer = self._netlink.get(f"route to {address}", rt.RTM_GETROUTE, 0, rt.encode_question(address, 0, None))
        except Refused as refused:
            if refused.errno in CLOSED:
                return False
            raise
        return rt.is_local(answer)

    # What is to be.

    def replace_route(self, route: Route) -> None:
        """Put the route in, in place of one with the same destination, table and metric."""
        self._netlink.request(
            f"add {describe(route)}", rt.RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, rt.encode_route(route)
        )

    def delete_route(self, route: Route) -> None:
        """Take this very route out; no error if it is gone."""
        self._forgiving(GONE, f"delete {describe(route)}", rt.RTM_DELROUTE, 0, rt.encode_route(route))

    def add_rule(self, rule: Rule) -> None:
        """Put the rule in; no error if it is there."""
        flags = NLM_F_CREATE | NLM_F_EXCL
        self._forgiving({errno.EEXIST}, f"add {describe(rule)}", rt.RTM_NEWRULE, flags, rt.encode_rule(rule))

    def delete_rule(self, rule: Rule) -> None:
        """Take the rule out; no error if it is gone."""
        self._forgiving(GONE, f"delete {describe(rule)}", rt.RTM_DELRULE, 0, rt.encode_rule(rule))

    def add_address(self, index: int, interface: IPInterface) -> None:
        """Give a device an address, usable at once, without a route of its own; no error if it has it."""
        self._forgiving(
            {errno.EEXIST},
            f"add address {interface} to device {index}",
            rt.RTM_NEWADDR,
            NLM_F_CREATE | NLM_F_EXCL,
            rt.encode_address(index, interface),
        )

    def delete_address(self, index: int, interface: IPInterface) -> None:
        """Take an address from a device; no error if it is gone."""
        what = f"delete address {interface} of device {index}"
        self._forgiving(GONE, what, rt.RTM_DELADDR, 0, rt.encode_address(index, interface))

    def link_set(
        self,
        index: int,
        *,
        up: bool | None = None,
        mtu: int | None = None,
        group: int | None = None,
        addr_gen_mode: int | None = None,
    ) -> None:
        """Change what is given of a device."""
        change = rt.IFF_UP if up is not None else 0
        body = rt.IFINFOMSG.pack(0, 0, index, rt.IFF_UP if up else 0, change)
        if mtu is not None:
            body += attribute(rt.IFLA_MTU, rt.U32.pack(mtu))
        if group is not None:
            body += attribute(rt.IFLA_GROUP, rt.U32.pack(group))
        if addr_gen_mode is not None:
            mode = attribute(rt.IFLA_INET6_ADDR_GEN_MODE, bytes([addr_gen_mode]))
            body += nested(rt.IFLA_AF_SPEC, nested(rt.FAMILY_NUMBER[6], mode))
        self._netlink.request(f"change device {index}", rt.RTM_NEWLINK, 0, body)

    def delete_link(self, link: Link) -> None:
        """Remove a device; no error if it is gone."""
        body = rt.IFINFOMSG.pack(0, 0, link.index, 0, 0)
        self._forgiving(GONE, f"delete device {link.name}", rt.RTM_DELLINK, 0, body)

    # Neighbours.

    def neighbours(self, index: int | None = None) -> list[Neighbour]:
        """Read what is known of the neighbours on a device, or on all."""
        found = []
        for family in [4] if _switch() is None else FAMILIES:
            body = rt.NDMSG.pack(rt.FAMILY_NUMBER[family], 0, 0, 0, 0)
            if index is not None:
                body += attribute(rt.NDA_IFINDEX, rt.U32.pack(index))
            answers = self._netlink.dump(f"list of IPv{family} neighbours", rt.RTM_GETNEIGH, body)
            found += [neighbour for _, answer in answers if (neighbour := rt.decode_neighbour(answer))]
        return found

    def neighbour_use(self, index: int, address: IPAddress) -> None:
        """Make the kernel resolve or confirm a neighbour, as if it had a packet for it (NTF_USE); the event tells."""
        self._neighbour(index, address, rt.encode_neighbour(index, address, flags=rt.NTF_USE))

    def neighbour_managed(self, index: int, address: IPAddress) -> None:
        """Make the kernel keep a neighbour resolved by itself (NTF_EXT_MANAGED, Linux 5.16).

        A flush and a device that goes down end that: ask again then. The entry carries our protocol number.
        """
        body = rt.encode_neighbour(index, address, extended=rt.NTF_EXT_MANAGED, protocol=ROUTE_PROTOCOL)
        self._neighbour(index, address, body)

    def neighbour_forget(self, index: int, address: IPAddress) -> None:
        """Take a neighbour's entry out, managed or not; no error if it is gone."""
        what = f"delete neighbour {address} on device {index}"
        self._forgiving(GONE, what, rt.RTM_DELNEIGH, 0, rt.encode_neighbour(index, address))

    def _neighbour(self, index: int, address: IPAddress, body: bytes) -> None:
        what = f"neighbour {address} on device {index}"
        self._netlink.request(what, rt.RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)

    def _forgiving(self, forgiven: Iterable[int], what: str, kind: int, flags: int, body: bytes) -> None:
        try:
            self._netlink.request(what, kind, flags, body)
        except Refused as refused:
            if refused.errno not in forgiven:
                raise


class Change(Enum):
    """What an event says has changed."""

    LINK = "link"
    ADDRESS = "address"
    ROUTE = "route"
    RULE = "rule"
    OVERRUN = "overrun"  # events were lost: anything may have changed


@dataclass(frozen=True, slots=True)
class Loss:
    """What can be used no longer: a device that went down or away, or, if given, one address of it."""

    index: int
    address: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something changed."""

    change: Change
    loss: Loss | None = None


LOST = Event(Change.OVERRUN)
CHANGES = {
    rt.RTM_NEWLINK: Change.LINK, rt.RTM_DELLINK: Change.LINK,
    rt.RTM_NEWADDR: Change.ADDRESS, rt.RTM_DELADDR: Change.ADDRESS,
    rt.RTM_NEWROUTE: Change.ROUTE, rt.RTM_DELROUTE: Change.ROUTE,
    rt.RTM_NEWRULE: Change.RULE, rt.RTM_DELRULE: Change.RULE,
}  # fmt: skip

# enum rtnetlink_groups: link, then address, route and rule of IPv4 and IPv6
GROUPS = (1, 5, 7, 8, 9, 11, 19)
NEIGHBOURS = 3


class RtnetlinkEvents(NetlinkEvents):
    """What changes in the network namespace that the calling thread was in when this was made, but for neighbours.

    Subscribe before the first snapshot, so that nothing is missed between the two. What the requests of `ignore_port`
    (Rtnetlink.port) cause is left out.
    """

    def __init__(self, *, ignore_port: int = 0) -> None:
        super().__init__("rtnetlink events", NETLINK_ROUTE, GROUPS)
        self._ignore_port = ignore_port

    def read(self) -> list[Event]:
        """Read what has happened since, in order; never blocks."""
        events: list[Event] = []
        for datagram in self._datagrams():
            events += [LOST] if datagram is None else events_untrusted(datagram, self._ignore_port)
        return events


def events_untrusted(datagram: bytes, ignore_port: int = 0) -> list[Event]:
    """What a datagram tells; of a message that cannot be understood, that anything may have changed."""
    events: list[Event] = []
    for kind, _, _, port, body in iterate_messages(datagram):
        try:
            if kind in CHANGES and (port != ignore_port or not port):
                events.append(Event(CHANGES[kind], loss=_loss(kind, body)))
        except (ValueError, IndexError, struct.error):
            events.append(LOST)
    return events


def _loss(kind: int, body: bytes) -> Loss | None:
    if kind == rt.RTM_DELADDR and (address := rt.decode_address(body)) is not None:
        return Loss(address.index, address.interface.ip)
    if kind in (rt.RTM_NEWLINK, rt.RTM_DELLINK):
        family, _, index, flags, _ = rt.IFINFOMSG.unpack_from(body)
        # A port that leaves its bridge is a RTM_DELLINK of the family AF_BRIDGE (net/bridge/br_netlink.c).
        if family == socket.AF_UNSPEC and (kind == rt.RTM_DELLINK or not flags & rt.IFF_UP):
            return Loss(index)
    return None


class NeighbourEvents(NetlinkEvents):
    """What the table of neighbours says anew, in the network namespace that the calling thread was in.

    Heard apart from all else: with ARP anybody on a network can make as many of these events as packets.
    """

    def __init__(self) -> None:
        super().__init__("neighbour events", NETLINK_ROUTE, (NEIGHBOURS,))

    def read(self) -> list[Neighbour] | None:
        """Read what it has said since, in order, whoever asked for it; None: some of it was lost. Never blocks.

        Raises:
            KernelError: no more news will come.
        """
        datagrams = list(self._datagrams())
        if None in datagrams:
            return None
        try:
            return [one for datagram in datagrams for one in neighbours_untrusted(datagram or b"")]
        except (ValueError, IndexError, struct.error):
            return None


def neighbours_untrusted(datagram: bytes) -> Iterator[Neighbour]:
    """What a datagram tells; of an entry that was deleted, that it has neither address nor state."""
    for kind, _, _, _, body in iterate_messages(datagram):
        if kind in (rt.RTM_NEWNEIGH, rt.RTM_DELNEIGH) and (neighbour := rt.decode_neighbour(body)):
            gone = kind == rt.RTM_DELNEIGH
            yield Neighbour(neighbour.index, neighbour.address, None, 0) if gone else neighbour


def describe(item: Route | Rule) -> str:
    """Name a route or a rule in a message."""
    if isinstance(item, Rule):
        return f"IPv{item.family} rule {item.priority}"
    way = f" via {item.gateway}" if item.gateway else ""
    device = f" on device {item.oif}" if item.oif else ""
    return f"{item.type.name.lower()} route {item.destination}{way}{device} in table {item.table}"


# Most of a picture looks as it did in the one before: what the same bytes mean need not be worked out again. Packets
# wait while a picture is taken, and this makes it a third as long.
@lru_cache(maxsize=REMEMBERED)
def _decode_routes(body: bytes) -> tuple[Route, ...]:
    return tuple(rt.decode_routes(body))


_decode_rule = lru_cache(maxsize=REMEMBERED)(rt.decode_rule)


def _switch() -> str | None:
    """What /proc says of IPv6 here: "0" on, "1" off, None not there at all."""
    try:
        return IPV6_SWITCH.read_text().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KernelError(f"{IPV6_SWITCH}: {error.strerror}") from error
