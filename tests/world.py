"""A NAT with two sides and its slow paths, driven by packets as craft.py writes them."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from tests.craft import ICMP, ICMPV6, UDP, address, ends
from tunsplit.engine.direction import Direction
from tunsplit.engine.flow import App, Flow
from tunsplit.engine.nat import PORT_POOLS, Nat
from tunsplit.engine.ports import PortPool
from tunsplit.engine.rewrites import Way
from tunsplit.engine.slowpath import Ready, SlowPath, TooBig, Unknown, flow_key
from tunsplit.errors import MalformedPacket
from tunsplit.wire import vnet
from tunsplit.wire.ip import parse_untrusted

NOW = 1000.0
NEEDS_CSUM = bytes((vnet.NEEDS_CSUM,)) + bytes(9)


@dataclass(frozen=True)
class Device:
    """What a flow leaves by; opaque to the engine."""

    name: str


UPLINK, TUNNEL = Device("eth0"), Device("wg0")


class World:
    """Packets go in by `sent` (from an app) and `received` (from a device), and come out rewritten."""

    def __init__(self, *, most_flows: int = 1000, ports: tuple[int, int] = (40000, 40199)) -> None:
        chance = random.Random(1)
        pools = {name: PortPool(*ports, chance.randrange) for name in ("tcp", "udp", "echo")}
        self.nat = Nat(pools, most_flows=most_flows)
        self.counters: Counter[str] = Counter()
        self.outbound = SlowPath(self.nat.outbound, self.counters, outbound=True)
        self._inbound: dict[Device, SlowPath] = {}
        self.now = NOW

    def inbound(self, device: Device = UPLINK) -> SlowPath:
        """The slow path of what comes in on a device."""
        if device not in self._inbound:
            self._inbound[device] = SlowPath(self.nat.inbound(device), self.counters, outbound=False)
        return self._inbound[device]

    def open(
        self, text: str, *, outside: str, protocol: int = UDP, device: Device = UPLINK, user: int | None = None
    ) -> Flow:
        """Open a flow with just this outside address and port."""
        source, _, port = outside.rpartition(":")
        number = None
        if protocol in PORT_POOLS:
            number = int(port)
            if number not in (pool := self.nat.pools[PORT_POOLS[protocol]]).taken():
                pool._become_live(number)  # noqa: SLF001  # the test says which port was drawn
        app = None if user is None else App(100, "", user)
        return self.nat.open(protocol, ends(text).key, way(source.strip("[]"), device), number, self.now, app=app)

    def echo(self, text: str, identifier: int, *, outside: str, device: Device = UPLINK) -> Flow:
        """Open a flow of echo: its identifier stands in the place of the source port."""
        source, destination = text.split(" > ")
        if ":" in source:
            return self.open(
                f"[{source}]:{identifier} > [{destination}]:0", outside=outside, protocol=ICMPV6, device=device
            )
        return self.open(f"{source}:{identifier} > {destination}:0", outside=outside, protocol=ICMP, device=device)

    def sent(self, packet: bytes, *, finished: bool = True) -> bytes | None:
        """What the fast path makes of an app's packet; None: it needs the slow path.

        A datagram after a pause is judged again; here it is always the same socket's.
        """
        sent = self._fast(self.nat.outbound, packet, finished)
        return self._confirmed(packet, vnet.NONE if finished else NEEDS_CSUM) if sent is None else sent

    def _confirmed(self, packet: bytes, header: bytes) -> bytes | None:
        try:
            headers = parse_untrusted(packet, len(packet))
        except MalformedPacket:
            return None
        if headers.protocol != UDP or headers.size != len(packet) or headers.identification or headers.options:
            return None
        rewrite = self.nat.outbound.find(UDP, flow_key(packet, headers))
        if rewrite is None or self.now == rewrite.last_seen:
            return None
        unknown = Unknown(UDP, rewrite.flow.key, headers, header, packet)
        return bytes(self.outbound.pass_on(unknown, rewrite, self.now)[0].packet)

    def received(self, packet: bytes, device: Device = UPLINK, *, finished: bool = True) -> bytes | None:
        """What the fast path makes of a packet that comes in on a device."""
        return self._fast(self.nat.inbound(device), packet, finished)

    def _fast(self, direction: Direction, packet: bytes, finished: bool) -> bytes | None:
        buffer = bytearray(b"\xa5" * 70_000)  # the previous packet's bytes
        buffer[: len(packet)] = packet
        rewrite = direction.translate(buffer, len(packet), finished, self.now)
        if rewrite is None:
            assert packet == buffer[: len(packet)]
            return None
        assert bytearray(b"\xa5" * 100) == buffer[len(packet) : len(packet) + 100]
        return bytes(buffer[: len(packet)])

    def sent_slowly(self, packet: bytes, header: bytes = vnet.NONE) -> list[bytes] | Unknown:
        """What the slow path makes of an app's packet: what may go, or that no flow is known."""
        return _packets(self.outbound.translate_untrusted(header, packet, self.now))

    def received_slowly(
        self, packet: bytes, device: Device = UPLINK, header: bytes = vnet.NONE
    ) -> list[bytes] | Unknown:
        """The same for a packet that comes in on a device."""
        return _packets(self.inbound(device).translate_untrusted(header, packet, self.now))

    def told_too_big(self, packet: bytes, device: Device = UPLINK) -> list[TooBig | None]:
        """What a packet that comes in tells of its path's MTU."""
        outcome = self.inbound(device).translate_untrusted(vnet.NONE, packet, self.now)
        assert isinstance(outcome, list)
        return [ready.too_big for ready in outcome]

    def later(self, seconds: float) -> int:
        """Time passes, and what was idle for too long ends; how many flows."""
        self.now += seconds
        return sum(self.nat.expire(self.now))


def _packets(outcome: list[Ready] | Unknown) -> list[bytes] | Unknown:
    return outcome if isinstance(outcome, Unknown) else [bytes(ready.packet) for ready in outcome]


def unknown(outcome: list[bytes] | Unknown) -> Unknown:
    """The packet of no flow that this outcome is."""
    assert isinstance(outcome, Unknown)
    return outcome


def way(source: str, device: Device = UPLINK) -> Way:
    """A way out of a device with this address."""
    return Way("uplink" if device is UPLINK else "tunnel", device, None, address(source))


# What the app sends, the same outside; what comes back, the same inside.
V4 = (
    "10.128.0.1:5000 > 1.1.1.1:443", "192.0.2.7:40000 > 1.1.1.1:443",
    "1.1.1.1:443 > 192.0.2.7:40000", "1.1.1.1:443 > 10.128.0.1:5000", "192.0.2.7:40000",
)  # fmt: skip
V6 = (
    "[fd75::1]:5000 > [2001:db8::1]:443", "[2001:db8:50::2]:40000 > [2001:db8::1]:443",
    "[2001:db8::1]:443 > [2001:db8:50::2]:40000", "[2001:db8::1]:443 > [fd75::1]:5000", "[2001:db8:50::2]:40000",
)  # fmt: skip
BOTH = pytest.mark.parametrize(("app", "out", "back", "to_app", "outside"), [V4, V6], ids=["v4", "v6"])
OUT, BACK = V4[0], V4[2]
