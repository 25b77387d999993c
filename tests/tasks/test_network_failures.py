"""What the network task does when a step fails, and what it asks of neighbours."""

import gc
import logging
from ipaddress import ip_address

import pytest
import trio
import trio.testing

from tests.fakes.network import a_world, until
from tests.hosts import LAN4, ROUTER4, TUN
from tunsplit.errors import KernelError
from tunsplit.host import Neighbour, NeighbourState
from tunsplit.kernel import nft
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.packet import PacketSocket
from tunsplit.kernel.rtnetlink import Change, Event, Rtnetlink
from tunsplit.tasks import network as network_module

pytestmark = pytest.mark.netns


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
