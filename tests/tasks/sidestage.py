"""What a device of a side is asked to send."""

import struct

from tests.fakes.devices import (
    FAR4,
    FAR6,
    HOST4,
    HOST6,
    OWN_MAC,
    TUN4,
    TUN6,
    framed,
    opened,
)
from tunsplit.wire import vnet

FLOW = f"{TUN4}:5000 > {FAR4}:53"
OUTSIDE = f"{HOST4}:50000 > {FAR4}:53"
FLOW6 = f"[{TUN6}]:5000 > [{FAR6}]:53"
OUTSIDE6 = f"[{HOST6}]:50000 > [{FAR6}]:53"
DF = 0x4000
IPV4 = OWN_MAC + b"\x08\x00"
GSO_TCP4, GSO_UDP = 1, 5


def header(gso_type, gso_size, *, start=20, offset=16, length=40):
    return struct.pack("<BBHHHH", vnet.NEEDS_CSUM, gso_type, length, gso_size, start, offset)


def send(side, rewrite, packet, header=vnet.NONE):
    frame, size = framed(packet, header)
    side.device.send(frame, size, rewrite)


def original(table, side, **others):
    return opened(table, FLOW, side.way(**others)).original
