"""The host's network changes under the daemon: sides close and open, flows end or go on."""

import gc
import logging
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import pytest
import trio
import trio.testing

from tests.fakes.devices import nat, opened
from tests.hosts import FAR4, FAR6, HOST4, LAN4, ROUTER4, ROUTER6, SETTINGS, TUN, TUN4, TUNNEL, UPLINK, open_host
from tunsplit.errors import KernelError
from tunsplit.host import Neighbour, NeighbourState
from tunsplit.kernel import nft
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.packet import PacketSocket
from tunsplit.kernel.rtnetlink import Change, Event, Rtnetlink, RtnetlinkEvents
from tunsplit.tasks import network as network_module
from tunsplit.tasks.network import Network

pytestmark = pytest.mark.netns

FLOW = f"{TUN4}:5000 > {FAR4}:53"


@pytest.fixture
def host():
    with open_host() as made:
        yield made


class World:
    """The network task's half of a daemon on a real host."""

    def __init__(self, rtnetlink, events, tun_mtu=None):
        self.nat = nat()
        self.changes = 0
        self.opened: list[str] = []
        self.nursery: trio.Nursery
        self.host_config = HostConfig(rtnetlink)
        self.network = Network(
            SETTINGS,
            tun=TUN,
            tun_addresses=(),
            tun_mtu=tun_mtu,
            nat=self.nat,
            rtnetlink=rtnetlink,
            events=events,
            host_config=self.host_config,
            protocols=frozenset(),
        )
        self.network.on_change = self._changed
        self.network.on_device = lambda device: self.opened.append(device.side)

    def _changed(self):
        self.changes += 1

    def way(self, side, destination=FAR4) -> Any:
        address = ip_address(destination)
        return self.network.way(side, address.version, address.packed)

    def flow(self, side="uplink", text=FLOW, port=50000):
        return opened(self.nat, text, self.way(side), port=port)

    async def watch(self):
        """Start to follow changes, and catch up with what was there before."""
        self.nursery.start_soon(self.network.watch)
        await trio.testing.wait_all_tasks_blocked(0.02)
        await until(lambda: not self.network.failure)


@asynccontextmanager
async def a_world(**settings):
    with Rtnetlink() as rtnetlink, RtnetlinkEvents(ignore_port=rtnetlink.port) as events:
        world = World(rtnetlink, events, **settings)
        try:
            world.network.refresh()
            async with trio.open_nursery() as nursery:
                world.nursery = nursery
                yield world
                nursery.cancel_scope.cancel()
        finally:
            world.network.close()
            world.host_config.release()


async def until(condition):
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 -- the kernel sets no trio.Event
            await trio.sleep(0.005)


# Ways


async def test_each_side_has_its_ways(host):
    async with a_world() as world:
        uplink, tunnel = world.way("uplink"), world.way("tunnel")

        assert (ip_address(ROUTER4), ip_address(HOST4).packed) == (uplink.next_hop.address, uplink.source)
        assert (b"", ip_address("10.64.0.2").packed) == (tunnel.next_hop.ethernet, tunnel.source)
        assert {"uplink", "tunnel"} == set(world.opened)


async def test_ipv6_has_them_too(host):
    async with a_world() as world:
        assert ip_address(ROUTER6) == world.way("uplink", FAR6).next_hop.address
        assert ip_address("fd64::2").packed == world.way("tunnel", FAR6).source


async def test_what_is_on_link_is_its_own_next_hop(host):
    async with a_world() as world:
        assert ip_address(LAN4) == world.way("uplink", LAN4).next_hop.address


async def test_a_way_is_looked_up_once(host):
    async with a_world() as world:
        assert world.way("uplink") is world.way("uplink")


async def test_only_so_many_are_remembered(host, monkeypatch):
    monkeypatch.setattr(network_module, "MOST_WAYS", 2)
    async with a_world() as world:
        first = world.way("uplink")
        for last in range(2, 4):
            world.way("uplink", f"198.51.100.{last}")

        assert first is not world.way("uplink")


async def test_an_address_of_another_device_is_no_source(host):
    host.ip(f"route replace default via {ROUTER4} src 10.64.0.2")
    async with a_world() as world:
        assert world.way("uplink") is None


async def test_the_tun_s_neighbour_signs_our_errors(host):
    async with a_world() as world:
        assert ip_address("10.128.0.2").packed == world.network.own_router(4)
        assert world.network.own_router(5) is None


# Changes


async def test_a_side_that_goes_down_is_closed_and_its_flows_end(host):
    async with a_world() as world:
        await world.watch()
        flow, other = world.flow(), world.flow("tunnel", f"{TUN4}:5001 > {FAR4}:53", 50001)
        host.ip(f"link set {UPLINK} down")
        await until(lambda: len(world.network.devices()) == 1)

        assert (None, [other]) == (world.way("uplink"), list(world.nat))
        assert "refused" == flow.state.value


