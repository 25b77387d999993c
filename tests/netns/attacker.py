"""Who means harm: forged frames and packets from the wire, and what an app says, which shows where it has gone.

Every thing that an app says here has a nonce in it, and goes to an address that nobody else is told: so a frame tells
by its payload, and a question of ARP or of neighbour discovery by whom it asks for, whose it is.
"""

import itertools
import socket
import struct
from collections.abc import Iterable
from contextlib import AsyncExitStack
from ipaddress import ip_address
from typing import Any

import trio

from tests import craft
from tests.netns.stage import App, until
from tunsplit.lab import Lab
from tunsplit.lab.netns import Namespace
from tunsplit.lab.observer import Observer

ETHERTYPE = {4: b"\x08\x00", 6: b"\x86\xdd"}
OWN_MAC = bytes.fromhex("020000000066")
BROADCAST_MAC = b"\xff" * 6
ICMPV6 = 58
ON_LINK, AUTONOMOUS = 0x80, 0x40  # RFC 4861 §4.6.2
HIGH = 0x08  # RFC 4191 §2.1

# In an app. What is refused at once is as good as what never leaves; who has closed his socket is nobody.
SAY = """
said = []

def say(to, nonce):
    while said:
        said.pop().close()
    with contextlib.suppress(OSError):
        said.append(udp(to)); said[-1].send(nonce.encode())
    with contextlib.suppress(OSError):
        said.append(ping(to))
        said[-1].send(struct.pack('!BBHHH', 128 if ':' in to else 8, 0, 0, 0, 1) + nonce.encode())
    with contextlib.suppress(OSError):
        said.append(socket.socket(family(to))); said[-1].setblocking(False); said[-1].connect((to, 7))
"""
SAID = {"udp", "icmp", "icmpv6", "tcp"}

_numbers = itertools.count(10)


def nobody(version: int) -> tuple[str, str]:
    """An address beyond the routers that nobody has and nobody was told before; and a nonce."""
    number = next(_numbers)
    return {4: f"198.51.100.{10 + number % 200}", 6: f"2001:db8:100::{number:x}"}[version], f"nonce-{number:06}."


class Wires:
    """The wires of a host, watched: which of them an app's words have gone to."""

    def __init__(self, lab: Lab, *others: Observer) -> None:
        self._lab = lab
        self._observers = {"uplink": lab.uplink, "tunnel": lab.tunnel}
        self._observers |= {f"other {number}": other for number, other in enumerate(others, 1)}

    async def sides(self, to: str, nonce: str) -> dict[str, set[str]]:
        """By wire, the protocols of the frames from the host that say this or name this address."""
        found: dict[str, set[str]] = {}
        for name, observer in self._observers.items():
            await observer.settle()
            assert observer.dropped == 0
            for seen in observer.seen():
                is_it = nonce.encode() in seen.frame or str(seen.destination) == to
                if seen.direction == "out" and is_it:
                    found.setdefault(name, set()).add(seen.protocol)
        return found

    def clear(self) -> None:
        """Forget what was seen."""
        for observer in self._observers.values():
            observer.clear()

    async def said_on(self, wire: str, app: App, version: int, *, to: str = "") -> None:
        """Wait until an app's words are on this wire alone, as it may be about to become; never in the tunnel."""

        async def is_there() -> bool:
            wires = await self.said(app, version, to=to)
            assert "tunnel" not in wires
            return wires == {wire}

        await until(is_there, f"it is on {wire}")

    async def said(self, app: App, version: int, *, to: str = "") -> set[str]:
        """Have an app say something by each protocol, again and again until it shows; the wires where it did."""
        address, nonce = nobody(version)
        if to:
            self.clear()
        to = to or address
        await app(SAY)
        shown: dict[str, set[str]] = {}

        async def shows() -> bool:
            nonlocal shown
            await app("say(to, nonce)", to=to, nonce=nonce)
            for _ in range(5):
                shown = await self.sides(to, nonce)
                kinds = set().union(*shown.values())
                if kinds & {"arp", "ndp"} or len(kinds & SAID) == 3:
                    return True
                await trio.sleep(0.02)
            return False

        await until(shows, f"what was said to {to} shows")
        return set(shown)


