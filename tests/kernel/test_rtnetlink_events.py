"""What rtnetlink tells by itself: neighbours, changes, losses."""

import os
import select
import socket
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.hosts import (
    ROUTER4,
    ROUTER6,
    UPLINK,
    own_namespace,
)
from tunsplit.host import (
    SCOPE_LINK,
    Neighbour,
    NeighbourState,
    Route,
    Rule,
)
from tunsplit.kernel import rtnetlink as rtnetlink_module
from tunsplit.kernel.netlink import message
from tunsplit.kernel.rtmessages import RTM_DELNEIGH, RTM_NEWNEIGH
from tunsplit.kernel.rtnetlink import (
    Change,
    Event,
    Loss,
    NeighbourEvents,
    Rtnetlink,
    RtnetlinkEvents,
    neighbours_untrusted,
)
from tunsplit.names import ROUTE_PROTOCOL

pytestmark = pytest.mark.netns

TABLE = 7501

# Neighbours.


def awaited_neighbour(events: NeighbourEvents, address: str, state: int) -> Neighbour:
    while select.select([events.fileno()], [], [], 5)[0]:
        for neighbour in events.read() or ():
            if neighbour.address == ip_address(address) and neighbour.state & state:
                return neighbour
    raise AssertionError(f"nothing is told of {address}")


@pytest.mark.parametrize("address", [ROUTER4, ROUTER6])
def test_a_neighbour_is_resolved_when_asked_for(host, rtnetlink, eth0, address):
    with NeighbourEvents() as events:
        rtnetlink.neighbour_use(eth0, ip_address(address))
        told = awaited_neighbour(events, address, NeighbourState.REACHABLE)

    assert (True, False, 6) == (told.usable, told.failed, len(told.mac or b""))
    assert told.address in [one.address for one in rtnetlink.neighbours(eth0)]


def test_a_neighbour_that_is_not_there_fails(host, rtnetlink, eth0):
    host.sysctl("net/ipv4/neigh/eth0/retrans_time_ms", "20")
    with NeighbourEvents() as events:
        rtnetlink.neighbour_use(eth0, ip_address("192.168.50.99"))
        told = awaited_neighbour(events, "192.168.50.99", NeighbourState.FAILED)

    assert (False, True) == (told.usable, told.failed)


def test_a_managed_neighbour_is_ours_until_it_is_forgotten(host, rtnetlink, eth0):
    rtnetlink.neighbour_managed(eth0, ip_address(ROUTER4))

    assert [ROUTE_PROTOCOL] == [
        one.protocol for one in rtnetlink.neighbours(eth0) if one.address == ip_address(ROUTER4)
    ]
    assert "managed" in host.ip("neigh show dev eth0")
    with NeighbourEvents() as events:
        rtnetlink.neighbour_forget(eth0, ip_address(ROUTER4))
        rtnetlink.neighbour_forget(eth0, ip_address(ROUTER4))
        gone = events.read()
    assert gone
    assert not any(one.usable for one in gone)
    assert [] == [one for one in rtnetlink.neighbours() if one.address == ip_address(ROUTER4)]


# Events.


def test_every_kind_of_change_is_heard(host):
    """An IPv6 address is told of by a work queue, so some time after the command."""
    with RtnetlinkEvents() as events:
        for command, change in (
            ("link set eth0 mtu 1400", Change.LINK),
            ("address add 10.1.1.1/32 dev eth0", Change.ADDRESS),
            ("route add 10.2.0.0/16 dev eth0", Change.ROUTE),
            ("rule add pref 5 table 5", Change.RULE),
            ("-6 address add 2001:db8:7::1/128 dev eth0 nodad", Change.ADDRESS),
            ("-6 route add 2001:db8:8::/48 dev eth0", Change.ROUTE),
            ("-6 rule add pref 5 table 5", Change.RULE),
        ):
            events.read()
            host.ip(command)
            heard: set[Change] = set()
            while change not in heard and select.select([events], [], [], 5)[0]:
                heard |= {event.change for event in events.read()}
            assert change in heard, command


