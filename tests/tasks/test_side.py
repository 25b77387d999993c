"""How translated packets leave by a device, and to which neighbour."""

import errno
import gc
from dataclasses import replace

import pytest

from tests.craft import tcp, udp
from tests.fakes.devices import (
    ETH0,
    FAR4,
    HOST4,
    OTHER_MAC,
    OWN_MAC,
    ROUTER4,
    ROUTER6,
    ROUTER_MAC,
    TCP,
    TUN4,
    Side,
    opened,
)
from tests.tasks.sidestage import FLOW, GSO_TCP4, IPV4, OUTSIDE, header, original, send
from tunsplit.engine.flow import FlowEvent
from tunsplit.host import Neighbour, NeighbourState
from tunsplit.tasks import side as side_module
from tunsplit.tasks.side import NOWHERE
from tunsplit.wire import vnet

# Neighbours


def test_the_kernel_is_asked_for_a_next_hop_at_once(uplink):
    uplink.way()

    assert [ROUTER4] == uplink.asked


def test_packets_wait_for_their_neighbour_and_leave_in_order(uplink, table):
    rewrite = original(table, uplink)
    packets = [udp(OUTSIDE, b"%d" % number) for number in range(3)]
    for packet in packets:
        send(uplink, rewrite, packet)
    assert [] == uplink.socket.frames

    uplink.neighbour(ROUTER4, ROUTER_MAC)

    assert packets == uplink.socket.packets
    assert {ROUTER_MAC + IPV4} == {frame[10:24] for frame in uplink.socket.frames}


def test_a_known_neighbour_costs_no_wait(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)

    send(uplink, original(table, uplink), udp(OUTSIDE))

    assert 1 == len(uplink.socket.frames)


