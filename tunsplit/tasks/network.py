"""Follows the host's network: keeps steering, the sides' devices, ways and flows in line with it.

Theory of operation. Every change of links, addresses, routes or rules, whoever made it, leads to a new
picture, a new plan, and the difference being applied. Then each flow is looked at again: it goes on if the
kernel would still send it by the same device with the same address, its next hop renewed; else it ends. Where only
the route is missing, since somebody changes it in two steps or there is none for the moment, it pauses.
Events that change nothing (a lifetime renewed, what we have done ourselves) leave plan, ways and flows alone. While
steering cannot be applied there are no ways: nothing passes on either side.

What an event takes away, a device or an address, is given up with the event, before the picture is taken: else flows
would go on with an address that is another's by now, and what apps send would vanish where it should be refused.
"""

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from ipaddress import ip_address

import trio

from tunsplit.engine.direction import source_of
from tunsplit.engine.flow import Flow, FlowEvent
from tunsplit.engine.nat import Nat
from tunsplit.engine.rewrites import Way
from tunsplit.engine.sides import SideFacts, Sides, beside, choose_tun_addresses, find_sides, of_others
from tunsplit.engine.steering import SteeringSettings, plan
from tunsplit.errors import KernelError, TunsplitError
from tunsplit.host import FAMILIES, HostPlan, IPAddress, IPInterface, IPNetwork, Link, Snapshot, TunFacts
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.rtnetlink import Change, Event, Loss, NeighbourEvents, Rtnetlink, RtnetlinkEvents
from tunsplit.kernel.tun import Tun
from tunsplit.names import TABLE_GUESTS
from tunsplit.tasks.devices import Devices
from tunsplit.tasks.pace import Pace
from tunsplit.tasks.side import SideDevice
from tunsplit.tasks.tuns import Tuns
from tunsplit.tasks.ways import Ways
from tunsplit.wire.ip import TCP

SETTLE_S = 0.001  # changes come in bursts
TRIES = 3
RETRY_S = 1.0  # after steering could not be applied, or a device not be opened

logger = logging.getLogger(__name__)


