"""tun → side: the hot loop."""

from collections.abc import Callable

from tunsplit.engine.nat import Nat
from tunsplit.kernel.tun import Tun
from tunsplit.tasks.side import HEADER, HEADROOM
from tunsplit.wire import vnet

BATCH = 64  # ≈ 0.3 ms at 5 µs a packet: timers and the other direction never wait longer
# Packets of a batch that may take the slow path, ≈ 150 µs each: an app that knocks at closed doors without
# pause costs the flows that run no more than this at a time.
MOST_SLOW = 8


def carry(tun: Tun, nat: Nat, passed_by: Callable[[bytes, bytes, float], None], frame: memoryview, now: float) -> int:
    """Carry one batch; how many packets it had, `BATCH` if others are to have their turn.

    Args:
        tun: where packets come from.
        nat: the table of flows.
        passed_by: gets what the fast path cannot take.
        frame: a frame buffer.
        now: seconds of the event loop's clock.

    Raises:
        OSError: from the tun; EBADFD when it is gone.
    """
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
            break
    return BATCH
