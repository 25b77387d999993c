"""The kernel's neighbour table, for the devices of the sides.

The kernel sees none of our frames, so it would confirm no neighbour by itself: it is asked to, now and then.

It tells of each ARP request that names its sender anew, so a flood of them is a flood of news, which has a tenth of our
time at most. When its queue is full, the whole table is read instead, which is small (gc_thresh3, 1024).
"""

import logging
import time
from collections.abc import Callable, Iterable

import trio

from tunsplit.errors import KernelError
from tunsplit.host import IPAddress
from tunsplit.kernel.rtnetlink import NeighbourEvents, Rtnetlink
from tunsplit.tasks.side import SideDevice

CONFIRM_S = 15.0  # half of the kernel's base_reachable_time
CONFIRM_BATCH = 64  # ≈ 0.3 ms
RETRY_S = 1.0
REST = 9  # times as long as it took to take in what is new

logger = logging.getLogger(__name__)


class Neighbours:
    """Asks the kernel for neighbours, and hands on what it says; `devices` gives the open ones."""

    def __init__(
        self, rtnetlink: Rtnetlink, events: NeighbourEvents, devices: Callable[[], Iterable[SideDevice]]
    ) -> None:
        self._rtnetlink = rtnetlink
        self._events = events
        self._devices = devices
        self.on_change: Callable[[set[IPAddress]], None] = lambda _: None  # of these neighbours

    def resolve(self, index: int, address: IPAddress) -> bool:
        """Ask for a neighbour on the device with this index; whether the kernel took the question."""
        try:
            self._rtnetlink.neighbour_use(index, address)
        except KernelError as error:  # the device is going away, or the kernel's table is full
            logger.debug("a neighbour cannot be asked for", extra={"address": str(address), "error": str(error)})
            return False
        return True

    def read(self, device: SideDevice) -> None:
        """Take over all that the kernel's table says of a device's neighbours.

        Raises:
            KernelError: it cannot be read.
        """
        device.neighbours(self._rtnetlink.neighbours(device.link.index))

    async def watch(self) -> None:
        """Take in what the kernel's table says anew, until cancelled."""
        lost = False
        while True:
            if not lost:
                await trio.lowlevel.wait_readable(self._events.fileno())
            began = time.thread_time()
            try:
                self.take_in(lost=lost)
                lost = False
            except KernelError as error:
                if not lost:
                    logger.error("neighbours cannot be followed", extra={"error": str(error)})
                lost = True
                await trio.sleep(RETRY_S)
            await trio.sleep(REST * (time.thread_time() - began))

    def take_in(self, *, lost: bool = False) -> None:
        """The same, once; the whole table if something was lost before. Never blocks.

        Raises:
            KernelError: no news will come, or the table cannot be read.
        """
        devices = {device.link.index: device for device in self._devices()}
        found = self._events.read()
        if lost or found is None:
            for one in devices.values():
                self.read(one)
            self.on_change({address for one in devices.values() for address in one.next_hops()})
            return
        for neighbour in found:
            if (device := devices.get(neighbour.index)) is not None:
                device.neighbour_changed(neighbour)
        self.on_change({neighbour.address for neighbour in found})

    async def confirm(self) -> None:
        """Keep the neighbours that we send to confirmed, until cancelled."""
        while True:
            await trio.sleep(CONFIRM_S)
            for device in self._devices():
                for number, address in enumerate(device.next_hops(), 1):
                    self.resolve(device.link.index, address)
                    if number % CONFIRM_BATCH == 0:
                        await trio.lowlevel.checkpoint()