# Frames


class Forger:
    """Sends frames by a device of a namespace, whatever they say."""

    def __init__(self, namespace: Namespace, device: str, host_mac: bytes = b"") -> None:
        """`host_mac` is the Ethernet address of the victim; empty where the device has no link layer."""
        self._wire = namespace.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._wire.bind((device, 0))
        self.host_mac = host_mac

    def send(self, *packets: bytes, to: bytes | None = None, tag: bytes = b"") -> None:
        """Send packets in frames for the host, or for somebody else; `tag`: four bytes before the ethertype."""
        for packet in packets:
            kind = ETHERTYPE[packet[0] >> 4]
            self._wire.send((to or self.host_mac) + OWN_MAC + tag + kind + packet)

    def close(self) -> None:
        """Close the socket."""
        self._wire.close()


def open_forger(stack: AsyncExitStack, *arguments: Any) -> Forger:
    """A forger that is closed with the stack."""
    forger = Forger(*arguments)
    stack.callback(forger.close)
    return forger


def vlan(identifier: int) -> bytes:
    """A tag of IEEE 802.1Q."""
    return struct.pack("!HH", 0x8100, identifier)


def ends(source: object, source_port: int, destination: object, destination_port: int) -> str:
    """A four-tuple as tests.craft writes it."""
    return " > ".join(
        f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"
        for address, port in ((source, source_port), (destination, destination_port))
    )


def source_of(packet: bytes) -> str:
    """Where a packet comes from."""
    return str(ip_address(packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]))


def too_big(router: object, quoted: bytes, mtu: int) -> bytes:
    """A router's word that a packet was too big (RFC 1191 §4, RFC 4443 §3.2)."""
    to = source_of(quoted)
    if quoted[0] >> 4 == 4:
        return craft.error(f"{router} > {to}", quoted[:576], 3, 4, word=mtu)
    return craft.error(f"{router} > {to}", quoted[:1200], 2, 0, word=mtu)


def unreachable(router: object, quoted: bytes) -> bytes:
    """A word that nobody listens on the port (RFC 792, RFC 4443 §3.1)."""
    to = source_of(quoted)
    return craft.error(f"{router} > {to}", quoted[:576], *((3, 3) if quoted[0] >> 4 == 4 else (1, 4)))


# Router advertisements


def advertise(namespace: Namespace, device: str, *options: bytes, lifetime_s: int = 0) -> None:
    """Send a router advertisement to all on a link (RFC 4861 §4.2)."""
    message = struct.pack("!BBHBBHII", 134, 0, 0, 64, HIGH, lifetime_s, 0, 0) + b"".join(options)
    with namespace.socket(socket.AF_INET6, socket.SOCK_RAW, ICMPV6) as own:
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        own.sendto(message, ("ff02::1", 0))


def prefix(text: str, flags: int, *, lifetime_s: int = 3600) -> bytes:
    """An option that names a prefix of the link (RFC 4861 §4.6.2)."""
    address, length = text.split("/")
    packed = socket.inet_pton(socket.AF_INET6, address)
    return struct.pack("!BBBBIII16s", 3, 4, int(length), flags, lifetime_s, lifetime_s // 2, 0, packed)


def route(text: str, *, lifetime_s: int = 3600) -> bytes:
    """An option that names a route by the router (RFC 4191 §2.3)."""
    address, length = text.split("/")
    packed = socket.inet_pton(socket.AF_INET6, address)
    return struct.pack("!BBBBI16s", 24, 3, int(length), HIGH, lifetime_s, packed)


def lines(commands: Iterable[str]) -> str:
    """A script for `ip -batch`."""
    return "".join(f"{command}\n" for command in commands)
