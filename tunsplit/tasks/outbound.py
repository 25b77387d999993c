"""tun → side: the hot loop.

Theory of operation. What becomes of a process is told before it can send as what it has become. So a packet is judged
by what is heard after it was read, never by what was heard before. To hear costs a system call: one serves `AHEAD`
packets, which are read first.
"""

from collections.abc import Callable

from tunsplit.engine.direction import Direction
from tunsplit.kernel.tun import Tun
from tunsplit.tasks.side import HEADER, HEADROOM, frame_buffer
from tunsplit.wire import vnet

BATCH = 64  # ≈ 0.3 ms at 5 µs a packet: timers and the other direction never wait longer
# Packets of a batch that may take the slow path, ≈ 150 µs each: an app that knocks at closed doors without
# pause costs the flows that run no more than this at a time.
MOST_SLOW = 8
AHEAD = 4  # packets: their buffers have to fit into the processor's own cache


PassedBy = Callable[[bytes, bytes, float], None]


class Ahead:
    """Packets of a tun that are read and not carried yet.

    Attributes:
        waiting: frame buffer, the packet in it, and its size; the oldest one last.
    """

    def __init__(self) -> None:
        frames = [frame_buffer() for _ in range(AHEAD)]
        self._frames = [(frame, frame[HEADER:], frame[HEADROOM:]) for frame in frames]
        self.waiting: list[tuple[memoryview, memoryview, int]] = []

    def read(self, tun: Tun) -> int:
        """Read some packets if none waits; how many do.

        Raises:
            OSError: from the tun; EBADFD when it is gone.
        """
        waiting, read_into = self.waiting, tun.read_into
        if not waiting:
            try:
                for frame, buffer, packet in self._frames:
                    if not (size := read_into(buffer)):
                        break
                    waiting.append((frame, packet, size - vnet.SIZE))
            except OSError:
                if not waiting:  # else it will say so again
                    raise
            waiting.reverse()
        return len(waiting)


def carry(ahead: Ahead, direction: Direction, passed_by: PassedBy, now: float) -> int:
    """Carry what waits; how many of the packets the fast path could not take.

    Args:
        ahead: what was read. Nothing of it is lost by an error: the rest waits on.
        direction: the flows that it may be of.
        passed_by: gets what the fast path cannot take.
        now: seconds of the event loop's clock.
    """
    waiting, translate = ahead.waiting, direction.translate
    slow = 0
    while waiting:
        frame, packet, size = waiting.pop()
        rewrite = translate(packet, size, not frame[HEADER] & vnet.NEEDS_CSUM, now)
        if rewrite is not None:
            rewrite.device.send(frame, size, rewrite)  # type: ignore[attr-defined]  # opaque to the engine
            continue
        slow += 1
        passed_by(bytes(frame[HEADER:HEADROOM]), bytes(packet[:size]), now)
    return slow
