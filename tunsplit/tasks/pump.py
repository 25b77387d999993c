"""One task that waits for the tuns and for every device of a side, and carries what is there.

Theory of operation. The event loop takes 25 µs a wait, as much as five packets. What is sent often brings its
answer at once: the kernel runs an app's TCP before write() returns, and a neighbour's on the same host. So a turn asks
again who has something until nobody has or a batch is full, and one wait serves a whole exchange. The descriptors
hang in an epoll of our own (epoll(7): one can be waited for like any descriptor), therefore it is one task that waits
and one question, however many devices there are. The same question, in a second epoll, tells whether there is news that
packets from a side have to be judged by: it was there before them, or concerns none of them. What apps send is read
first, and then a third epoll is asked for news (tasks/outbound.py). Only packets wake the task, since others wait for
the news.
"""

import errno
import logging
import select
from collections import Counter
from collections.abc import Callable
from functools import partial

import trio

from tunsplit.engine.direction import Direction
from tunsplit.engine.nat import Nat
from tunsplit.engine.slowpath import SlowPath
from tunsplit.kernel.tun import Tun
from tunsplit.tasks import inbound, mishap, outbound
from tunsplit.tasks.outbound import BATCH, MOST_SLOW, Ahead, PassedBy
from tunsplit.tasks.side import SideDevice, frame_buffer
from tunsplit.tasks.tuns import Tuns

logger = logging.getLogger(__name__)


