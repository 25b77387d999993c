"""What the network task does when a step fails."""

import logging
from ipaddress import ip_address
from socket import if_nametoindex

import pytest
import trio
import trio.testing

from tests.fakes.devices import TCP, opened
from tests.fakes.network import a_world, until
from tests.hosts import FAR4, FORWARDED, HOST4, ROUTER4, TUN, TUN4, TUN6, UPLINK
from tunsplit.engine.rewrites import Way
from tunsplit.errors import KernelError
from tunsplit.kernel import nft
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.packet import PacketSocket
from tunsplit.kernel.rtnetlink import Change, Event, Loss
from tunsplit.tasks import devices
from tunsplit.tasks import network as network_module

pytestmark = pytest.mark.netns


def fail(*_):
    raise KernelError("no memory")


# Failures


async def test_steering_that_fails_closes_both_sides_and_is_tried_again(host, monkeypatch, caplog):
    monkeypatch.setattr(network_module, "RETRY_S", 0.02)
    async with a_world() as world:
        await world.watch()
        world.flow()
        apply = world.host_config.apply

        def fail(*_):
            raise KernelError("nft: no")

        monkeypatch.setattr(world.host_config, "apply", fail)
        host.ip(f"route add 203.0.113.0/24 via {ROUTER4}")
        await until(lambda: world.network.failure == "nft: no")
        assert ([], 0, None) == (world.network.devices.all(), len(world.nat), world.way("tunnel"))
        await trio.sleep(0.1)

        monkeypatch.setattr(world.host_config, "apply", apply)
        await until(lambda: world.way("uplink") and world.way("tunnel"))

        assert world.network.failure is None
        assert 1 == len([record for record in caplog.records if record.levelno == logging.ERROR])


