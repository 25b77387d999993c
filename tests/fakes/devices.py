"""A tun and a packet socket whose kernel is the test, and the flow that goes from one to the other."""

import os
import socket
from ipaddress import ip_address

from tests.craft import ends
from tunsplit.engine.flow import App, Flow
from tunsplit.engine.nat import Nat
from tunsplit.engine.ports import PortPool
from tunsplit.engine.rewrites import Way
from tunsplit.host import IPAddress, Link, Neighbour, NeighbourState
from tunsplit.kernel.packet import PacketStatistics
from tunsplit.tasks.side import HEADROOM, SideDevice, frame_buffer
from tunsplit.wire import vnet

TUN4, TUN6 = "10.128.0.1", "2001:2:0:5::1"
HOST4, HOST6 = "192.168.50.2", "2001:db8:50::2"
ROUTER4, ROUTER6 = ip_address("192.168.50.1"), ip_address("fe80::1")
FAR4, FAR6 = "198.51.100.1", "2001:db8:100::1"
SIGNER = {4: ip_address("10.128.0.2").packed, 6: ip_address("2001:2:0:5::2").packed}

OWN_MAC, ROUTER_MAC, OTHER_MAC = b"\x02\x00\x00\x00\x00\x02", b"\x02\x00\x00\x00\x00\x01", b"\x02\x00\x00\x00\x00\x09"
ETH0 = Link(2, "eth0", 1500, mac=OWN_MAC)
WG0 = Link(3, "wg0", 1420, kind="wireguard", is_layer2=False)
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58


class Pipe:
    """A descriptor that becomes readable when the test puts something in; one piece a read."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setblocking(False)
        self._far.setblocking(False)

    def put(self, data: bytes) -> None:
        self._far.send(data)

    def fileno(self) -> int:
        return self._near.fileno()

    def recv_into(self, buffer: memoryview) -> int | None:
        try:
            return self._near.recv_into(buffer)
        except BlockingIOError:
            return None

    def close(self) -> None:
        self._near.close()
        self._far.close()


class FakeTun:
    """What an app `sends` is read; what is written is kept in `answers`, without virtio headers."""

    name = "tunsplit0"

    def __init__(self) -> None:
        self._pipe = Pipe()
        self.answers: list[bytes] = []
        self.dropped = self.renewals = 0
        self.errors: list[OSError] = []  # the next reads end in these
        self.reads = 0

    def sends(self, *packets: bytes, header: bytes = vnet.NONE) -> None:
        for packet in packets:
            self._pipe.put(header + packet)

    def fileno(self) -> int:
        return self._pipe.fileno()

    def read_into(self, buffer: memoryview) -> int | None:
        self.reads += 1
        if self.errors:
            raise self.errors.pop()
        return self._pipe.recv_into(buffer)

    def write(self, packet: bytes | bytearray | memoryview) -> bool:
        self.answers.append(bytes(packet[vnet.SIZE :]))
        return True

    def close(self) -> None:
        self._pipe.close()


class FakeSocket:
    """A packet socket: what is sent is kept in `frames`, what the test `delivers` is read."""

    def __init__(self, *, ethernet: bool = True) -> None:
        self.ethernet = ethernet
        self.frames: list[bytes] = []
        self.errno = 0  # of every send
        self.errors: list[OSError] = []  # the next reads end in these
        self._pipe = Pipe()

    def send(self, frame: memoryview) -> int:
        if self.errno:
            raise OSError(self.errno, os.strerror(self.errno))
        self.frames.append(bytes(frame))
        return len(frame)

    @property
    def packets(self) -> list[bytes]:
        """What was sent, from the IP header on."""
        return [frame[vnet.SIZE + 14 * self.ethernet :] for frame in self.frames]

    def delivers(self, packet: bytes, *, header: bytes = vnet.NONE, padding: int = 0) -> None:
        ethertype = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
        ethernet = OWN_MAC + ROUTER_MAC + ethertype if self.ethernet else b""
        self._pipe.put(header + ethernet + packet + bytes(padding))

    def read_into(self, frame: memoryview) -> int:
        if self.errors:
            raise self.errors.pop()
        return self._pipe.recv_into(frame) or 0

    def fileno(self) -> int:
        return self._pipe.fileno()

    def statistics(self) -> PacketStatistics:
        return PacketStatistics(len(self.frames), 0)

    def close(self) -> None:
        self._pipe.close()


class Side:
    """A device of a side with a fake socket, and all that it asked of others."""

    def __init__(self, side: str = "uplink", link: Link = ETH0) -> None:
        self.socket = FakeSocket(ethernet=link.is_layer2)
        self.asked: list[IPAddress] = []
        self.answers = True  # whether the kernel takes the question for a neighbour
        self.too_big: list[tuple[bytes, int]] = []
        self.knows = False  # whether the app has been told before
        self.unreachable: list[bytes] = []
        self.no_way: list[bytes] = []
        self.device = SideDevice(
            side,
            link,
            self.socket,  # type: ignore[arg-type]  # a fake
            resolve=self._resolve,
            too_big=self._too_big,
            unreachable=lambda _, packet: self.unreachable.append(packet),
            no_way=lambda _, packet: self.no_way.append(packet),
        )

    def _too_big(self, _: object, packet: bytes, mtu: int) -> bool:
        self.too_big.append((packet, mtu))
        return not self.knows

    def _resolve(self, _: int, address: IPAddress) -> bool:
        self.asked.append(address)
        return self.answers

    def neighbour(self, address: IPAddress, mac: bytes | None, state: int = NeighbourState.REACHABLE) -> None:
        self.device.neighbour_changed(Neighbour(self.device.link.index, address, mac, state))

    def way(self, address: IPAddress = ROUTER4, *, version: int = 4, source: str = HOST4) -> Way:
        return Way(self.device.side, self.device, self.device.next_hop(address, version), ip_address(source).packed)

    def close(self) -> None:
        if not self.device.closed:
            self.socket.close()


def nat() -> Nat:
    """A table of flows with a few ports."""
    return Nat({name: PortPool(50000, 50063, lambda _: 0) for name in ("tcp", "udp", "echo")})


def draw_all(table: Nat, name: str) -> None:
    """Draw every port of a pool, so that any of them may be used."""
    pool = table.pools[name]
    while True:
        if pool.must_reserve:
            pool.reserve(0.0)
        if pool.draw() is None:
            return


class ThisBatch(float):
    """The time of every batch: nobody has to ask again whose socket it is."""

    def __ne__(self, _: object) -> bool:
        return False

    def __eq__(self, _: object) -> bool:
        return True

    __hash__ = float.__hash__


def opened(table: Nat, text: str, way: Way, *, protocol: int = UDP, port: int = 50000, app: App | None = None) -> Flow:
    """Open a flow as if its port had been drawn."""
    draw_all(table, {TCP: "tcp", UDP: "udp"}.get(protocol, "echo"))
    flow = table.open(protocol, ends(text).key, way, port, 0.0, app=app, reason="default", attribution="exact")
    flow.original.last_seen = ThisBatch()
    return flow


def framed(packet: bytes, header: bytes = vnet.NONE) -> tuple[memoryview, int]:
    """A packet in a frame buffer, and its size."""
    frame = frame_buffer()
    frame[HEADROOM - vnet.SIZE : HEADROOM] = header
    frame[HEADROOM : HEADROOM + len(packet)] = packet
    return frame, len(packet)
