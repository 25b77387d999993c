"""Frames for a flood, as a neighbour on the uplink's network can make them up, and a program that sends them.

The frames of one kind differ: in what they claim to come from, and in the ports, identifiers and packets that they
name. dpkt builds them.
"""

import random
import struct
from collections.abc import Callable
from ipaddress import IPv4Address

import dpkt

NAT_PORTS = (49152, 65535)
CLOSED_PORTS = (4000, 4511)
PAYLOAD = bytes(64)
NUMBER = 2048  # frames of a kind

# Sends the frames in files, each frame behind its length, through packet sockets on devices, so many a second, or as
# many as go where that is 0: of one file for a slice of the system's clock, then of the next. Prints how many of each
# went out a second. One call sends 64 (sendmmsg(2)), else Python is what is measured. Who floods has processors of his
# own: these go before others here.
SENDER = """
import ctypes, os, socket, struct, sys, time
os.setpriority(os.PRIO_PROCESS, 0, -20)
BATCH = 64
rate, seconds, slice_s = map(float, sys.argv[1:4])

class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_char_p), ("size", ctypes.c_size_t)]

class Message(ctypes.Structure):
    _fields_ = [("name", ctypes.c_void_p), ("name_size", ctypes.c_uint), ("vectors", ctypes.POINTER(Vector)),
                ("number", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_size", ctypes.c_size_t),
                ("flags", ctypes.c_int), ("sent", ctypes.c_uint)]

class Flood:
    def __init__(self, file, device):
        with open(file, "rb") as opened:
            data, frames, at = opened.read(), [], 0
        while at < len(data):
            (size,) = struct.unpack_from("!H", data, at)
            frames.append(data[at + 2 : at + 2 + size])
            at += 2 + size
        vectors = [Vector(frame, len(frame)) for frame in frames]
        self.batches = [
            (Message * BATCH)(*(Message(vectors=ctypes.pointer(one), number=1) for one in vectors[at : at + BATCH]))
            for at in range(0, len(vectors) - BATCH + 1, BATCH)
        ]
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.bind((device, 0))
        self.sent = self.turn = 0

    def send(self):
        self.turn = (self.turn + 1) % len(self.batches)
        self.sent += max(0, sendmmsg(self.socket.fileno(), self.batches[self.turn], BATCH, 0))

sendmmsg = ctypes.CDLL(None).sendmmsg
floods = [Flood(*sys.argv[at : at + 2]) for at in range(4, len(sys.argv), 2)]
ends = time.monotonic() + seconds
while (now := time.monotonic()) < ends:
    number = int(now / slice_s)
    flood, began, before = floods[number % len(floods)], now, floods[number % len(floods)].sent
    while (now := time.monotonic()) < min(ends, (number + 1) * slice_s):
        if rate and flood.sent - before >= rate * (now - began):
            time.sleep(0.0002)
        else:
            flood.send()
for flood in floods:
    print(flood.sent * len(floods) / seconds)
"""


