"""What a policy of IPsec claims is refused: packet sockets send below IP, so it would leave in clear.

Theory of operation. The kernel asks its policies by the address that an app's packet has, which is the tun's, and so
finds none; by the side's address there may be one. Then the flow is refused, whosever it is, and ends if a policy
comes while it is open. What asks for names are sockets of our own, and the kernel sees to those.
"""

import logging
from typing import TYPE_CHECKING

import trio

from tunsplit.engine.direction import destination_of
from tunsplit.engine.flow import Flow, FlowEvent
from tunsplit.engine.ipsec import demands
from tunsplit.engine.nat import Nat
from tunsplit.engine.rewrites import Way
from tunsplit.errors import KernelError
from tunsplit.kernel import xfrm
from tunsplit.kernel.closing import Closing
from tunsplit.tasks.side import SideDevice

if TYPE_CHECKING:
    from collections.abc import Callable

CLAIMED = "a policy of IPsec claims it"

logger = logging.getLogger(__name__)


class Ipsec(Closing):
    """The policies as they are."""

    def __init__(self, nat: Nat) -> None:
        """`on_end` hears of flows that have ended.

        Raises:
            KernelError: the policies cannot be known.
        """
        self.on_end: Callable[[Flow], None] = lambda _: None
        self._nat = nat
        self._events = xfrm.follow()  # before they are read: a change in between is told
        try:
            self._policies = xfrm.policies()
        except KernelError:
            self.close()
            raise
        self._stale = False

    def close(self) -> None:
        """End the subscription."""
        if self._events is not None:
            self._events.close()

    def descriptors(self) -> list[int]:
        """What becomes readable when policies have changed."""
        return [] if self._events is None else [self._events.fileno()]

    def claims(self, protocol: int, key: bytes, way: Way) -> bool:
        """Whether a flow with this four-tuple may not leave this way as it is."""
        return bool(self._policies) and self._claims(protocol, way.source + destination_of(key) + key[-4:], way.device)

    def hear(self) -> None:
        """Take in what has become of policies, and end the flows that one has come to claim; never blocks.

        Raises:
            KernelError: they cannot be known. The next call looks again.
        """
        if self._events is not None and self._events.waiting() and self._events.any():
            self._stale = True
        if not self._stale:
            return
        self._policies = xfrm.policies()
        self._stale = False
        flows = self._nat if self._policies else ()
        claimed = [flow for flow in flows if self._claims(flow.protocol, flow.outside, flow.original.device)]
        for flow in claimed:
            self.on_end(flow)
            self._nat.end(flow, FlowEvent.BLOCK, trio.current_time())
        logger.info("IPsec policies changed", extra={"policies": len(self._policies), "ended": len(claimed)})

    def _claims(self, protocol: int, outside: bytes, device: object) -> bool:
        return isinstance(device, SideDevice) and demands(self._policies, protocol, outside, device.link.index)
