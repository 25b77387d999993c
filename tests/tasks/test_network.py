"""The host's network changes under the daemon: sides close and open, flows end or go on."""

from ipaddress import ip_address

import pytest

from tests.craft import UDP, ends
from tests.fakes.network import a_world, until
from tests.hosts import FAR4, FAR6, HOST4, HOST6, LAN4, ROUTER4, ROUTER6, TUN4, TUNNEL, UPLINK
from tunsplit.engine.paths import UNLIMITED
from tunsplit.names import TABLE_UPLINK
from tunsplit.tasks import ways

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


async def test_a_gateway_that_does_not_answer_is_still_the_way(host):
    async with a_world() as world:
        host.ip(f"-6 neighbour replace {ROUTER6} dev {UPLINK} nud failed")
        assert ip_address(ROUTER6) == world.way("uplink", FAR6).next_hop.address


async def test_what_is_on_link_is_its_own_next_hop(host):
    async with a_world() as world:
        assert ip_address(LAN4) == world.way("uplink", LAN4).next_hop.address


async def test_a_way_is_looked_up_once(host):
    async with a_world() as world:
        assert world.way("uplink") is world.way("uplink")


async def test_only_so_many_are_remembered(host, monkeypatch):
    monkeypatch.setattr(ways, "MOST_WAYS", 2)
    async with a_world() as world:
        first = world.way("uplink")
        for last in range(2, 4):
            world.way("uplink", f"198.51.100.{last}")

        assert first is not world.way("uplink")


async def test_an_address_of_another_device_is_no_source(host):
    host.ip(f"route replace default via {ROUTER4} src 10.64.0.2")
    async with a_world() as world:
        assert world.way("uplink") is None


async def test_others_may_ask_for_this_host_at_all_addresses_of_its_sides(host):
    async with a_world() as world:
        addresses = {
            version: {str(ip_address(one)) for one in world.network.own_addresses(version)} for version in (4, 6)
        }
        assert {4: {HOST4, "10.64.0.2"}, 6: {HOST6, "fd64::2"}} == addresses


async def test_the_tun_s_neighbour_signs_our_errors(host):
    async with a_world() as world:
        assert ip_address("10.128.0.2").packed == world.network.own_router(4)
        assert world.network.own_router(5) is None
        assert ip_address("10.128.0.1").packed == world.network.own_address(4)
        assert world.network.own_address(5) is None


# Changes


async def test_a_side_that_goes_down_is_closed_and_its_flows_end(host):
    async with a_world() as world:
        await world.watch()
        flow, other = world.flow(), world.flow("tunnel", f"{TUN4}:5001 > {FAR4}:53", 50001)
        host.ip(f"link set {UPLINK} down")
        await until(lambda: len(world.network.devices.all()) == 1)

        assert (None, [other]) == (world.way("uplink"), list(world.nat))
        assert "refused" == flow.state.value


async def test_a_flow_ends_with_the_address_that_its_app_sends_from(host):
    """Nothing that comes back would reach the app. What a route makes local is an address like any other."""
    host.ip(f"address add 192.168.50.3/24 dev {UPLINK}")
    host.ip("route add local 198.18.0.0/15 dev lo")
    async with a_world() as world:
        bound = world.flow("tunnel", f"192.168.50.3:5001 > {FAR4}:443", 50001)
        routed = world.flow("tunnel", f"198.18.0.1:5001 > {FAR4}:443", 50002)
        world.network.refresh()
        assert [bound, routed] == list(world.nat)

        host.ip(f"address delete 192.168.50.3/24 dev {UPLINK}")
        world.network.refresh()
        assert [routed] == list(world.nat)


async def test_a_guest_s_address_is_none_of_this_host_s(host):
    async with a_world() as world:
        guest = world.nat.open(
            UDP, ends(f"172.17.0.2:5001 > {FAR4}:443").key, world.way("tunnel"), None, 0.0, reason="", forwarded=True
        )
        host.ip(f"address add 192.168.50.3/24 dev {UPLINK}")
        world.network.refresh()
        assert [guest] == list(world.nat)


async def test_a_loss_is_told_at_once(host):
    """Before the picture: what would answer with a lost address has to know."""
    async with a_world() as world:
        told = []
        world.network.on_loss = lambda: told.append(len(world.network.snapshot.addresses))
        before = len(world.network.snapshot.addresses)
        host.ip(f"address delete {HOST4}/24 dev {UPLINK}")
        await until(lambda: world.network.hear() or told)
        assert before == told[0]


async def test_it_opens_again_when_it_is_back(host):
    async with a_world() as world:
        await world.watch()
        host.ip(f"link set {UPLINK} down")
        await until(lambda: world.way("uplink") is None)
        host.ip(f"link set {UPLINK} up")
        host.ip(f"route add default via {ROUTER4}")
        await until(lambda: world.way("uplink"))

        assert 2 == len(world.network.devices.all())


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