class Forger:
    """Makes up frames.

    Args:
        source_mac: of the machine that sends them.
        target_mac: of the one that is to get them.
        target: its address.
        seed: the same one gives the same frames.
    """

    def __init__(self, source_mac: bytes, target_mac: bytes, target: IPv4Address, seed: int = 0) -> None:
        self._ethernet = target_mac + source_mac + b"\x08\x00"
        self._macs = source_mac, target_mac
        self._target = target.packed
        self._chance = random.Random(seed)

    def datagrams(self, ports: tuple[int, int], sender: tuple[IPv4Address, int] | None = None) -> list[bytes]:
        """UDP to ports in a range, from anybody or from one sender."""
        return self._frames(lambda: self._ip(dpkt.ip.IP_PROTO_UDP, self._datagram(ports, sender), sender))

    def connections(self, ports: tuple[int, int]) -> list[bytes]:
        """SYN to ports in a range, from anybody."""
        return self._frames(lambda: self._ip(dpkt.ip.IP_PROTO_TCP, self._syn(self._port(ports))))

    def fragments(self) -> list[bytes]:
        """First and later fragments of datagrams to the NAT's ports, which are never completed."""

        def make() -> bytes:
            first = self._chance.random() < 0.5
            piece = bytes(self._datagram(NAT_PORTS)) if first else PAYLOAD
            return self._ip(dpkt.ip.IP_PROTO_UDP, piece, offset=None if first else 16)

        return self._frames(make)

    def errors(self, inside: tuple[int, IPv4Address, int] | None = None, mtu: int = 0) -> list[bytes]:
        """ICMP errors about datagrams that this host is said to have sent.

        Args:
            inside: port, destination and port of a flow, else of none.
            mtu: that the datagram was too big for this path, else that nobody listens.
        """

        def make() -> bytes:
            port, address, peer_port = inside or (self._port(NAT_PORTS), self._anybody(), 443)
            quoted = dpkt.udp.UDP(sport=port, dport=peer_port, data=PAYLOAD)
            quoted.ulen = len(quoted)
            packet = dpkt.ip.IP(src=self._target, dst=address.packed, p=dpkt.ip.IP_PROTO_UDP, data=quoted)
            packet.len = len(packet)
            code = 4 if mtu else 3
            body = struct.pack("!HH", 0, mtu) + bytes(packet)
            return self._ip(dpkt.ip.IP_PROTO_ICMP, dpkt.icmp.ICMP(type=3, code=code, data=body))

        return self._frames(make)

    def arp(self) -> list[bytes]:
        """Who has this host's address? asks everybody on the network, each with a card of his own."""
        source, _ = self._macs

        def make() -> bytes:
            mac = bytes((2, *self._chance.randbytes(5)))
            sender = self._target[:3] + bytes((self._chance.randrange(100, 250),))
            asks = dpkt.arp.ARP(sha=mac, spa=sender, tha=bytes(6), tpa=self._target, op=dpkt.arp.ARP_OP_REQUEST)
            return bytes((b"\xff" * 6) + source + b"\x08\x06" + bytes(asks))

        return self._frames(make)

    def _frames(self, make: Callable[[], bytes]) -> list[bytes]:
        return [make() for _ in range(NUMBER)]

    def _ip(
        self,
        protocol: int,
        data: bytes | dpkt.Packet,
        sender: tuple[IPv4Address, int] | None = None,
        *,
        offset: int | None = 0,
    ) -> bytes:
        """A frame; `offset`, in units of eight octets, makes a later fragment of it, None the first one."""
        source = sender[0] if sender else self._anybody()
        packet = dpkt.ip.IP(
            src=source.packed, dst=self._target, p=protocol, ttl=64, id=self._chance.randrange(65536), data=data
        )
        packet.mf, packet.offset = int(offset is None), offset or 0
        packet.len = len(packet)
        return self._ethernet + bytes(packet)

    def _datagram(self, ports: tuple[int, int], sender: tuple[IPv4Address, int] | None = None) -> dpkt.udp.UDP:
        source_port = sender[1] if sender else self._port((1024, 65535))
        datagram = dpkt.udp.UDP(sport=source_port, dport=self._port(ports), data=PAYLOAD)
        datagram.ulen = len(datagram)
        return datagram

    def _syn(self, port: int) -> dpkt.tcp.TCP:
        number = self._chance.randrange(1 << 32)
        return dpkt.tcp.TCP(sport=self._port((1024, 65535)), dport=port, seq=number, flags=dpkt.tcp.TH_SYN, win=65535)

    def _port(self, ports: tuple[int, int]) -> int:
        return self._chance.randint(*ports)

    def _anybody(self) -> IPv4Address:
        return IPv4Address(self._chance.randrange(0x0B000000, 0x0F000000))  # 11.0.0.0 to 14.255.255.255