def test_a_gateway_that_moves_takes_all_its_flows_along(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    rewrite = original(table, uplink)

    uplink.neighbour(ROUTER4, OTHER_MAC)
    send(uplink, rewrite, udp(OUTSIDE))

    assert OTHER_MAC == uplink.socket.frames[0][10:16]


def test_a_neighbour_that_the_kernel_forgets_is_used_on_and_asked_for_again(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    rewrite = original(table, uplink)
    uplink.asked.clear()

    uplink.neighbour(ROUTER4, None, NeighbourState.NONE)
    send(uplink, rewrite, udp(OUTSIDE))

    assert 1 == len(uplink.socket.frames)
    assert [ROUTER4] == uplink.asked


def test_a_device_with_another_address_says_so_to_all(uplink, table):
    """A bridge takes the lowest of its ports'."""
    uplink.neighbour(ROUTER4, ROUTER_MAC)
    known, unknown = original(table, uplink), uplink.way(ROUTER6, version=6)

    uplink.device.moved(replace(uplink.device.link, mac=OTHER_MAC))
    send(uplink, known, udp(OUTSIDE))
    uplink.neighbour(ROUTER6, ROUTER_MAC)

    assert ROUTER_MAC + OTHER_MAC == uplink.socket.frames[0][10:22]
    assert ROUTER_MAC + OTHER_MAC == unknown.next_hop.ethernet[:12]


def test_a_flow_without_a_route_waits_for_nobody(uplink, table):
    rewrite = original(table, uplink)
    rewrite.next_hop = NOWHERE
    send(uplink, rewrite, udp(OUTSIDE))

    assert ([udp(OUTSIDE)], []) == (uplink.no_way, uplink.socket.frames)
    assert [ROUTER4] == uplink.asked


def test_only_where_frames_have_addresses_a_flow_may_pause(uplink, tunnel):
    assert (True, False) == (uplink.device.can_pause, tunnel.device.can_pause)


def test_an_entry_that_is_deleted_while_we_wait_for_it_is_asked_for_again(uplink, table):
    send(uplink, original(table, uplink), udp(OUTSIDE))
    uplink.asked.clear()

    uplink.neighbour(ROUTER4, None, NeighbourState.NONE)

    assert [ROUTER4] == uplink.asked


def test_an_entry_that_cannot_be_asked_for_again_is_given_up(uplink, table):
    send(uplink, original(table, uplink), udp(OUTSIDE))
    uplink.answers = False

    uplink.neighbour(ROUTER4, None, NeighbourState.NONE)

    assert [udp(OUTSIDE)] == uplink.unreachable


def test_the_app_is_told_that_nobody_answers(uplink, table):
    rewrite = original(table, uplink)
    send(uplink, rewrite, udp(OUTSIDE, b"1"))
    send(uplink, rewrite, udp(OUTSIDE, b"2"))

    uplink.neighbour(ROUTER4, None, NeighbourState.FAILED)

    assert [udp(OUTSIDE, b"1"), udp(OUTSIDE, b"2")] == uplink.unreachable
    assert 2 == uplink.device.counters["neighbour_failed"]


def test_after_a_failure_the_next_packet_asks_again(uplink, table):
    rewrite = original(table, uplink)
    uplink.neighbour(ROUTER4, None, NeighbourState.FAILED)
    uplink.asked.clear()

    send(uplink, rewrite, udp(OUTSIDE))
    send(uplink, rewrite, udp(OUTSIDE))

    assert [ROUTER4] == uplink.asked


def test_a_full_neighbour_table_is_told_to_the_app_at_once(uplink, table):
    rewrite = original(table, uplink)
    uplink.answers = False

    send(uplink, rewrite, udp(OUTSIDE))

    assert [udp(OUTSIDE)] == uplink.unreachable
    assert 1 == uplink.device.counters["neighbour_refused"]


def test_only_so_many_packets_wait_for_one_neighbour(uplink, table):
    rewrite = original(table, uplink)
    for _ in range(side_module.MOST_WAITING + 3):
        send(uplink, rewrite, udp(OUTSIDE))

    uplink.neighbour(ROUTER4, ROUTER_MAC)

    assert side_module.MOST_WAITING == len(uplink.socket.frames)
    assert 3 == uplink.device.counters["neighbour_queue_full"]


def test_only_so_many_bytes_wait_for_all_neighbours(uplink, table, monkeypatch):
    monkeypatch.setattr(side_module, "MOST_WAITING_OCTETS", 100)
    rewrite = original(table, uplink)
    send(uplink, rewrite, udp(OUTSIDE, bytes(60)))
    send(uplink, rewrite, udp(OUTSIDE, bytes(60)))

    uplink.neighbour(ROUTER4, ROUTER_MAC)
    uplink.device.next_hop(ROUTER4, 4).ethernet = None
    send(uplink, rewrite, udp(OUTSIDE, b"room again"))
    uplink.neighbour(ROUTER4, ROUTER_MAC)

    assert [udp(OUTSIDE, bytes(60)), udp(OUTSIDE, b"room again")] == uplink.socket.packets


def test_a_flow_that_ended_while_it_waited_does_not_leave(uplink, table):
    rewrite = original(table, uplink)
    send(uplink, rewrite, udp(OUTSIDE))
    table.end(rewrite.flow, FlowEvent.BLOCK, 1.0)

    uplink.neighbour(ROUTER4, ROUTER_MAC)

    assert [] == uplink.socket.frames


def test_ipv4_goes_by_an_ipv6_gateway_as_ipv4(uplink, table):
    rewrite = opened(table, FLOW, uplink.way(ROUTER6)).original
    uplink.way(ROUTER6, version=6)
    send(uplink, rewrite, udp(OUTSIDE))

    uplink.neighbour(ROUTER6, ROUTER_MAC)

    assert ROUTER_MAC + IPV4 == uplink.socket.frames[0][10:24]


def test_a_next_hop_lives_as_long_as_a_flow_goes_by_it(uplink, table):
    flow = opened(table, FLOW, uplink.way())
    for last in range(3, 200):
        uplink.way(ROUTER4 + last)
    assert [ROUTER4] == uplink.device.next_hops()

    table.end(flow, FlowEvent.TIMEOUT, 1.0)
    table.expire(1000.0)
    del flow
    gc.collect()

    assert [] == uplink.device.next_hops()


def test_lost_events_are_made_up_for_by_the_whole_table(uplink, table):
    waiting = opened(table, FLOW, uplink.way())
    send(uplink, waiting.original, udp(OUTSIDE))
    other = ROUTER4 + 8
    nobody = opened(table, f"{TUN4}:1 > {FAR4}:2", uplink.way(other), port=50001)
    send(uplink, nobody.original, udp(f"{HOST4}:50001 > {FAR4}:2"))
    uplink.asked.clear()

    uplink.device.neighbours([Neighbour(2, ROUTER4, ROUTER_MAC, NeighbourState.STALE)])

    assert [udp(OUTSIDE)] == uplink.socket.packets
    assert [other] == uplink.asked


def test_a_tunnel_has_no_neighbours(tunnel, table):
    send(tunnel, original(table, tunnel), udp(OUTSIDE))

    assert [vnet.NONE + udp(OUTSIDE)] == tunnel.socket.frames
    assert ([], []) == (tunnel.asked, tunnel.device.next_hops())


# Virtio headers


def test_offsets_move_by_the_ethernet_header(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)

    send(uplink, original(table, uplink), tcp(OUTSIDE), header(GSO_TCP4, 1000))

    assert header(GSO_TCP4, 1000, start=34, length=54) == uplink.socket.frames[0][:10]


def test_what_is_finished_has_no_offsets_to_move(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)

    send(uplink, original(table, uplink), udp(OUTSIDE))

    assert vnet.NONE == uplink.socket.frames[0][:10]


def test_a_tunnel_gets_them_as_they_are(tunnel, table):
    send(tunnel, original(table, tunnel), tcp(OUTSIDE), header(GSO_TCP4, 1000))

    assert header(GSO_TCP4, 1000) == tunnel.socket.frames[0][:10]


def test_an_absurd_offset_costs_one_packet(uplink, table):
    uplink.neighbour(ROUTER4, ROUTER_MAC)

    send(uplink, original(table, uplink), tcp(OUTSIDE), header(GSO_TCP4, 1000, start=65530))

    assert [] == uplink.socket.frames
    assert 1 == uplink.device.counters["send_malformed"]


# Errors


@pytest.mark.parametrize("name", ["uplink", "tunnel"])
def test_a_send_that_fails_is_a_packet_lost_and_counted(name, uplink, tunnel, table):
    side = {"uplink": uplink, "tunnel": tunnel}[name]
    side.neighbour(ROUTER4, ROUTER_MAC)
    side.socket.errno = errno.ENOBUFS

    send(side, opened(table, FLOW, side.way(), protocol=TCP).original, tcp(OUTSIDE))

    assert {"received": 0, "receive_drops": 0, f"send_{errno.ENOBUFS}": 1} == side.device.statistics()


def test_a_device_without_arp_is_its_own_neighbours_address(table):
    """net/ipv4/arp.c, arp_constructor; a veth that is used as a tunnel."""
    side = Side("tunnel", replace(ETH0, is_noarp=True))
    flow = opened(table, FLOW, side.way())
    send(side, flow.original, udp(FLOW))

    assert OWN_MAC + OWN_MAC == side.socket.frames[0][vnet.SIZE :][:12]
    side.close()
