"""A gate for first packets, and what an app hears of it."""

from contextlib import contextmanager

import dpkt

from tests.craft import (
    RST,
    SYN,
    tcp,
)
from tests.fakes.devices import FAR4, FAR6, SIGNER, TUN4, TUN6
from tests.fakes.judges import Gate

WEB = f"{TUN4}:5000 > {FAR4}:80"
WEB6 = f"[{TUN6}]:5000 > [{FAR6}]:80"
COOKIE, OTHER_COOKIE = b"\1" * 8, b"\2" * 8


@contextmanager
def a_gate(**others):
    gate = Gate(**others)
    try:
        yield gate
    finally:
        gate.close()


def syn(text=WEB):
    return tcp(text, flags=SYN)


def answered(gate):
    """What the app was told, in words."""
    return [in_words(answer) for answer in gate.tun.answers]


def in_words(packet):
    parsed = dpkt.ip.IP(packet) if packet[0] >> 4 == 4 else dpkt.ip6.IP6(packet)
    data = parsed.data
    if isinstance(data, dpkt.tcp.TCP):
        return "reset" if data.flags & RST else "segment"
    return f"icmp {data.type}/{data.code} from {'us' if parsed.src == SIGNER[parsed.v] else 'others'}"
