"""Follows the host's network: keeps steering in force, opens and closes the sides' devices, finds ways.

Theory of operation. Every change of links, addresses, routes or rules, whoever made it, leads to a new
picture, a new plan, and the difference being applied. Then each flow is looked at again: it goes on if the
kernel would still send it by the same device with the same address, its next hop renewed; else it ends.
Events that change nothing (a lifetime renewed) leave ways and flows alone. While steering cannot be applied
there are no ways: nothing passes on either side.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from ipaddress import ip_address

import trio

from tunsplit.engine.direction import destination_of, source_of
from tunsplit.engine.flow import Flow, FlowEvent
from tunsplit.engine.nat import Nat, Way
from tunsplit.engine.sides import SideFacts, Sides, choose_tun_addresses, find_sides
from tunsplit.engine.steering import SteeringSettings, plan
from tunsplit.errors import KernelError, TunsplitError
from tunsplit.host import FAMILIES, HostPlan, IPAddress, IPInterface, Link, Snapshot, TunFacts
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.packet import PacketSocket
from tunsplit.kernel.rtnetlink import Change, Event, Rtnetlink, RtnetlinkEvents
from tunsplit.names import MARK_TUNNEL, MARK_UPLINK, NAT_FIRST
from tunsplit.tasks.side import SideDevice

SETTLE_S = 0.005  # changes come in bursts
REST = 4  # times as long as a change took nothing is done about the next: packets have four fifths of the time
CONFIRM_S = 15.0  # half of the kernel's base_reachable_time
CONFIRM_BATCH = 64  # ≈ 0.3 ms
RETRY_S = 1.0  # after steering could not be applied, or a device not be opened
MOST_WAYS = 16_384
MARKS = {"tunnel": MARK_TUNNEL, "uplink": MARK_UPLINK}

logger = logging.getLogger(__name__)

Pump = Callable[[SideDevice], object]


class Network:
    """The host's network as the daemon needs it."""

    def __init__(
        self,
        settings: SteeringSettings,
        *,
        tun: str,
        tun_addresses: tuple[IPInterface, ...],
        tun_mtu: int | None,
        nat: Nat,
        rtnetlink: Rtnetlink,
        events: RtnetlinkEvents,
        host_config: HostConfig,
        protocols: frozenset[int],
    ) -> None:
        """`tun_addresses` and `tun_mtu` as configured: empty and None are chosen here."""
        self._settings = settings
        self._tun = tun
        self._tun_addresses = tun_addresses
        self._tun_mtu = tun_mtu
        self._nat = nat
        self._rtnetlink = rtnetlink
        self._events = events
        self._host_config = host_config
        self._protocols = protocols
        self._ways: dict[tuple[str, bytes], Way | None] = {}
        self._devices: dict[tuple[str, int], SideDevice] = {}
        self._complete = False  # every device of a side is open
        self._flushed = False  # somebody took our nft table away
        self._nap = trio.CancelScope()
        self.sides = Sides()
        self.snapshot = Snapshot()
        self.failure: str | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.on_gateway: Callable[[], None] = lambda: None
        self.on_device: Callable[[SideDevice], None] = lambda _: None
        self.on_close: Callable[[SideDevice], None] = lambda _: None
        self.too_big: Callable[..., None] = lambda *_: None
        self.unreachable: Callable[..., None] = lambda *_: None

    # Ways

    def way(self, side: str, version: int, destination: bytes) -> Way | None:
        """How packets to `destination` leave by this side; None: not at all."""
        key = (side, destination)
        if key in self._ways:
            return self._ways[key]
        if len(self._ways) >= MOST_WAYS:
            self._ways.clear()
        way = self._ways[key] = self._find_way(side, version, destination)
        return way

    def _find_way(self, side: str, version: int, destination: bytes) -> Way | None:
        facts = self.facts(side, version)
        if facts is None or (device := self._devices.get((side, facts.link.index))) is None:
            return None
        address = ip_address(destination)
        # By the mark's table alone, without naming the device: for IPv4 the kernel would make a destination that has no
        # route an on-link one (net/ipv4/route.c, ip_route_output_key_hash_rcu), and ARP would name it on the wire.
        hop = self._rtnetlink.route_get(address, mark=MARKS[side])
        if hop is None or hop.oif != facts.link.index or hop.source is None:
            return None
        if not any(own.ip == hop.source for own in facts.addresses):
            return None  # both sides are strong hosts: only an address of the side itself
        return Way(side, device, device.next_hop(hop.gateway or address, version), hop.source.packed)

    def facts(self, side: str, version: int) -> SideFacts | None:
        """What is known of a side's device for this IP version, if it is up for it."""
        return self.sides.tunnel_of(version) if side == "tunnel" else self.sides.uplink(version)

    @property
    def tunnel_up(self) -> bool:
        """Whether the tunnel can be used, with any IP version."""
        return any(self.sides.tunnel_of(version) for version in FAMILIES)

    def is_address_of(self, device: Hashable, address: bytes) -> bool:
        """Whether the address is one of this device's own."""
        wanted = ip_address(address)
        return isinstance(device, SideDevice) and any(
            one.interface.ip == wanted for one in self.snapshot.addresses_of(device.link)
        )

    def mac_of(self, index: int, address: IPAddress) -> bytes | None:
        """The Ethernet address of a neighbour on one of the sides' devices, as far as the kernel knows it."""
        return next((one.mac_of(address) for (_, own), one in self._devices.items() if own == index), None)

    def own_router(self, version: int) -> bytes | None:
        """Who signs our ICMP errors: the address after the tun's own, where a point-to-point peer would be.

        None where the tun has no address of this IP version.
        """
        for interface in self._tun_addresses:
            if interface.version == version:
                return (interface.ip + 1).packed
        return None

    def own_address(self, version: int) -> bytes | None:
        """The tun's own address of this IP version; None where it has none."""
        for interface in self._tun_addresses:
            if interface.version == version:
                return interface.ip.packed
        return None

    # Changes

    def refresh(self) -> None:
        """Bring steering, devices, ways and flows in line with the network as it is now.

        Raises:
            TunsplitError: steering could not be applied (completely). Both sides are closed.
        """
        before = self.snapshot
        standing = self._complete and self.failure is None
        try:
            try:
                wanted, changed = self._bring_in_line()
            except KernelError as error:
                # The picture may be out of date already: a device that goes down takes its routes with it.
                logger.info("steering is applied once more", extra={"error": str(error)})
                wanted, changed = self._bring_in_line()[0], True
            if standing and not changed and self.snapshot == before:
                return
            self._update_devices(wanted.tun_mtu)
            self.failure = None
        except TunsplitError as error:
            self.failure = str(error)
            self.sides = Sides()
            self._update_devices(0)
            self._look_again()
            raise
        self._look_again()

    def _bring_in_line(self) -> tuple[HostPlan, bool]:
        """Take a picture and apply what it calls for; give the plan, and whether anything had to be changed."""
        self.snapshot = self._rtnetlink.snapshot()
        if not self._tun_addresses:
            self._tun_addresses = choose_tun_addresses(self.snapshot, tun=self._tun)
        link = self.snapshot.link(self._tun)
        if link is None:
            raise KernelError(f"{self._tun} is gone")
        self.sides = find_sides(
            self.snapshot, tunnel=self._settings.tunnel, uplink=self._settings.uplink, tun=self._tun
        )
        wanted = plan(self._settings, self.snapshot, self.sides, TunFacts(link, self._tun_addresses))
        if self._tun_mtu is not None:
            wanted = replace(wanted, tun_mtu=self._tun_mtu)
        return wanted, self._host_config.apply(wanted)

    def _look_again(self) -> None:
        self._ways.clear()
        self._update_flows()
        self.on_change()

    def steer(self, settings: SteeringSettings) -> None:
        """Steer by other settings from now on.

        Raises:
            TunsplitError: they could not be applied (completely). Both sides are closed.
        """
        if settings != self._settings:
            self._settings = settings
            self.refresh()

    def restore(self) -> None:
        """Our nft table is gone, of which no event tells: put it back, at once."""
        self._flushed = True
        self._nap.cancel()

    def _update_devices(self, tun_mtu: int) -> None:
        self._complete = True
        wanted: dict[tuple[str, int], Link] = {}
        for facts in self.sides.uplinks:
            wanted["uplink", facts.link.index] = facts.link
        if self.sides.tunnel is not None:
            wanted["tunnel", self.sides.tunnel.link.index] = self.sides.tunnel.link
        for key, device in list(self._devices.items()):
            link = wanted.get(key)
            if link is None or (link.name, link.mac, link.is_layer2) != (
                device.link.name,
                device.link.mac,
                device.link.is_layer2,
            ):
                self._close_device(key)
        for key, link in wanted.items():
            if key not in self._devices:
                self._open_device(key, link)
            opened = self._devices.get(key)
            self._complete = self._complete and opened is not None
            if opened is not None:
                opened.mtu = link.mtu
                opened.narrow = link.mtu < tun_mtu

    def _open_device(self, key: tuple[str, int], link: Link) -> None:
        try:
            socket = PacketSocket(link.name, ethernet=link.is_layer2, first_port=NAT_FIRST, protocols=self._protocols)
        except KernelError as error:  # it vanished in this very moment, or there is no room for it now
            logger.warning("a device cannot be opened", extra={"device": link.name, "error": str(error)})
            return
        device = self._devices[key] = SideDevice(
            key[0],
            link,
            socket,
            resolve=self._resolve,
            too_big=self.too_big,
            unreachable=self.unreachable,
        )
        device.neighbours(self._rtnetlink.neighbours(link.index))
        logger.info("side opened", extra={"side": key[0], "device": link.name})
        self.on_device(device)

    def _close_device(self, key: tuple[str, int]) -> None:
        device = self._devices.pop(key)
        for flow in self._nat.flows_of([device]):
            self._nat.end(flow, FlowEvent.BLOCK, trio.current_time())
        self._nat.forget_device(device)
        self.on_close(device)
        device.close()
        logger.info("side closed", extra={"side": key[0], "device": device.link.name})

    def _update_flows(self) -> None:
        """End the flows that lost their way; renew the next hop of the others."""
        now = trio.current_time()
        for flow in self._nat:
            if not isinstance(flow.original.device, SideDevice):
                continue  # it comes to us, wherever the sides are
            try:
                way = self.way(flow.side, 4 if len(flow.key) == 12 else 6, destination_of(flow.key))
            except KernelError as error:
                logger.error("a way cannot be found", extra={"error": str(error)})
                way = None
            if way is None or way.device is not flow.original.device or not self._keeps_address(flow, way):
                self._nat.end(flow, FlowEvent.BLOCK, now)
            else:
                flow.original.next_hop = flow.reply.next_hop = way.next_hop

    def _keeps_address(self, flow: Flow, way: Way) -> bool:
        # A flow goes on with its own address while the device has it, also when new flows would get another one
        # (a temporary IPv6 address that has been replaced).
        return self.is_address_of(way.device, source_of(flow.outside))

    def _resolve(self, index: int, address: IPAddress) -> bool:
        try:
            self._rtnetlink.neighbour_use(index, address)
        except KernelError as error:  # the device is going away, or the kernel's table is full
            logger.debug("a neighbour cannot be asked for", extra={"address": str(address), "error": str(error)})
            return False
        return True

    async def watch(self) -> None:
        """Follow changes until cancelled."""
        while True:
            with trio.CancelScope() as self._nap:
                if self.failure or not self._complete:
                    self._nap.deadline = trio.current_time() + RETRY_S
                if not self._flushed:
                    await trio.lowlevel.wait_readable(self._events.fileno())
            if self._read_events() or self._flushed or self.failure or not self._complete:
                await trio.sleep(SETTLE_S)
                self._read_events()
                self._flushed = False
                began = trio.current_time()
                self._follow()
                await trio.sleep(REST * (trio.current_time() - began))

    def _follow(self) -> None:
        known = self.failure
        try:
            self.refresh()
        except TunsplitError as error:
            if str(error) != known:
                logger.error("steering cannot be applied: both sides are closed", extra={"error": str(error)})

    def _read_events(self) -> bool:
        """Hand neighbours on; whether anything else has changed."""
        changed = False
        try:
            events = self._events.read()
        except KernelError as error:
            logger.error("events are lost", extra={"error": str(error)})
            events = [Event(Change.OVERRUN)]
        for event in events:
            if event.neighbour is not None:
                for (_, index), device in self._devices.items():
                    if index == event.neighbour.index:
                        device.neighbour_changed(event.neighbour)
                if event.neighbour.address in self._gateways():
                    self.on_gateway()
            else:
                changed = True
        if any(event.change is Change.OVERRUN for event in events):
            self._reread_neighbours()
        return changed

    def _gateways(self) -> set[IPAddress | None]:
        return {facts.gateway(version) for facts in self.sides.uplinks for version in FAMILIES}

    def _reread_neighbours(self) -> None:
        try:
            for (_, index), device in self._devices.items():
                device.neighbours(self._rtnetlink.neighbours(index))
        except KernelError as error:
            logger.error("neighbours cannot be read", extra={"error": str(error)})

    async def confirm_neighbours(self) -> None:
        """Keep the neighbours that we send to confirmed, until cancelled.

        The kernel sees none of our frames, so it would never ask by itself.
        """
        while True:
            await trio.sleep(CONFIRM_S)
            for device in self.devices():
                for number, address in enumerate(device.next_hops(), 1):
                    self._resolve(device.link.index, address)
                    if number % CONFIRM_BATCH == 0:
                        await trio.lowlevel.checkpoint()

    def devices(self) -> list[SideDevice]:
        """The sides' open devices."""
        return list(self._devices.values())

    def close(self) -> None:
        """Close all devices."""
        for key in list(self._devices):
            self._close_device(key)
