"""One task that waits for the tun and for every device of a side, and carries what is there.

Theory of operation. The event loop takes 25 µs a wait, as much as five packets. What is sent often brings its
answer at once: the kernel runs an app's TCP before write() returns, and a neighbour's on the same host. So a turn looks
at both directions again until nothing comes or a batch is full, and one wait serves a whole exchange. The
descriptors hang in an epoll of our own (epoll(7): one can be waited for like any descriptor), therefore it is one task
that waits, however many devices there are.
"""

import errno
import logging
import select
from collections import Counter
from collections.abc import Callable

import trio

from tunsplit.engine.direction import Direction
from tunsplit.engine.nat import Nat
from tunsplit.engine.slowpath import SlowPath
from tunsplit.kernel.tun import Tun
from tunsplit.tasks import inbound, mishap, outbound
from tunsplit.tasks.outbound import BATCH
from tunsplit.tasks.side import SideDevice, frame_buffer

logger = logging.getLogger(__name__)


class Pump:
    """Carries packets between the tun and the sides' devices.

    `passed_by` gets what the fast path out cannot take.
    """

    def __init__(
        self, tun: Tun, nat: Nat, passed_by: Callable[[bytes, bytes, float], None], counters: Counter[str]
    ) -> None:
        self._tun = tun
        self._nat = nat
        self._passed_by = passed_by
        self._counters = counters
        self._frame = frame_buffer()
        self._back: dict[SideDevice, tuple[Direction, SlowPath]] = {}
        self._epoll = select.epoll()
        self._epoll.register(tun.fileno(), select.EPOLLIN)
        self._has_tun = True

    def attach(self, device: SideDevice) -> None:
        """Carry what comes in on this device, too."""
        direction = self._nat.inbound(device)
        self._back[device] = direction, SlowPath(direction, self._counters, outbound=False)
        self._epoll.register(device.socket.fileno(), select.EPOLLIN)

    def detach(self, device: SideDevice) -> None:
        """Forget a device that is about to be closed (and so leaves the epoll); it may never have been attached."""
        self._back.pop(device, None)

    def expire(self, now: float) -> int:
        """Forget incoming datagrams that nobody completed; how many."""
        return sum(slow.fragments.expire(now) for _, slow in self._back.values())

    async def run(self) -> None:
        """Carry, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())  # the only await
            self.turn()

    def turn(self) -> None:
        """Carry what is there both ways, at most a batch or two."""
        carried = 0
        while True:
            before = carried
            carried += self.carry_out()
            for device, (direction, slow) in tuple(self._back.items()):
                carried += self._carry_in(device, direction, slow)
            if carried == before or carried >= BATCH:
                return

    def carry_out(self) -> int:
        """Carry one batch out of the tun; how many packets it had, `BATCH` if others are to have their turn."""
        if not self._has_tun:
            return 0
        try:
            return outbound.carry(self._tun, self._nat, self._passed_by, self._frame, trio.current_time())
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EBADFD:  # somebody removed the device
                # Not the daemon's end, which would open the host: without the tun the way stays closed.
                logger.error("the tun is gone: restart tunsplit", extra={"device": self._tun.name})
                self._epoll.unregister(self._tun.fileno())
                self._has_tun = False
            else:
                mishap.note(self._counters, error)
        return 1

    def _carry_in(self, device: SideDevice, direction: Direction, slow: SlowPath) -> int:
        try:
            return inbound.carry(device, self._tun, direction, slow, self._counters, self._frame, trio.current_time())
        except Exception as error:
            mishap.note(self._counters, error)
        return 1

    def close(self) -> None:
        """Give the descriptor back."""
        self._epoll.close()
