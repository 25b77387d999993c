"""The network task on a real host, without the rest of a daemon."""

import io
from contextlib import asynccontextmanager
from ipaddress import ip_address
from socket import if_nametoindex
from typing import Any

import trio
import trio.testing

from tests.fakes.devices import nat, opened
from tests.fakes.judges import as_real
from tests.hosts import FAR4, FORWARDED, SETTINGS, TUN, TUN4, open_tun
from tunsplit.errors import KernelError
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.rtnetlink import NeighbourEvents, Rtnetlink, RtnetlinkEvents
from tunsplit.tasks.network import Network
from tunsplit.tasks.tuns import Tuns

FLOW = f"{TUN4}:5000 > {FAR4}:53"


class OwnTun:
    """A tun of the host's as ours; who takes it away has to say what it is made anew of."""

    def __init__(self, name):
        self.name = name
        self.index = if_nametoindex(name)
        self.renew = self._give_up

    def _give_up(self):
        raise KernelError(f"{self.name} is gone")


class World:
    """The network task's half of a daemon on a real host."""

    def __init__(self, rtnetlink, events, neighbours, tun_mtu=None):
        self.nat = nat()
        self.changes = 0
        self.opened: list[str] = []
        self.ended: list[Any] = []
        self.tun, self.forwarded = OwnTun(TUN), OwnTun(FORWARDED)
        self.nursery: trio.Nursery
        self.host_config = HostConfig(rtnetlink)
        self.network = Network(
            SETTINGS,
            tuns=Tuns(as_real(self.tun), as_real(self.forwarded)),
            tun_addresses=(),
            tun_mtu=tun_mtu,
            nat=self.nat,
            rtnetlink=rtnetlink,
            events=events,
            neighbours=neighbours,
            host_config=self.host_config,
            protocols=frozenset(),
        )
        self.network.on_change = self._changed
        self.network.on_end = self.ended.append
        self.network.devices.on_device = lambda device: self.opened.append(device.side)

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
        self.nursery.start_soon(self.network.devices.neighbours.watch)
        await trio.testing.wait_all_tasks_blocked(0.02)
        await until(lambda: not self.network.failure)


@asynccontextmanager
async def a_world(**settings):
    with (
        io.FileIO(open_tun(FORWARDED)),  # it goes with its descriptor
        Rtnetlink() as rtnetlink,
        RtnetlinkEvents(ignore_port=rtnetlink.port) as events,
        NeighbourEvents() as neighbours,
    ):
        world = World(rtnetlink, events, neighbours, **settings)
        try:
            world.network.refresh()
            async with trio.open_nursery() as nursery:
                world.nursery = nursery
                yield world
                nursery.cancel_scope.cancel()
        finally:
            world.network.devices.close()
            world.host_config.release()


async def until(condition):
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 -- the kernel sets no trio.Event
            await trio.sleep(0.005)