class Network:
    """The host's network as the daemon needs it."""

    def __init__(
        self,
        settings: SteeringSettings,
        *,
        tuns: Tuns,
        tun_addresses: tuple[IPInterface, ...],
        tun_mtu: int | None,
        nat: Nat,
        rtnetlink: Rtnetlink,
        events: RtnetlinkEvents,
        neighbours: NeighbourEvents,
        host_config: HostConfig,
        protocols: frozenset[int],
    ) -> None:
        """`tun_addresses` and `tun_mtu` as configured, chosen if empty."""
        self._settings = settings
        self._tuns = tuns
        self._tun_addresses = tun_addresses
        self._packed = _packed(tun_addresses)  # asked for once a flow
        self._tun_mtu = tun_mtu
        self._nat = nat
        self._rtnetlink = rtnetlink
        self._events = events
        self._host_config = host_config
        self._protocols = protocols
        self.guests: tuple[IPNetwork, ...] = ()
        self._own: dict[int, list[bytes]] = {}
        self.devices = Devices(nat, rtnetlink, neighbours, protocols, self._end)
        self.devices.neighbours.on_change = self._neighbours_changed
        self._tunnel_addresses: tuple[IPAddress, ...] = ()  # the latest of each IP version
        self._ways = Ways(rtnetlink, self.facts, self.devices.open)
        self._flushed = False  # somebody took our nft table away
        self._changed = False  # since the picture was taken
        self._lost = False  # so that there are fewer ways than the picture has
        self._seen: object = None  # what the plan was made of
        self._plan: HostPlan | None = None
        self._nap = trio.CancelScope()
        self.sides = Sides()
        self.snapshot = Snapshot()
        self.failure: str | None = None
        self.tun_mtu = 0
        self.on_change: Callable[[], None] = lambda: None
        self.on_gateway: Callable[[], None] = lambda: None
        self.on_tun: Callable[[Tun], None] = lambda _: None
        self.on_end: Callable[[Flow], None] = lambda _: None
        self.on_loss: Callable[[], None] = lambda: None

    def way(self, side: str, version: int, destination: bytes) -> Way | None:
        """How packets to `destination` leave by this side; None: not at all."""
        return self._ways.find(side, version, destination)

    def facts(self, side: str, version: int) -> SideFacts | None:
        """What is known of a side's device for this IP version, if it is up for it."""
        return self.sides.tunnel_of(version) if side == "tunnel" else self.sides.uplink(version)

    @property
    def tunnel(self) -> str:
        """The name of the tunnel's device, present or not."""
        return self._settings.tunnel

    @property
    def tunnel_up(self) -> bool:
        """Whether the tunnel can be used, with any IP version."""
        return any(self.sides.tunnel_of(version) for version in FAMILIES)

    def own_addresses(self, version: int) -> list[bytes]:
        """The packed addresses of all sides' devices, of this IP version: where others may ask for this host."""
        return self._own.get(version, [])

    def is_address_of(self, device: Hashable, address: bytes) -> bool:
        """Whether the address is one of this device's own."""
        wanted = ip_address(address)
        return isinstance(device, SideDevice) and any(
            one.interface.ip == wanted for one in self.snapshot.addresses_of(device.link)
        )

    def is_local(self, address: bytes) -> bool:
        """Whether an address is this host's, on whichever device.

        Raises:
            KernelError: the kernel gave no answer.
        """
        wanted = ip_address(address)
        return any(one.interface.ip == wanted for one in self.snapshot.addresses) or self._rtnetlink.is_local(wanted)

    def mac_of(self, index: int, address: IPAddress) -> bytes | None:
        """The Ethernet address of a neighbour on one of the sides' devices, as far as the kernel knows it."""
        return next((one.mac_of(address) for (_, own), one in self.devices.open.items() if own == index), None)

    def own_router(self, version: int) -> bytes | None:
        """Who signs our ICMP errors: the address after the tun's own, where a point-to-point peer would be.

        None where the tun has no address of this IP version.
        """
        return next(((one.ip + 1).packed for one in self._tun_addresses if one.version == version), None)

    def own_address(self, version: int) -> bytes | None:
        """The tun's own address of this IP version; None where it has none."""
        return self._packed.get(version)

    # Changes

    def refresh(self) -> None:
        """Bring steering, devices, ways and flows in line with the network as it is now.

        Raises:
            TunsplitError: steering could not be applied (completely). Both sides are closed.
        """
        standing = self.devices.complete and self.failure is None and not self._lost
        try:
            wanted, changed = self._bring_in_line(TRIES)
            if standing and not changed:
                return
            self._open(wanted.tun_mtu)
            self._lost = False
            self.failure = None
        except TunsplitError as error:
            self.close_sides(str(error))
            raise
        except Exception as error:
            self.close_sides(f"{type(error).__name__}: {error}")
            logger.exception("a mistake of ours: both sides are closed")
            raise KernelError(f"steering cannot be applied: {self.failure}") from error
        self._look_again()

    def close_sides(self, why: str) -> None:
        """Have no way on either side until steering could be applied again."""
        self.failure = why
        self.sides, self._seen = Sides(), None
        self._open(0)
        self._look_again()
        self._nap.cancel()

    def _bring_in_line(self, tries: int) -> tuple[HostPlan, bool]:
        """Take a picture and apply what it calls for; give the plan, and whether it is new or something was changed."""
        self.snapshot = self._rtnetlink.snapshot()
        links = self._find_tuns()
        seen = self._settings, [link.index for link in links], of_others(self.snapshot, self._tuns.names)
        known = self._plan if seen == self._seen else None
        wanted = known or self._make_plan(*links)
        try:
            changed = self._host_config.apply(wanted, self.snapshot) or known is None
        except KernelError as error:
            if tries == 1:
                raise
            # The picture may be out of date already: a device that goes down takes its routes with it.
            logger.info("steering is applied once more", extra={"error": str(error)})
            return self._bring_in_line(tries - 1)[0], True
        self._plan, self._seen = wanted, seen
        return wanted, changed

    def _make_plan(self, own: Link, forwarded: Link) -> HostPlan:
        """What the picture calls for, with these devices as the tuns."""
        if not self._tun_addresses:
            self._tun_addresses = choose_tun_addresses(self.snapshot, tuns=self._tuns.names)
            self._packed = _packed(self._tun_addresses)
        named = {"tunnel": self._settings.tunnel, "uplink": self._settings.uplink, "tun": self._tuns.own.name}
        self.sides = find_sides(self.snapshot, **named, before=self.sides)
        self._tunnel_addresses = self.sides.latest_of_tunnel(self._tunnel_addresses)
        tuns = TunFacts(own, self._tun_addresses), TunFacts(forwarded, beside(self._tun_addresses))
        wanted = plan(self._settings, self.snapshot, self.sides, *tuns, tunnel_addresses=self._tunnel_addresses)
        self.guests = tuple(route.destination for route in wanted.routes if route.table == TABLE_GUESTS)
        return wanted if self._tun_mtu is None else replace(wanted, tun_mtu=self._tun_mtu)

    def _find_tuns(self) -> tuple[Link, Link]:
        """Our own devices in the picture; one that is not there as it was is made anew, and the picture with it."""
        lost = [tun for tun in self._tuns if self._link_of(tun) is None]
        for tun in lost:
            tun.renew()
            logger.warning("a tun was taken away, and is made anew", extra={"device": tun.name})
            self.on_tun(tun)
        if self._tuns.own in lost:
            for flow in self._nat:
                if flow.protocol == TCP and not isinstance(flow.original.device, SideDevice):
                    self._end(flow)  # our end of it belongs to the old device
        if lost:
            self.snapshot = self._rtnetlink.snapshot()
        own, forwarded = self._link_of(self._tuns.own), self._link_of(self._tuns.forwarded)
        if own is None or forwarded is None:
            raise KernelError(f"{(self._tuns.own if own is None else self._tuns.forwarded).name} is gone")
        return own, forwarded

    def _link_of(self, tun: Tun) -> Link | None:
        link = self.snapshot.link_at(tun.index)
        return link if link is not None and link.name == tun.name else None

    def _look_again(self) -> None:
        self._ways.forget()
        own = [one.ip for facts in (*self.sides.uplinks, self.sides.tunnel) if facts for one in facts.addresses]
        self._own = {version: [one.packed for one in own if one.version == version] for version in FAMILIES}
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

    def _open(self, tun_mtu: int) -> None:
        self.tun_mtu = tun_mtu
        self.devices.update(self.sides, tun_mtu)

    def _update_flows(self) -> None:
        """End the flows that lost their way; renew the next hop of the others."""
        own: dict[SideDevice, set[bytes]] = {
            device: {one.interface.ip.packed for one in self.snapshot.addresses_of(device.link)}
            for device in self.devices.all()
        }
        of_tun = {self.own_address(version) for version in FAMILIES}
        for flow in self._nat:
            device = flow.original.device
            if not isinstance(device, SideDevice):
                continue  # it comes to us, wherever the sides are
            # A flow goes on with its own address while the device has it, also when new flows would get another one
            # (a temporary IPv6 address that has been replaced).
            inside, outside = source_of(flow.key), source_of(flow.outside)
            has_outside = outside in own.get(device, ())
            has_inside = inside in of_tun or flow.forwarded or self._is_kept(inside)
            next_hop = self._ways.next_hop(flow, device) if has_outside and has_inside else None
            if next_hop is None:
                self._end(flow)
            else:
                flow.original.next_hop = flow.reply.next_hop = next_hop

    def _is_kept(self, inside: bytes) -> bool:
        """Whether an address that an app sends from, and that is not the tun's, is this host's still."""
        try:
            return self.is_local(inside)
        except KernelError as error:
            logger.error("an app's address cannot be looked for", extra={"error": str(error)})
            return False

    def _end(self, flow: Flow) -> None:
        # A connection that was reset may be alive all the same: the reset may have been meant for another.
        if not flow.finished:
            self.on_end(flow)
        self._nat.end(flow, FlowEvent.BLOCK, trio.current_time())

    def _lose(self, loss: Loss) -> None:
        """Give up what went away, at once; the picture follows."""
        for key, device in list(self.devices.open.items()):
            if device.link.index != loss.index or self._is_back(loss):
                continue
            self._lost = True
            self._ways.forget()
            self.on_loss()
            if loss.address is None:
                self.devices.close_one(key)
                continue
            for flow in self._nat.flows_of([device]):
                if source_of(flow.outside) == loss.address.packed:
                    self._end(flow)

    def _is_back(self, loss: Loss) -> bool:
        """Whether it is there all the same: the event is older than the picture, or the address has another prefix."""
        try:
            if loss.address is None:
                return any(one.index == loss.index and one.up for one in self._rtnetlink.links())
            own = self._rtnetlink.addresses(loss.address.version)
        except KernelError as error:
            logger.error("what is lost cannot be looked for", extra={"error": str(error)})
            return False
        return any((one.index, one.interface.ip) == (loss.index, loss.address) for one in own)

    async def watch(self) -> None:
        """Follow changes until cancelled."""
        pace = Pace(trio.current_time)
        while True:
            with trio.CancelScope() as self._nap:
                if self.failure or not self.devices.complete:
                    self._nap.deadline = trio.current_time() + RETRY_S
                if not self._flushed and not self._changed:
                    await trio.lowlevel.wait_readable(self._events.fileno())
            self._read_events()
            if self._changed or self._flushed or self.failure or not self.devices.complete:
                await self._listen(SETTLE_S)
                self._changed = self._flushed = False
                # Of this thread alone: what others take of a busy machine, they would take without a look as well.
                began = time.thread_time()
                self._follow()
                await self._listen(pace.looked(time.thread_time() - began))

    async def _listen(self, seconds: float) -> None:
        """Do no more than hear events for so long."""
        with trio.move_on_after(seconds):
            while True:
                await trio.lowlevel.wait_readable(self._events.fileno())
                self._read_events()

    def hear(self) -> None:
        """Give up at once what events say is lost; never blocks.

        Called before packets are carried, so that none leaves with an address that was gone before it: this process may
        not have run for a while.
        """
        if self._events.waiting():
            self._read_events()
            if self._changed:
                self._nap.cancel()

    def _follow(self) -> None:
        known = self.failure
        try:
            self.refresh()
        except TunsplitError as error:
            if str(error) != known:
                logger.error("steering cannot be applied: both sides are closed", extra={"error": str(error)})

    def _read_events(self) -> None:
        """Give up what is lost, and note whether anything has changed."""
        try:
            events = self._events.read()
        except KernelError as error:
            logger.error("events are lost", extra={"error": str(error)})
            events = [Event(Change.OVERRUN)]
        for event in events:
            self._changed = True
            if event.loss is not None:
                self._lose(event.loss)

    def _neighbours_changed(self, addresses: set[IPAddress]) -> None:
        if any(facts.gateway(version) in addresses for facts in self.sides.uplinks for version in FAMILIES):
            self.on_gateway()


def _packed(addresses: tuple[IPInterface, ...]) -> dict[int, bytes]:
    """The addresses alone, by IP version."""
    return {one.version: one.ip.packed for one in addresses}