class Pump:
    """Carries packets between the tuns and the sides' devices.

    `before_batch` takes in what has happened to processes and to the network (`hear_first` says where to look), when
    packets were read that may have come after it. `after_carried` hear after each batch of apps' packets whether their
    tun was seen empty.
    """

    def __init__(
        self,
        tuns: Tuns,
        nat: Nat,
        passed_by: PassedBy,
        forwarded_by: PassedBy,
        counters: Counter[str],
        *,
        heard: inbound.Heard,
        unclaimed: inbound.Unclaimed,
    ) -> None:
        """Say who gets what.

        Args:
            tuns: where packets come from.
            nat: the table of flows.
            passed_by: gets what the fast path out cannot take of apps.
            forwarded_by: likewise of guests.
            counters: of what cannot be carried.
            heard: gets what routers say of packets that were too big.
            unclaimed: gets what comes in and is of no flow.
        """
        self._heard = heard
        self._unclaimed = unclaimed
        self._tuns = tuns
        self._nat = nat
        self._ways_out = [
            (tuns.own, nat.outbound, passed_by, Ahead()),
            (tuns.forwarded, nat.forwarded, forwarded_by, Ahead()),
        ]
        self._gone: set[Tun] = set()  # tuns that somebody has removed
        self._counters = counters
        self._frame = frame_buffer()
        self._back: dict[SideDevice, SlowPath] = {}
        self._epoll = select.epoll()
        self._ready = select.epoll()  # the same descriptors, and those of the news
        self._carry: dict[int, Callable[[float], int]] = {}  # by descriptor
        self._news: set[int] = set()  # descriptors
        self._news_epoll = select.epoll()  # of these alone
        for way_out in self._ways_out:
            self._wait_for(way_out[0].fileno(), partial(self._carry_from, *way_out))
        self.before_batch: Callable[[], None] = lambda: None
        self.after_carried: list[Callable[[bool], None]] = []

    def attach(self, device: SideDevice) -> None:
        """Carry what comes in on this device, too."""
        direction = self._nat.inbound(device)
        slow = self._back[device] = SlowPath(direction, self._counters, outbound=False)
        self._wait_for(device.socket.fileno(), partial(self._carry_in, device, direction, slow))

    def detach(self, device: SideDevice) -> None:
        """Forget a device that is about to be closed (and so leaves the epoll); it may never have been attached."""
        if self._back.pop(device, None) is not None:
            del self._carry[device.socket.fileno()]

    def renewed(self, tun: Tun) -> None:
        """A tun has been made anew: its descriptor is another. The old one is closed, and so has left the epoll."""
        way_out = next(one for one in self._ways_out if one[0] is tun)
        self._wait_for(tun.fileno(), partial(self._carry_from, *way_out))
        self._gone.discard(tun)

    def heed(self, descriptor: int, take_in: Callable[[], None]) -> None:
        """Take in what can be read here, too, and look into the apps' tun after it."""

        def carry(now: float) -> int:
            take_in()
            return self._carry_from(*self._ways_out[0], now)

        self._wait_for(descriptor, carry)

    def hear_first(self, descriptor: int) -> None:
        """Call `before_batch` whenever this can be read, before packets are carried. Who closes it says no more."""
        self._news.add(descriptor)
        for epoll in (self._news_epoll, self._ready):
            epoll.register(descriptor, select.EPOLLIN)

    def expire(self, now: float) -> int:
        """Forget incoming datagrams that nobody completed, how many; and paths that may have become wider."""
        for device in self._back:
            device.expire(now)
        return sum(slow.fragments.expire(now) for slow in self._back.values())

    async def run(self) -> None:
        """Carry, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())  # the only await
            self.turn()

    def turn(self) -> None:
        """Carry what is there both ways, at most a batch or two."""
        carried, before = 0, -1
        while before < carried < BATCH:  # who is ready without a packet has an error, and others get their turn
            before = carried
            ready = self._ready.poll(0, len(self._carry) + len(self._news))  # all of them: no news may be left out
            for descriptor, _ in ready:
                if descriptor in self._news:
                    self.before_batch()
                    break
            now = trio.current_time()
            for descriptor, _ in ready:
                if (carry := self._carry.get(descriptor)) is not None:  # none: it is news, or the news was its end
                    carried += carry(now)

    def carry_out(self) -> int:
        """Carry one batch out of each tun; how many packets there were, `BATCH` if others are to have their turn."""
        now = trio.current_time()
        return sum(self._carry_from(*way_out, now) for way_out in self._ways_out)

    def _carry_from(self, tun: Tun, direction: Direction, passed_by: PassedBy, ahead: Ahead, now: float) -> int:
        if tun in self._gone:
            return 0
        number = slow = 0
        read = -1
        while number < BATCH and slow < MOST_SLOW:
            try:
                read = ahead.read(tun)
            except OSError as error:
                self._cannot_read(tun, error)
                return 1
            if not read:
                break
            number += read
            if self._news_epoll.poll(0, 1):
                self.before_batch()
            try:
                slow += outbound.carry(ahead, direction, passed_by, now)
            except Exception as error:
                mishap.note(self._counters, error)
        if tun is self._tuns.own:
            for after in self.after_carried:
                after(not read)
        return BATCH if read else number

    def _cannot_read(self, tun: Tun, error: OSError) -> None:
        if error.errno != errno.EBADFD:
            mishap.note(self._counters, error)
            return
        # Somebody removed the device. Without it the way is closed; the network task makes an app's anew.
        logger.warning("the tun is gone", extra={"device": tun.name})
        for epoll in (self._epoll, self._ready):
            epoll.unregister(tun.fileno())
        self._gone.add(tun)

    def _carry_in(self, device: SideDevice, direction: Direction, slow: SlowPath, now: float) -> int:
        try:
            return inbound.carry(
                device, self._tuns, direction, slow, self._heard, self._unclaimed, self._counters, self._frame, now
            )
        except Exception as error:
            mishap.note(self._counters, error)
        return 1

    def _wait_for(self, descriptor: int, carry: Callable[[float], int]) -> None:
        self._carry[descriptor] = carry
        for epoll in (self._epoll, self._ready):
            epoll.register(descriptor, select.EPOLLIN)

    def close(self) -> None:
        """Give the descriptors back."""
        for epoll in (self._epoll, self._ready, self._news_epoll):
            epoll.close()
