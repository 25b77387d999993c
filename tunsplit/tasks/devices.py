"""The sides' devices: one packet socket each, opened and closed as the picture of the host's network says."""

import logging
from collections.abc import Callable

from tunsplit.engine.flow import Flow
from tunsplit.engine.nat import Nat
from tunsplit.engine.sides import Sides
from tunsplit.errors import KernelError
from tunsplit.host import Link
from tunsplit.kernel.packet import PacketSocket
from tunsplit.kernel.rtnetlink import NeighbourEvents, Rtnetlink
from tunsplit.names import NAT_FIRST
from tunsplit.tasks.neighbours import Neighbours
from tunsplit.tasks.side import SideDevice

Key = tuple[str, int]  # a side, and the index of a device

logger = logging.getLogger(__name__)


class Devices:
    """The open ones.

    `on_device` and `on_close` are told of each; `too_big`, `unreachable` and `no_way` are for packets that cannot go
    (`SideDevice`).
    """

    def __init__(
        self,
        nat: Nat,
        rtnetlink: Rtnetlink,
        neighbours: NeighbourEvents,
        protocols: frozenset[int],
        end: Callable[[Flow], None],
    ) -> None:
        """`end` gets the flows of a device that closes."""
        self._nat = nat
        self._protocols = protocols
        self._end = end
        self.open: dict[Key, SideDevice] = {}
        self.neighbours = Neighbours(rtnetlink, neighbours, self.all)
        self.complete = False  # every device that is wanted is open
        self.on_device: Callable[[SideDevice], None] = lambda _: None
        self.on_close: Callable[[SideDevice], None] = lambda _: None
        self.too_big: Callable[..., bool] = lambda *_: True
        self.unreachable: Callable[..., None] = lambda *_: None
        self.no_way: Callable[..., None] = lambda *_: None

    def all(self) -> list[SideDevice]:
        """All that are open."""
        return list(self.open.values())

    def update(self, sides: Sides, tun_mtu: int) -> None:
        """Have those of these sides open, and no other."""
        self.complete = True
        wanted: dict[Key, Link] = {("uplink", facts.link.index): facts.link for facts in sides.uplinks}
        if sides.tunnel is not None:
            wanted["tunnel", sides.tunnel.link.index] = sides.tunnel.link
        for key, device in list(self.open.items()):
            link = wanted.get(key)
            if link is None or not device.is_still(link):
                self.close_one(key)
            elif link.mac != device.link.mac:
                device.moved(link)
        for key, link in wanted.items():
            if key not in self.open:
                self._open(key, link)
            opened = self.open.get(key)
            self.complete = self.complete and opened is not None
            if opened is not None:
                opened.measure(link.mtu, tun_mtu)

    def _open(self, key: Key, link: Link) -> None:
        try:
            socket = PacketSocket(link.name, ethernet=link.is_layer2, first_port=NAT_FIRST, protocols=self._protocols)
        except KernelError as error:  # it vanished in this very moment, or there is no room for it now
            logger.warning("a device cannot be opened", extra={"device": link.name, "error": str(error)})
            return
        device = self.open[key] = SideDevice(
            key[0],
            link,
            socket,
            resolve=self.neighbours.resolve,
            too_big=self.too_big,
            unreachable=self.unreachable,
            no_way=self.no_way,
        )
        self.neighbours.read(device)
        logger.info("side opened", extra={"side": key[0], "device": link.name})
        self.on_device(device)

    def close_one(self, key: Key) -> None:
        """Close this one, and end its flows."""
        device = self.open.pop(key)
        for flow in self._nat.flows_of([device]):
            self._end(flow)
        self._nat.forget_device(device)
        self.on_close(device)
        device.close()
        logger.info("side closed", extra={"side": key[0], "device": device.link.name})

    def close(self) -> None:
        """Close all."""
        for key in list(self.open):
            self.close_one(key)