async def test_it_opens_again_when_it_is_back(host):
    async with a_world() as world:
        await world.watch()
        host.ip(f"link set {UPLINK} down")
        await until(lambda: world.way("uplink") is None)
        host.ip(f"link set {UPLINK} up")
        host.ip(f"route add default via {ROUTER4}")
        await until(lambda: world.way("uplink"))

        assert 2 == len(world.network.devices())


async def test_a_tunnel_may_come_later(host):
    host.ip(f"link set {TUNNEL} down")
    async with a_world() as world:
        await world.watch()
        assert world.way("tunnel") is None

        host.ip(f"link set {TUNNEL} up")
        await until(lambda: world.way("tunnel"))


async def test_a_flow_whose_address_is_gone_ends(host):
    async with a_world() as world:
        await world.watch()
        world.flow()
        host.ip(f"address del {HOST4}/24 dev {UPLINK}")
        host.ip(f"address add 192.168.50.9/24 dev {UPLINK}")
        host.ip(f"route add default via {ROUTER4}")
        await until(lambda: (way := world.way("uplink")) and way.source == ip_address("192.168.50.9").packed)

        assert 0 == len(world.nat)


async def test_a_flow_whose_address_is_kept_goes_on(host):
    async with a_world() as world:
        await world.watch()
        flow = world.flow()
        host.ip(f"address add 192.168.50.9/24 dev {UPLINK}")
        host.ip(f"route replace default via {ROUTER4} src 192.168.50.9")
        await until(lambda: (way := world.way("uplink")) and way.source == ip_address("192.168.50.9").packed)

        assert [flow] == list(world.nat)


async def test_a_flow_takes_the_new_gateway(host):
    async with a_world() as world:
        await world.watch()
        flow = world.flow()
        host.ip(f"route replace default via {LAN4}")
        await until(lambda: flow.original.next_hop.address == ip_address(LAN4))

        assert flow.reply.next_hop is flow.original.next_hop


async def test_an_event_that_changes_nothing_leaves_flows_and_ways_alone(host, monkeypatch):
    async with a_world() as world:
        await world.watch()
        await until(lambda: world.changes)
        world.network.refresh()  # our own changes are in the picture from now on
        way, changes = world.way("uplink"), world.changes
        read = []
        refresh = world.network.refresh
        monkeypatch.setattr(world.network, "refresh", lambda: read.append(refresh()))
        host.ip(f"address change {HOST4}/24 dev {UPLINK} valid_lft 1000 preferred_lft 900")
        await until(lambda: read)

        assert changes == world.changes
        assert way is world.way("uplink")


async def test_an_mtu_is_followed_without_closing_the_side(host):
    async with a_world() as world:
        await world.watch()
        (uplink,) = [device for device in world.network.devices() if device.side == "uplink"]
        host.ip(f"link set {UPLINK} mtu 1300")
        await until(lambda: uplink.mtu == 1300)

        assert (False, False) == (uplink.narrow, uplink.closed)


async def test_a_wider_tun_than_a_side_has_its_packets_measured(host):
    async with a_world(tun_mtu=1450) as world:
        assert {"uplink": False, "tunnel": True} == {one.side: one.narrow for one in world.network.devices()}


async def test_a_device_with_another_mac_is_opened_anew(host):
    async with a_world() as world:
        await world.watch()
        before = {device.side: device for device in world.network.devices()}
        host.ip(f"link set {UPLINK} address 02:00:00:00:00:77")
        await until(lambda: before["uplink"].closed and len(world.network.devices()) == 2)

        assert not before["tunnel"].closed


# Failures


async def test_steering_that_fails_closes_both_sides_and_is_tried_again(host, monkeypatch, caplog):
    monkeypatch.setattr(network_module, "RETRY_S", 0.02)
    async with a_world() as world:
        await world.watch()
        world.flow()
        apply = world.host_config.apply

        def fail(_):
            raise KernelError("nft: no")

        monkeypatch.setattr(world.host_config, "apply", fail)
        host.ip(f"route add 203.0.113.0/24 via {ROUTER4}")
        await until(lambda: world.network.failure == "nft: no")
        assert ([], 0, None) == (world.network.devices(), len(world.nat), world.way("tunnel"))
        await trio.sleep(0.1)

        monkeypatch.setattr(world.host_config, "apply", apply)
        await until(lambda: world.way("uplink") and world.way("tunnel"))

        assert world.network.failure is None
        assert 1 == len([record for record in caplog.records if record.levelno == logging.ERROR])


async def test_at_the_start_it_is_an_error(host, monkeypatch):
    monkeypatch.setattr(HostConfig, "apply", lambda *_: (_ for _ in ()).throw(KernelError("nft: no")))
    with pytest.raises(KernelError, match="nft: no"):
        async with a_world():
            pass


