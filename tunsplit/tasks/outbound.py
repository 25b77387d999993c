"""tun → side: the hot loop."""

import errno
import logging
from collections import Counter
from collections.abc import Callable

import trio

from tunsplit.engine.nat import Nat
from tunsplit.kernel.tun import Tun
from tunsplit.tasks import mishap
from tunsplit.tasks.side import HEADER, HEADROOM, frame_buffer
from tunsplit.wire import vnet

BATCH = 64  # ≈ 0.3 ms at 5 µs a packet: timers and the other direction never wait longer
# Packets of a batch that may take the slow path, ≈ 150 µs each: an app that knocks at closed doors without
# pause costs the flows that run no more than this at a time.
MOST_SLOW = 8

logger = logging.getLogger(__name__)


async def pump(tun: Tun, nat: Nat, passed_by: Callable[[bytes, bytes, float], None], counters: Counter[str]) -> None:
    """Carry packets from the tun to their side, until cancelled or the tun is gone.

    `passed_by` gets what the fast path cannot take.
    """
    frame = frame_buffer()
    while True:
        await trio.lowlevel.wait_readable(tun.fileno())  # the only await: 7 µs, paid once a batch
        try:
            carry(tun, nat, passed_by, frame, trio.current_time())
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EBADFD:  # somebody removed the device
                # Not the daemon's end, which would open the host: without the tun the way stays closed.
                logger.error("the tun is gone: restart tunsplit", extra={"device": tun.name})
                return
            mishap.note(counters, error)


def carry(tun: Tun, nat: Nat, passed_by: Callable[[bytes, bytes, float], None], frame: memoryview, now: float) -> int:
    """Carry one batch, and give back how many packets it had; `frame` is a frame buffer."""
    buffer, packet = frame[HEADER:], frame[HEADROOM:]
    read_into, translate = tun.read_into, nat.outbound.translate
    slow = 0
    for number in range(BATCH):
        if not (size := read_into(buffer)):
            return number
        size -= vnet.SIZE
        rewrite = translate(packet, size, not frame[HEADER] & vnet.NEEDS_CSUM, now)
        if rewrite is not None:
            rewrite.device.send(frame, size, rewrite)  # type: ignore[attr-defined]  # opaque to the engine
            continue
        passed_by(bytes(frame[HEADER:HEADROOM]), bytes(packet[:size]), now)
        slow += 1
        if slow == MOST_SLOW:
            return number + 1
    return BATCH
