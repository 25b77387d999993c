"""How packets leave by a side: what the kernel's routes say, remembered until something changes."""

import logging
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import NamedTuple

from tunsplit.engine.direction import destination_of
from tunsplit.engine.flow import Flow
from tunsplit.engine.rewrites import Way
from tunsplit.engine.sides import SideFacts
from tunsplit.errors import KernelError
from tunsplit.host import IPAddress
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.names import MARK_TUNNEL, MARK_UPLINK
from tunsplit.tasks.side import NOWHERE, NextHop, SideDevice

MOST_WAYS = 16_384
MARKS = {"tunnel": MARK_TUNNEL, "uplink": MARK_UPLINK}

logger = logging.getLogger(__name__)


class Leading(NamedTuple):
    """Where packets to a destination go first, and a new flow's way; None: it would lack an address of the side."""

    next_hop: NextHop
    way: Way | None


class Ways:
    """Finds ways, and remembers them."""

    def __init__(
        self,
        rtnetlink: Rtnetlink,
        facts: Callable[[str, int], SideFacts | None],
        devices: Mapping[tuple[str, int], SideDevice],
    ) -> None:
        """`facts` tells of a side as it is up for an IP version; `devices` are the open ones, by side and index."""
        self._rtnetlink = rtnetlink
        self._facts = facts
        self._devices = devices
        self._known: dict[tuple[str, bytes], Leading | None] = {}

    def forget(self) -> None:
        """Something has changed."""
        self._known.clear()

    def find(self, side: str, version: int, destination: bytes) -> Way | None:
        """How packets to `destination` leave by this side; None: not at all.

        Raises:
            KernelError: the kernel gives no answer.
        """
        found = self._find(side, version, destination)
        return found and found.way

    def _find(self, side: str, version: int, destination: bytes) -> Leading | None:
        key = (side, destination)
        if key in self._known:
            return self._known[key]
        if len(self._known) >= MOST_WAYS:
            self._known.clear()
        found = self._known[key] = self._ask(side, version, destination)
        return found

    def _ask(self, side: str, version: int, destination: bytes) -> Leading | None:
        facts = self._facts(side, version)
        if facts is None or (device := self._devices.get((side, facts.link.index))) is None:
            return None
        address = ip_address(destination)
        # IPv4 by the mark's table alone: with a device named, the kernel would make a destination that has no route an
        # on-link one (net/ipv4/route.c, ip_route_output_key_hash_rcu), and ARP would name it on the wire. IPv6 has no
        # such rule; without a device named, it passes over a gateway that did not answer lately, and takes the route
        # that closes the table (net/ipv6/route.c, rt6_score_route).
        oif = facts.link.index if version == 6 else None
        hop = self._rtnetlink.route_get(address, mark=MARKS[side], oif=oif)
        if hop is None or hop.oif != facts.link.index:
            return None
        next_hop = device.next_hop(hop.gateway or address, version)
        # Both sides are strong hosts: only an address of the side itself.
        if hop.source is None or not self._is_own(facts, hop.source):
            return Leading(next_hop, None)
        return Leading(next_hop, Way(side, device, next_hop, hop.source.packed))

    def _is_own(self, facts: SideFacts, address: IPAddress) -> bool:
        if any(own.ip == address for own in facts.addresses):
            return True
        # It may be younger than the picture: a router advertisement brings the route first.
        return any(
            one.index == facts.link.index and one.interface.ip == address and one.is_global
            for one in self._rtnetlink.addresses(address.version)
        )

    def next_hop(self, flow: Flow, device: SideDevice) -> object:
        """Where an open flow goes first from now on; None: it cannot go on by this device."""
        version = 4 if len(flow.key) == 12 else 6
        facts = self._facts(flow.side, version)
        if facts is None or facts.link.index != device.link.index:
            return None
        try:
            found = self._find(flow.side, version, destination_of(flow.key))
        except KernelError as error:
            logger.error("a way cannot be found", extra={"error": str(error)})
            return None
        if found is not None:
            return found.next_hop
        return NOWHERE if device.can_pause else None