async def test_it_ends_also_if_nobody_has_heard_that_it_is_gone(host):
    """Events were lost: there is a way, but not from this address."""
    async with a_world() as world:
        world.flow()
        host.ip(f"address del {HOST4}/24 dev {UPLINK}")
        host.ip(f"address add 192.168.50.9/24 dev {UPLINK}")
        host.ip(f"route add default via {ROUTER4}")
        world.network.refresh()
        assert world.way("uplink")
        assert [] == list(world.nat)


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
        (uplink,) = [device for device in world.network.devices.all() if device.side == "uplink"]
        host.ip(f"link set {UPLINK} mtu 1300")
        await until(lambda: uplink.paths.mtu == 1300)

        assert (UNLIMITED, False) == (uplink.narrowest, uplink.closed)


async def test_a_wider_tun_than_a_side_has_its_packets_measured(host):
    async with a_world(tun_mtu=1450) as world:
        narrowest = {one.side: one.narrowest for one in world.network.devices.all()}
        assert {"uplink": UNLIMITED, "tunnel": 1420} == narrowest


async def test_a_device_with_another_mac_says_so_from_then_on(host):
    """A bridge takes the lowest of its ports'."""
    async with a_world() as world:
        await world.watch()
        flow = world.flow()
        await until(lambda: flow.original.next_hop.ethernet)
        host.ip(f"link set {UPLINK} address 02:00:00:00:00:77")
        await until(lambda: flow.original.next_hop.ethernet[6:12] == bytes.fromhex("020000000077"))

        assert flow.passes


async def test_a_device_that_only_looks_the_same_is_another_one(host):
    """Removed, and made anew with its name, index and Ethernet address."""
    async with a_world() as world:
        await world.watch()
        (before,) = [device for device in world.network.devices.all() if device.side == "uplink"]
        link = before.link
        host.ip(f"link delete {UPLINK}")
        host.ip(f"link add {UPLINK} index {link.index} address {link.mac.hex(':')} type veth peer name far")
        host.ip("link set far up")
        host.ip(f"link set {UPLINK} up")
        host.ip(f"address add {HOST4}/24 dev {UPLINK}")
        host.ip(f"route add default via {ROUTER4}")
        await until(lambda: world.way("uplink"))

        assert (True, True) == (before.closed, world.way("uplink").device.socket.is_bound())


async def test_a_flow_pauses_while_there_is_no_route(host):
    """It is there, with its address, and goes on as soon as there is one: another connection would, too."""
    async with a_world() as world:
        await world.watch()
        flow = world.flow()
        host.ip("route delete default")
        await until(lambda: flow.original.next_hop.address is None)
        assert (None, True) == (world.way("uplink"), flow.passes)

        host.ip(f"route add default via {LAN4}")
        await until(lambda: flow.original.next_hop.address == ip_address(LAN4))


async def test_a_flow_needs_no_source_but_its_own(host):
    """The kernel's choice for new ones may be younger than the picture, or another device's."""
    async with a_world() as world:
        await world.watch()
        flow = world.flow()
        host.ip(f"route replace default via {LAN4} src 10.64.0.2")
        await until(lambda: flow.original.next_hop.address == ip_address(LAN4))

        assert (None, True) == (world.way("uplink"), flow.passes)


async def test_an_address_that_is_younger_than_the_picture_is_a_source(host):
    """The route that a router advertisement brings comes first."""
    async with a_world() as world:
        host.ip(f"address add 192.168.50.9/24 dev {UPLINK}")
        host.ip(f"route replace default via {ROUTER4} src 192.168.50.9 table {TABLE_UPLINK}")

        assert ip_address("192.168.50.9").packed == world.way("uplink").source


async def test_what_is_gone_is_given_up_before_the_next_packet(host):
    """Also if the task that follows changes has not had its turn."""
    async with a_world() as world:
        world.network.hear()
        flow = world.flow()
        host.ip(f"address delete {HOST4}/24 dev {UPLINK}")
        assert flow.passes
        world.network.hear()

        assert not flow.passes


async def test_what_was_heard_so_is_followed(host):
    async with a_world() as world:
        await world.watch()
        flow = world.flow()
        host.ip(f"route replace default via {LAN4}")
        world.network.hear()
        await until(lambda: flow.original.next_hop.address == ip_address(LAN4))


async def test_without_an_address_of_its_ip_version_it_ends(host):
    async with a_world() as world:
        await world.watch()
        flow = world.flow()
        host.ip(f"address delete {HOST4}/24 dev {UPLINK}")
        await until(lambda: not flow.passes)


async def test_the_uplink_stays_what_it_was_while_no_route_says_otherwise(host):
    host.ip("link add dum0 type veth peer name dum1")
    host.ip("link set dum0 up")
    host.ip("address add 192.168.77.2/24 dev dum0")
    async with a_world() as world:
        await world.watch()
        host.ip("route replace default via 192.168.77.1 dev dum0")
        await until(lambda: world.network.sides.uplink4.link.name == "dum0")
        host.ip("route delete default")
        await until(lambda: world.network.sides.uplink4.gateway4 is None)

        assert "dum0" == world.network.sides.uplink4.link.name


async def test_whom_both_ends_have_closed_need_not_be_told_but_whom_somebody_has_reset(host):
    async with a_world() as world:
        closed, reset = world.flow(), world.flow("uplink", f"{TUN4}:5001 > {FAR4}:53", 50001)
        closed.closed_ways = 3
        for flow in closed, reset:
            world.nat.close(flow)
        host.ip(f"link set {UPLINK} down")
        world.network.refresh()

        assert ([reset], 0) == (world.ended, len(world.nat))
