"""Our two devices: what an app sends comes out of the one, what a guest sends out of the other."""

from typing import NamedTuple

from tunsplit.engine.flow import Flow
from tunsplit.kernel.tun import Tun


class Tuns(NamedTuple):
    """Both, open."""

    own: Tun
    forwarded: Tun

    @property
    def names(self) -> tuple[str, str]:
        """What they are called."""
        return self.own.name, self.forwarded.name

    def of(self, flow: Flow) -> Tun:
        """Where this flow's replies go."""
        return self.forwarded if flow.forwarded else self.own
