"""side → tun: the mirror of the hot loop."""

from collections import Counter
from collections.abc import Callable

from tunsplit.engine.direction import Direction
from tunsplit.engine.flow import Flow
from tunsplit.engine.slowpath import Ready, SlowPath, Unknown
from tunsplit.tasks.outbound import BATCH
from tunsplit.tasks.side import ETHERNET, HEADER, HEADROOM, SideDevice
from tunsplit.tasks.tuns import Tuns
from tunsplit.wire import vnet
from tunsplit.wire.ip import unpack_u16

GSO_TYPE = HEADER + 1  # in a frame buffer
Heard = Callable[[Flow, bytearray, int, float], None]
Unclaimed = Callable[[SideDevice, Unknown, float], None]

# What a packet takes of a batch before the other devices get their turn: it is a tenth of a millisecond. What the fast
# path passes by takes twice as long; a super-packet is worth its time.
MOST_SPENT, SINGLE, SLOW = 16, 1, 2

MAY_BE_PADDED = 60  # Ethernet's shortest frame without its checksum


def carry(
    device: SideDevice,
    tuns: Tuns,
    direction: Direction,
    slow: SlowPath,
    heard: Heard,
    unclaimed: Unclaimed,
    counters: Counter[str],
    frame: memoryview,
    now: float,
) -> int:
    """Carry one batch of replies; how many packets it had.

    Who floods one side with packets of no flow, or with those of a flow, leaves the other side most of our time: the
    batch ends early, and what the kernel cannot keep meanwhile it drops.

    Args:
        device: where they come in.
        tuns: where they go.
        direction: the replies that may come in on this device.
        slow: takes what the fast path cannot.
        heard: gets a flow, the error about a packet of it that was too big, and what its path takes.
        unclaimed: gets what is of no flow.
        counters: `inbound_no_flow` counts what nobody has asked for.
        frame: a frame buffer.
        now: seconds of the event loop's clock.
    """
    ethernet = device.socket.ethernet
    start = 0 if ethernet else HEADER
    received, packet = frame[start:], frame[HEADROOM:]
    before = HEADROOM - start
    read_into, translate = device.socket.read_into, direction.translate
    write, forward = tuns.own.write, tuns.forwarded.write
    spent = 0
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
        rewrite = translate(packet, size, not frame[HEADER] & vnet.NEEDS_CSUM, now)
        if rewrite is None and size < MAY_BE_PADDED and (own := without_padding(packet, size)) < size:
            size = own
            rewrite = translate(packet, size, not frame[HEADER] & vnet.NEEDS_CSUM, now)
        if rewrite is not None:
            (forward if rewrite.flow.forwarded else write)(frame[HEADER : HEADROOM + size])
            if frame[GSO_TYPE]:
                continue
            spent += SINGLE
        else:
            spent += SLOW
            outcome = slow.translate_untrusted(bytes(frame[HEADER:HEADROOM]), bytes(packet[:size]), now)
            if isinstance(outcome, Unknown):
                counters["inbound_no_flow"] += 1
                unclaimed(device, outcome, now)
            else:
                deliver(outcome, device, tuns, heard, now)
        if spent >= MOST_SPENT:
            return number + 1
    return BATCH


def deliver(packets: list[Ready], device: SideDevice, tuns: Tuns, heard: Heard, now: float) -> None:
    """Give an app what the slow path has made ready; or tell what it says of the path."""
    for ready in packets:
        if ready.too_big is None:
            tuns.of(ready.rewrite.flow).write(ready.vnet + ready.packet)
        elif mtu := device.learn(ready, now):
            heard(ready.rewrite.flow, ready.packet, mtu, now)


def without_padding(packet: memoryview, size: int) -> int:
    """The packet's own length, where a short frame was padded; never more than there is."""
    if size >= 20 and packet[0] >> 4 == 4:
        return min(size, int(unpack_u16(packet, 2)[0]))
    if size >= 40 and packet[0] >> 4 == 6:
        return min(size, 40 + int(unpack_u16(packet, 4)[0]))
    return size
