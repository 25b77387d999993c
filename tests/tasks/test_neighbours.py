"""What the daemon knows and asks of the kernel's table of neighbours."""

import gc
import itertools
import os
from ipaddress import ip_address
from types import SimpleNamespace

import pytest
import trio

from tests.fakes.network import a_world, until
from tests.hosts import LAN4, ROUTER4, ROUTER6, UPLINK
from tunsplit.errors import KernelError
from tunsplit.host import Neighbour, NeighbourState
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.tasks import neighbours

pytestmark = pytest.mark.netns

MAC = b"\2" * 6


def table(index=None):
    return [Neighbour(index, ip_address(ROUTER4), MAC, NeighbourState.REACHABLE)]


@pytest.fixture
async def world(host):
    async with a_world() as made:
        yield made


@pytest.fixture
def own(world):
    return world.network.devices.neighbours


@pytest.fixture
def hop(world):
    return world.way("uplink").next_hop


async def test_the_kernel_s_answer_reaches_the_next_hop(host, world, hop):
    await world.watch()
    await until(lambda: hop.ethernet)

    with host.at_router(), Rtnetlink() as rtnetlink:
        router = rtnetlink.snapshot().link("toh")
    assert router
    assert router.mac == hop.ethernet[:6]


async def test_neighbours_are_confirmed_as_long_as_we_send_to_them(world, own, monkeypatch):
    monkeypatch.setattr(neighbours, "CONFIRM_S", 0.01)
    monkeypatch.setattr(neighbours, "CONFIRM_BATCH", 1)
    flow = world.flow()
    asked = []
    monkeypatch.setattr(own, "resolve", lambda _, address: asked.append(address))
    world.nursery.start_soon(own.confirm)
    await until(lambda: len(asked) > 2)

    assert {flow.original.next_hop.address} == set(asked)


async def test_a_question_that_the_kernel_refuses_is_told(own):
    assert own.resolve(999, ip_address(ROUTER4)) is False


async def test_after_lost_events_the_whole_table_is_read(world, own, hop, monkeypatch):
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(own._events, "read", lambda: None)  # noqa: SLF001 -- no other way in
        patch.setattr(own._rtnetlink, "neighbours", table)  # noqa: SLF001 -- no other way in
        world.network.on_gateway = lambda: told.append(hop.ethernet[:6])
        own.take_in()
    assert [MAC] == told  # the gateway may be among them


@pytest.mark.parametrize("fails", ["events", "table"])
async def test_what_cannot_be_read_is_read_again_and_told_once(host, world, own, hop, monkeypatch, caplog, fails):
    monkeypatch.setattr(neighbours, "RETRY_S", 0.001)
    tries = itertools.count()

    def read(*_):
        if next(tries) < 3:
            raise KernelError("no memory")
        return table(*_) if fails == "table" else []

    with monkeypatch.context() as patch:
        patch.setattr(own._events, "read", read if fails == "events" else lambda: None)  # noqa: SLF001 -- no other way in
        patch.setattr(own._rtnetlink, "neighbours", read if fails == "table" else table)  # noqa: SLF001 -- no other way in
        world.nursery.start_soon(own.watch)
        host.ip(f"neighbour replace 192.168.50.9 lladdr 02:00:00:00:00:09 dev {UPLINK}")
        await until(lambda: hop.ethernet is not None and hop.ethernet[:6] == MAC)
    assert ["neighbours cannot be followed"] == [record.message for record in caplog.records]


async def test_a_gateway_that_changes_is_told_of_and_nobody_else(host, world, own):
    told = []
    world.network.on_gateway = lambda: told.append(1)
    for address, expected in (("192.168.50.9", []), (ROUTER4, [1]), (ROUTER6, [1])):
        own.take_in()
        told.clear()
        host.ip(f"neighbour replace {address} lladdr 02:00:00:00:00:09 dev {UPLINK}")
        own.take_in()
        assert expected == told, address


async def test_a_storm_of_news_has_a_tenth_of_the_time(own, monkeypatch, autojump_clock):
    """Anybody on the network can have the kernel tell of each ARP packet."""
    seconds, took_in = itertools.count(), []
    monkeypatch.setattr(neighbours, "time", SimpleNamespace(thread_time=lambda: next(seconds)))
    monkeypatch.setattr(own, "take_in", lambda **_: took_in.append(1))
    reader, writer = os.pipe()
    monkeypatch.setattr(own._events, "fileno", lambda: reader)  # noqa: SLF001 -- no other way in
    os.write(writer, b"never read")
    with trio.move_on_after(100):
        await own.watch()
    trio.lowlevel.notify_closing(reader)
    os.close(reader)
    os.close(writer)
    assert 12 == len(took_in)  # a second's work, nine of rest


async def test_next_hops_go_with_their_flows(host, world):
    world.way("uplink")
    (uplink,) = [device for device in world.network.devices.all() if device.side == "uplink"]
    assert [ip_address(ROUTER4)] == uplink.next_hops()

    host.ip(f"route replace default via {LAN4}")
    world.network.refresh()
    gc.collect()

    assert [] == uplink.next_hops()
