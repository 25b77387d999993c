"""side → tun: the mirror of the hot loop."""

from collections import Counter

import trio

from tunsplit.engine.direction import Direction
from tunsplit.engine.slowpath import SlowPath, Unknown
from tunsplit.kernel.tun import Tun
from tunsplit.tasks import mishap
from tunsplit.tasks.outbound import BATCH
from tunsplit.tasks.side import ETHERNET, HEADER, HEADROOM, SideDevice, frame_buffer
from tunsplit.wire import vnet
from tunsplit.wire.ip import unpack_u16

MAY_BE_PADDED = 60  # Ethernet's shortest frame without its checksum


async def pump(device: SideDevice, tun: Tun, direction: Direction, slow: SlowPath, counters: Counter[str]) -> None:
    """Carry replies from one device to the tun, until cancelled or the device is closed."""
    frame = frame_buffer()
    ethernet = device.socket.ethernet
    start = 0 if ethernet else HEADER
    received, packet = frame[start:], frame[HEADROOM:]
    before = HEADROOM - start
    read_into, translate, write = device.socket.read_into, direction.translate, tun.write
    while not device.closed:
        try:
            await trio.lowlevel.wait_readable(device.socket.fileno())
        except trio.ClosedResourceError:
            return
        now = trio.current_time()
        try:
            for _ in range(BATCH):
                try:
                    size = read_into(received)
                except OSError as error:  # the device went down, or a super-packet of a kind that virtio cannot name
                    device.counters[f"receive_{error.errno}"] += 1
                    break
                if not size:
                    break
                size -= before
                if ethernet:
                    vnet.move(frame, 0, frame, HEADER, -ETHERNET)
                if size < MAY_BE_PADDED:
                    size = without_padding(packet, size)
                if translate(packet, size, not frame[HEADER] & vnet.NEEDS_CSUM, now) is not None:
                    write(frame[HEADER : HEADROOM + size])
                    continue
                outcome = slow.translate_untrusted(bytes(frame[HEADER:HEADROOM]), bytes(packet[:size]), now)
                if isinstance(outcome, Unknown):
                    counters["inbound_no_flow"] += 1
                    continue
                for ready in outcome:
                    write(ready.vnet + ready.packet)
        except Exception as error:
            mishap.note(counters, error)


def without_padding(packet: memoryview, size: int) -> int:
    """The packet's own length, where a short frame was padded; never more than there is."""
    if size >= 20 and packet[0] >> 4 == 4:
        return min(size, int(unpack_u16(packet, 2)[0]))
    if size >= 40 and packet[0] >> 4 == 6:
        return min(size, 40 + int(unpack_u16(packet, 4)[0]))
    return size