def test_neighbours_are_heard_apart(host):
    command = "neigh add 192.168.50.7 lladdr 02:00:00:00:00:07 dev eth0"
    with RtnetlinkEvents() as events, NeighbourEvents() as neighbours:
        events.read()
        host.ip(command)
        assert [bytes((2, 0, 0, 0, 0, 7))] == [one.mac for one in neighbours.read() or ()]
        assert not select.select([events], [], [], 0)[0]  # a flood of ARP wakes nobody else


def test_of_a_neighbour_that_was_deleted_nothing_is_left(host):
    """The kernel tells of it as it was until then."""
    with NeighbourEvents() as events:
        host.ip("neigh replace 192.168.50.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent")
        (told,) = events._datagrams()  # noqa: SLF001 -- to make another of it
        assert told is not None
        (found,) = neighbours_untrusted(told[:4] + RTM_DELNEIGH.to_bytes(2, sys.byteorder) + told[6:])
        assert Neighbour(host.link(UPLINK).index, ip_address("192.168.50.7"), None, 0) == found


def test_our_own_requests_are_not_heard(rtnetlink, eth0):
    with RtnetlinkEvents(ignore_port=rtnetlink.port) as events:
        rtnetlink.replace_route(Route(ip_network("10.9.0.0/16"), TABLE, eth0, scope=SCOPE_LINK))
        rtnetlink.add_rule(Rule(4, 75, fwmark=0x7501, iif="lo", table=TABLE, protocol=ROUTE_PROTOCOL))
        assert [] == events.read()


def test_lost_events_are_told(host, rtnetlink, eth0):
    with RtnetlinkEvents() as events:
        with socket.socket(fileno=os.dup(events.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(50):
            rtnetlink.replace_route(Route(ip_network((0x0B000000 + (number << 8), 24)), TABLE, eth0, scope=SCOPE_LINK))

        assert Event(Change.OVERRUN) in events.read()
        assert [] == events.read()


def test_so_are_lost_neighbours(host):
    with NeighbourEvents() as events:
        with socket.socket(fileno=os.dup(events.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(10, 60):
            host.ip(f"neigh add 192.168.50.{number} lladdr 02:00:00:00:00:07 dev eth0")

        assert events.read() is None
        assert [] == events.read()


def test_a_neighbour_that_cannot_be_understood_counts_as_lost(host, monkeypatch):
    cut = message(RTM_NEWNEIGH, 0, 0, bytes(3))
    with NeighbourEvents() as events:
        monkeypatch.setattr(events, "_datagrams", lambda: iter([cut]))
        assert events.read() is None


def test_the_sockets_are_not_inherited():
    with own_namespace(), Rtnetlink(), RtnetlinkEvents() as events:
        assert not os.get_inheritable(events.fileno())
        assert not os.get_blocking(events.fileno())


def test_a_kernel_without_ipv6_is_asked_for_ipv4_alone(host, rtnetlink, monkeypatch):
    monkeypatch.setattr(rtnetlink_module, "IPV6_SWITCH", Path("/proc/sys/net/ipv6/conf/none/disable_ipv6"))
    now = rtnetlink.snapshot()

    assert (False, False) == (now.ipv6, now.ipv6_enabled)
    assert {4} == {one.family for one in (*now.addresses, *now.routes, *now.rules)}
    assert not [one for one in rtnetlink.neighbours() if one.address.version == 6]


def test_what_is_lost_is_named(host):
    with RtnetlinkEvents() as events:

        def losses():
            return {event.loss for event in events.read() if event.loss is not None}

        host.ip("link add lost type bridge")
        index = host.link("lost").index
        host.ip("link set lost up")
        host.ip("address add 192.0.2.1/24 dev lost")
        losses()
        host.ip("address del 192.0.2.1/24 dev lost")
        assert {Loss(index, ip_address("192.0.2.1"))} == losses()
        host.ip("link set lost down")
        assert Loss(index) in losses()
        host.ip("link delete lost")
        assert {Loss(index)} == losses()


def test_a_port_that_leaves_its_bridge_is_not_lost(host):
    host.ip("link add bridge0 type bridge")
    host.ip(f"link set {UPLINK} master bridge0")
    with RtnetlinkEvents() as events:
        host.ip(f"link set {UPLINK} nomaster")
        found = events.read()

        assert Change.LINK in {event.change for event in found}
        assert Loss(host.link(UPLINK).index) not in {event.loss for event in found}
