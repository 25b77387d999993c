"""side → tun: the mirror of the hot loop."""

from collections import Counter

from tunsplit.engine.direction import Direction
from tunsplit.engine.slowpath import SlowPath, Unknown
from tunsplit.kernel.tun import Tun
from tunsplit.tasks.outbound import BATCH
from tunsplit.tasks.side import ETHERNET, HEADER, HEADROOM, SideDevice
from tunsplit.wire import vnet
from tunsplit.wire.ip import unpack_u16

MAY_BE_PADDED = 60  # Ethernet's shortest frame without its checksum


def carry(
    device: SideDevice,
    tun: Tun,
    direction: Direction,
    slow: SlowPath,
    counters: Counter[str],
    frame: memoryview,
    now: float,
) -> int:
    """Carry one batch of replies; how many packets it had.

    Args:
        device: where they come in.
        tun: where they go.
        direction: the replies that may come in on this device.
        slow: takes what the fast path cannot.
        counters: `inbound_no_flow` counts what nobody has asked for.
        frame: a frame buffer.
        now: seconds of the event loop's clock.
    """
    ethernet = device.socket.ethernet
    start = 0 if ethernet else HEADER
    received, packet = frame[start:], frame[HEADROOM:]
    before = HEADROOM - start
    read_into, translate, write = device.socket.read_into, direction.translate, tun.write
    for number in range(BATCH):
        try:
            size = read_into(received)
        except OSError as error:  # the device went down, or a super-packet of a kind that virtio cannot name
            device.counters[f"receive_{error.errno}"] += 1
            return number
        if not size:
            return number
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
    return BATCH


def without_padding(packet: memoryview, size: int) -> int:
    """The packet's own length, where a short frame was padded; never more than there is."""
    if size >= 20 and packet[0] >> 4 == 4:
        return min(size, int(unpack_u16(packet, 2)[0]))
    if size >= 40 and packet[0] >> 4 == 6:
        return min(size, 40 + int(unpack_u16(packet, 4)[0]))
    return size
