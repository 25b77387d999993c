"""What is lost is given up with the event, before there is a new picture of the host."""

import pytest

from tests.fakes.network import a_world, until
from tests.hosts import FAR4, FAR6, HOST4, ROUTER4, TUN4, TUNNEL, UPLINK
from tunsplit.engine import steering
from tunsplit.tasks import network as network_module

pytestmark = pytest.mark.netns


async def test_what_we_have_done_ourselves_is_no_news(host, monkeypatch):
    plans = 0

    def counted(*given, **named):
        nonlocal plans
        plans += 1
        return steering.plan(*given, **named)

    monkeypatch.setattr(network_module, "plan", counted)
    async with a_world() as world:
        world.network.refresh()  # over a picture with all that the first look has put there
        assert (1, 1) == (plans, world.changes)

        host.ip("route flush table 7501")  # ours: put back, by the plan that holds
        world.network.refresh()
        assert (1, 2) == (plans, world.changes)

        host.ip(f"route add 203.0.113.0/24 via {ROUTER4}")
        world.network.refresh()
        assert (2, 3) == (plans, world.changes)


async def test_flows_end_with_the_event_before_there_is_a_new_picture(host, monkeypatch):
    async with a_world() as world:
        await world.watch()
        monkeypatch.setattr(world.network, "refresh", lambda: None)
        flow, other = world.flow(), world.flow("tunnel", f"{TUN4}:5001 > {FAR4}:53", 50001)
        host.ip(f"address del {HOST4}/24 dev {UPLINK}")
        await until(lambda: world.ended)

        assert ([flow], [other]) == (world.ended, list(world.nat))

        host.ip(f"link set {TUNNEL} down")
        await until(lambda: len(world.ended) == 2)

        assert ([flow, other], None) == (world.ended, world.way("tunnel"))
        assert ["uplink"] == [device.side for device in world.network.devices.all()]


async def test_an_address_that_stays_with_another_prefix_ends_nothing(host):
    async with a_world() as world:
        await world.watch()
        changes = world.changes
        flow = world.flow()
        host.ip(f"address add {HOST4}/25 dev {UPLINK}")
        host.ip(f"address del {HOST4}/24 dev {UPLINK}")
        host.ip(f"route replace default via {ROUTER4}")
        await until(lambda: world.changes > changes)

        assert ([flow], []) == (list(world.nat), world.ended)


async def test_what_is_back_before_anybody_looked_ends_nothing(host):
    async with a_world() as world:
        world.network.refresh()  # our own changes are in the picture from now on
        flow = world.flow("tunnel")
        before = world.changes
        host.ip(f"link set {TUNNEL} down")
        host.ip(f"link set {TUNNEL} up")
        host.ip(f"address replace fd64::2/128 dev {TUNNEL}")
        await world.watch()
        await until(lambda: world.changes > before and world.way("tunnel", FAR6))

        assert ([flow], 1) == (list(world.nat), world.opened.count("tunnel"))
