"""The kernel's neighbour table, for the devices of the sides.

The kernel sees none of our frames, so it would confirm no neighbour by itself: it is asked to, now and then.
"""

import logging
from collections.abc import Callable, Iterable

import trio

from tunsplit.errors import KernelError
from tunsplit.host import IPAddress, Neighbour
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.tasks.side import SideDevice

CONFIRM_S = 15.0  # half of the kernel's base_reachable_time
CONFIRM_BATCH = 64  # ≈ 0.3 ms

logger = logging.getLogger(__name__)


class Neighbours:
    """Asks the kernel for neighbours, and hands on what it says; `devices` gives the open ones."""

    def __init__(self, rtnetlink: Rtnetlink, devices: Callable[[], Iterable[SideDevice]]) -> None:
        self._rtnetlink = rtnetlink
        self._devices = devices

    def resolve(self, index: int, address: IPAddress) -> bool:
        """Ask for a neighbour on the device with this index; whether the kernel took the question."""
        try:
            self._rtnetlink.neighbour_use(index, address)
        except KernelError as error:  # the device is going away, or the kernel's table is full
            logger.debug("a neighbour cannot be asked for", extra={"address": str(address), "error": str(error)})
            return False
        return True

    def changed(self, neighbour: Neighbour) -> None:
        """The kernel's table says something new."""
        for device in self._devices():
            if device.link.index == neighbour.index:
                device.neighbour_changed(neighbour)

    def read(self, device: SideDevice) -> None:
        """Take over all that the kernel's table says of a device's neighbours.

        Raises:
            KernelError: it cannot be read.
        """
        device.neighbours(self._rtnetlink.neighbours(device.link.index))

    def read_again(self) -> None:
        """The same for all devices, since events were lost."""
        try:
            for device in self._devices():
                self.read(device)
        except KernelError as error:
            logger.error("neighbours cannot be read", extra={"error": str(error)})

    async def confirm(self) -> None:
        """Keep the neighbours that we send to confirmed, until cancelled."""
        while True:
            await trio.sleep(CONFIRM_S)
            for device in self._devices():
                for number, address in enumerate(device.next_hops(), 1):
                    self.resolve(device.link.index, address)
                    if number % CONFIRM_BATCH == 0:
                        await trio.lowlevel.checkpoint()