async def test_a_tun_that_is_gone_closes_both_sides(host):
    async with a_world() as world:
        await world.watch()
        host.ip(f"link delete {TUN}")
        await until(lambda: world.network.failure)

        assert (f"{TUN} is gone", []) == (world.network.failure, world.network.devices())


async def test_a_device_that_cannot_be_opened_is_tried_again(host, monkeypatch):
    monkeypatch.setattr(network_module, "RETRY_S", 0.02)
    failures = iter([True, True])

    def unwilling(*arguments, **others):
        if next(failures, False):
            raise KernelError("too many files")
        return PacketSocket(*arguments, **others)

    monkeypatch.setattr(network_module, "PacketSocket", unwilling)
    async with a_world() as world:
        assert [] == world.network.devices()
        await world.watch()
        await until(lambda: len(world.network.devices()) == 2)

        assert world.way("uplink")


async def test_a_way_that_the_kernel_does_not_tell_ends_its_flow(host, monkeypatch):
    async with a_world() as world:
        flow = world.flow()
        monkeypatch.setattr(
            world.network._rtnetlink,  # noqa: SLF001 -- no other way in
            "route_get",
            lambda *_, **__: (_ for _ in ()).throw(KernelError("no memory")),
        )
        host.ip(f"route add 203.0.113.0/24 via {ROUTER4}")
        world.network.refresh()

        assert "refused" == flow.state.value


async def test_a_flushed_ruleset_is_put_back(host):
    async with a_world() as world:
        await world.watch()
        nft.run("flush", "ruleset")
        world.network.restore()
        await until(lambda: nft.listing())


async def test_also_if_that_was_seen_while_nobody_waited(host):
    async with a_world() as world:
        nft.run("flush", "ruleset")
        world.network.restore()
        world.nursery.start_soon(world.network.watch)
        await until(lambda: nft.listing())


# Neighbours


async def test_the_kernel_s_answer_reaches_the_next_hop(host):
    async with a_world() as world:
        await world.watch()
        hop = world.way("uplink").next_hop
        await until(lambda: hop.ethernet)

        with host.at_router(), Rtnetlink() as rtnetlink:
            router = rtnetlink.snapshot().link("toh")
        assert router
        assert router.mac == hop.ethernet[:6]


async def test_neighbours_are_confirmed_as_long_as_we_send_to_them(host, monkeypatch):
    monkeypatch.setattr(network_module, "CONFIRM_S", 0.01)
    monkeypatch.setattr(network_module, "CONFIRM_BATCH", 1)
    async with a_world() as world:
        flow = world.flow()
        asked = []
        monkeypatch.setattr(
            world.network._rtnetlink,  # noqa: SLF001 -- no other way in
            "neighbour_use",
            lambda _, address: asked.append(address),
        )
        world.nursery.start_soon(world.network.confirm_neighbours)
        await until(lambda: len(asked) > 2)

        assert {flow.original.next_hop.address} == set(asked)


async def test_a_question_that_the_kernel_refuses_is_told(host):
    async with a_world() as world:
        assert world.network._resolve(999, ip_address(ROUTER4)) is False  # noqa: SLF001 -- no other way in


async def test_after_lost_events_the_whole_table_is_read(host, monkeypatch):
    async with a_world() as world:
        hop = world.way("uplink").next_hop
        monkeypatch.setattr(world.network._events, "read", lambda: [Event(Change.OVERRUN)])  # noqa: SLF001 -- no other way in
        with monkeypatch.context() as patch:
            patch.setattr(
                world.network._rtnetlink,  # noqa: SLF001 -- no other way in
                "neighbours",
                lambda index: [Neighbour(index, ip_address(ROUTER4), bytes(6), NeighbourState.REACHABLE)],
            )
            assert world.network._read_events()  # noqa: SLF001 -- no other way in
        assert bytes(6) == hop.ethernet[:6]


async def test_events_that_cannot_be_read_count_as_lost(host, monkeypatch, caplog):
    def fail(*_):
        raise KernelError("no memory")

    async with a_world() as world:
        monkeypatch.setattr(world.network._events, "read", fail)  # noqa: SLF001 -- no other way in
        with monkeypatch.context() as patch:
            patch.setattr(world.network._rtnetlink, "neighbours", fail)  # noqa: SLF001 -- no other way in
            assert world.network._read_events()  # noqa: SLF001 -- no other way in
        assert 2 == len(caplog.records)


async def test_next_hops_go_with_their_flows(host):
    async with a_world() as world:
        world.way("uplink")
        (uplink,) = [device for device in world.network.devices() if device.side == "uplink"]
        assert [ip_address(ROUTER4)] == uplink.next_hops()

        host.ip(f"route replace default via {LAN4}")
        world.network.refresh()
        gc.collect()

        assert [] == uplink.next_hops()
