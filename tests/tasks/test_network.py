"""The host's network changes under the daemon: sides close and open, flows end or go on."""

from ipaddress import ip_address

import pytest

from tests.fakes.network import a_world, until
from tests.hosts import FAR4, FAR6, HOST4, LAN4, ROUTER4, ROUTER6, TUN4, TUNNEL, UPLINK
from tunsplit.tasks import network as network_module

pytestmark = pytest.mark.netns


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