async def test_a_mistake_of_ours_closes_both_sides_and_is_tried_again(host, monkeypatch, caplog):
    """L21: a network that is half understood is no network."""
    monkeypatch.setattr(network_module, "RETRY_S", 0.02)
    async with a_world() as world:
        await world.watch()
        world.flow()
        with monkeypatch.context() as patch:
            patch.setattr(network_module, "find_sides", lambda *_, **__: 1 // 0)
            host.ip(f"route add 203.0.113.0/24 via {ROUTER4}")
            await until(lambda: world.network.failure)
            assert str(world.network.failure).startswith("ZeroDivisionError: ")
            assert ([], 0, None) == (world.network.devices.all(), len(world.nat), world.way("tunnel"))
        await until(lambda: world.way("uplink") and world.way("tunnel"))

        assert world.network.failure is None
        assert any(record.exc_info for record in caplog.records)


async def test_sides_that_somebody_else_has_closed_open_again_without_any_news(host, monkeypatch):
    """After a mistake over news heard before a batch (app.py): the watch waits for the next, and none comes."""
    monkeypatch.setattr(network_module, "RETRY_S", 0.02)
    async with a_world() as world:
        await world.watch()
        await trio.testing.wait_all_tasks_blocked(0.1)
        world.network.close_sides("what has happened is not known")
        assert (None, None) == (world.way("uplink"), world.way("tunnel"))
        await until(lambda: world.way("uplink") and world.way("tunnel"))

        assert world.network.failure is None


async def test_at_the_start_it_is_an_error(host, monkeypatch):
    monkeypatch.setattr(HostConfig, "apply", lambda *_: (_ for _ in ()).throw(KernelError("nft: no")))
    with pytest.raises(KernelError, match="nft: no"):
        async with a_world():
            pass


async def test_a_tun_that_cannot_be_made_anew_closes_both_sides(host):
    async with a_world() as world:
        await world.watch()
        host.ip(f"link delete {TUN}")
        await until(lambda: world.network.failure)

        assert (f"{TUN} is gone", []) == (world.network.failure, world.network.devices.all())


@pytest.mark.parametrize("way", ["delete", "rename"])
async def test_a_tun_that_is_taken_away_is_made_anew_and_flows_go_on(host, way):
    def renew():
        host.ip(f"tuntap add {TUN} mode tun")
        world.tun.index = if_nametoindex(TUN)

    async with a_world() as world:
        await world.watch()
        flow = world.flow()
        world.tun.renew = renew
        told = []
        world.network.on_tun = lambda tun: told.append(tun.index)
        if way == "delete":
            host.ip(f"link delete {TUN}")
        else:
            host.ip(f"link set {TUN} down")
            host.ip(f"link set {TUN} name other")
        await until(lambda: told)
        world.network.refresh()

        assert ([world.tun.index], None, [flow]) == (told, world.network.failure, list(world.nat))
        assert {ip_address(TUN4), ip_address(TUN6)} <= {
            one.interface.ip for one in world.network.snapshot.addresses_of(host.link(TUN))
        }


async def test_so_is_that_of_forwarded_packets(host):
    def renew():
        host.ip(f"tuntap add {FORWARDED} mode tun")
        world.forwarded.index = if_nametoindex(FORWARDED)

    async with a_world() as world:
        await world.watch()
        world.forwarded.renew = renew
        told: list[object] = []
        world.network.on_tun = told.append
        host.ip(f"link delete {FORWARDED}")
        await until(lambda: told)
        world.network.refresh()

        assert ([world.forwarded], None) == (told, world.network.failure)
        assert 2 == len(world.network.snapshot.addresses_of(host.link(FORWARDED)))


async def test_what_our_own_end_is_bound_to_the_tun_for_ends_with_it(host):
    """Questions over TCP; those over UDP have no end of ours."""

    def renew():
        host.ip(f"tuntap add {TUN} mode tun")
        world.tun.index = if_nametoindex(TUN)

    async with a_world() as world:
        way = Way("tunnel", object(), None, ip_address(TUN4).packed)
        ours = opened(world.nat, f"{TUN4}:5000 > 192.0.2.1:53", way, protocol=TCP)
        other = opened(world.nat, f"{TUN4}:5000 > 192.0.2.1:53", way, port=50001)
        world.tun.renew = renew
        host.ip(f"link delete {TUN}")
        world.network.refresh()

        assert ([ours], [other]) == (world.ended, list(world.nat))


async def test_a_tun_that_goes_at_once_again_is_gone(host):
    async with a_world() as world:
        world.tun.renew = lambda: None
        host.ip(f"link delete {TUN}")
        with pytest.raises(KernelError, match=f"{TUN} is gone"):
            world.network.refresh()


async def test_a_device_that_cannot_be_opened_is_tried_again(host, monkeypatch):
    monkeypatch.setattr(network_module, "RETRY_S", 0.02)
    failures = iter([True, True])

    def unwilling(*arguments, **others):
        if next(failures, False):
            raise KernelError("too many files")
        return PacketSocket(*arguments, **others)

    monkeypatch.setattr(devices, "PacketSocket", unwilling)
    async with a_world() as world:
        assert [] == world.network.devices.all()
        await world.watch()
        await until(lambda: len(world.network.devices.all()) == 2)

        assert world.way("uplink")


@pytest.mark.parametrize(("question", "source"), [("route_get", TUN4), ("is_local", "192.168.50.3")])
async def test_what_the_kernel_does_not_tell_ends_the_flow(host, monkeypatch, question, source):
    """Its way, or whether its app's address is there still."""
    async with a_world() as world:
        flow = world.flow("uplink", f"{source}:5000 > {FAR4}:53", 50000)
        monkeypatch.setattr(
            world.network._rtnetlink,  # noqa: SLF001 -- no other way in
            question,
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


async def test_an_address_that_cannot_be_looked_for_is_lost(host, monkeypatch, caplog):
    async with a_world() as world:
        flow = world.flow()
        loss = Loss(if_nametoindex(UPLINK), ip_address(HOST4))
        with monkeypatch.context() as patch:
            patch.setattr(world.network._rtnetlink, "addresses", fail)  # noqa: SLF001 -- no other way in
            patch.setattr(world.network._events, "read", lambda: [Event(Change.ADDRESS, loss=loss)])  # noqa: SLF001 -- no other way in
            world.network._read_events()  # noqa: SLF001 -- no other way in

        assert [flow] == world.ended
        assert ["what is lost cannot be looked for"] == [record.message for record in caplog.records]


async def test_events_that_cannot_be_read_count_as_lost(host, monkeypatch, caplog):
    async with a_world() as world:
        monkeypatch.setattr(world.network._events, "read", fail)  # noqa: SLF001 -- no other way in
        world.network._read_events()  # noqa: SLF001 -- no other way in
        assert ["events are lost"] == [record.message for record in caplog.records]
        assert world.network._changed  # noqa: SLF001 -- no other way in
