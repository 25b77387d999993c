"""What packet sockets rely on from Linux, and what the filter of what may be ours lets through."""

import errno
import os
import socket
import struct
from contextlib import ExitStack

import dpkt
import pytest

from tests.craft import (
    HOP_BY_HOP,
    PADDING,
    RECORD_ROUTE,
    echo,
    error,
    fragments,
    tcp,
    transport,
    udp,
    with_extensions,
    with_options,
)
from tests.hosts import FAR4, FAR6, HOST4, HOST6, ROUTER4, TUNNEL, UPLINK, awaited, open_host, run
from tunsplit.kernel.packet import PACKET_VNET_HDR, SOL_PACKET, PacketSocket
from tunsplit.wire import vnet

pytestmark = pytest.mark.netns

FIRST = 49152
SCTP = 132
BROADCAST, STRANGER = b"\xff" * 6, b"\x02\x00\x00\x00\x00\x99"
MARKER = udp(f"{FAR4}:1 > {HOST4}:65535", b"marker")


@pytest.fixture
def host():
    with open_host() as made:
        yield made


class Wire:
    """The router's end of the uplink, and our packet socket on the other."""

    def __init__(self, host, stack):
        self.own = host.link(UPLINK).mac
        self.socket = stack.enter_context(
            PacketSocket(UPLINK, ethernet=True, first_port=FIRST, protocols=frozenset({SCTP}))
        )
        with host.at_router():
            self._router = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
            self._router.bind(("toh", 0))

    def send(self, packet, *, to=None, vlan=False):
        ethertype = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
        tag = b"\x81\x00\x00\x07" if vlan else b""
        self._router.send((to or self.own) + STRANGER + tag + ethertype + packet)

    def received(self):
        """All that has come by now, from the IP header on."""
        self.send(MARKER)
        seen: list[bytes] = []
        frame = memoryview(bytearray(70000))
        while True:
            if size := self.socket.read_into(frame):
                packet = bytes(frame[24:size])
                length = 40 + int.from_bytes(packet[4:6], "big") if packet[0] >> 4 == 6 else None
                packet = packet[: length or int.from_bytes(packet[2:4], "big")]
                if packet == MARKER:
                    return seen
                seen.append(packet)


@pytest.fixture
def wire(host):
    with ExitStack() as stack:
        yield Wire(host, stack)


def v4(port):
    return f"{FAR4}:53 > {HOST4}:{port}"


def v6(port):
    return f"[{FAR6}]:53 > [{HOST6}]:{port}"


FAR_TO_US4, FAR_TO_US6 = f"{FAR4} > {HOST4}", f"{FAR6} > {HOST6}"

PASSES = {
    "tcp": tcp(v4(FIRST)),
    "udp, last port": udp(v4(65535)),
    "tcp over ipv6": tcp(v6(FIRST)),
    "udp over ipv6": udp(v6(FIRST)),
    "ipv4 options": with_options(udp(v4(FIRST)), RECORD_ROUTE),
    "a first fragment": fragments(udp(v4(FIRST), bytes(2000)), 1280)[0],
    "a later fragment": fragments(udp(v4(1), bytes(2000)), 1280)[1],
    "an ipv6 fragment": fragments(udp(v6(1), bytes(2000)), 1280)[1],
    "extension headers": with_extensions(udp(v6(1)), (HOP_BY_HOP, PADDING)),
    "an echo reply": echo(FAR_TO_US4, FIRST, reply=True),
    "an echo reply over ipv6": echo(FAR_TO_US6, FIRST, reply=True),
    "unreachable": error(FAR_TO_US4, udp(f"{HOST4}:{FIRST} > {FAR4}:53"), 3, 3),
    "time exceeded": error(FAR_TO_US4, udp(f"{HOST4}:{FIRST} > {FAR4}:53"), 11),
    "parameter problem": error(FAR_TO_US4, udp(f"{HOST4}:{FIRST} > {FAR4}:53"), 12),
    **{f"icmpv6 error {kind}": error(FAR_TO_US6, udp(f"[{HOST6}]:1 > [{FAR6}]:2"), kind) for kind in (1, 2, 3, 4)},
    "a listed protocol": transport(FAR_TO_US4, SCTP, bytes(12)),
    "a listed protocol over ipv6": transport(FAR_TO_US6, SCTP, bytes(12)),
}

STOPS = {
    "tcp below the range": tcp(v4(FIRST - 1)),
    "udp below the range": udp(v4(53)),
    "tcp over ipv6 below the range": tcp(v6(FIRST - 1)),
    "options and a port below the range": with_options(udp(v4(FIRST - 1)), RECORD_ROUTE),
    "a first fragment below the range": fragments(udp(v4(1), bytes(2000)), 1280)[0],
    "an echo request": echo(FAR_TO_US4, FIRST),
    "an echo request over ipv6": echo(FAR_TO_US6, FIRST),
    "an echo reply with another's identifier": echo(FAR_TO_US4, FIRST - 1, reply=True),
    "the same over ipv6": echo(FAR_TO_US6, FIRST - 1, reply=True),
    "a redirect": error(FAR_TO_US4, udp(f"{HOST4}:{FIRST} > {FAR4}:53"), 5),
    "a neighbour advertisement": transport(FAR_TO_US6, 58, bytes((136, 0)) + bytes(22)),
    "a reserved icmpv6 type": transport(FAR_TO_US6, 58, bytes(24)),
    "a protocol that is not listed": transport(FAR_TO_US4, 47, bytes(12)),
    "the same, over ipv6": transport(FAR_TO_US6, 47, bytes(12)),
    "no packet": b"\x45",
}


@pytest.mark.parametrize("name", PASSES)
def test_what_may_be_ours_passes(wire, name):
    wire.send(PASSES[name])

    assert 1 == wire.received().count(PASSES[name])


@pytest.mark.parametrize("name", STOPS)
def test_what_cannot_be_ours_stops(wire, name):
    wire.send(STOPS[name])

    assert STOPS[name] not in wire.received()  # what the kernel answers may be answered too


@pytest.mark.parametrize("how", [{"to": BROADCAST}, {"to": STRANGER}, {"vlan": True}])
def test_nor_does_what_is_not_for_us(wire, how):
    wire.send(PASSES["udp, last port"], **how)

    assert [] == wire.received()


def test_frames_that_are_no_ip_stop(host, wire):
    run("ip", "neigh", "flush", "dev", UPLINK)
    with host.at_router():
        run("ip", "neigh", "flush", "dev", "toh")
        run("ping", "-c1", "-W1", HOST4)

    assert [] == wire.received()


def test_the_tap_sees_what_prerouting_drops(host, wire):
    run("nft", "-f", "-", text="table inet t { chain c { type filter hook prerouting priority -199\n drop\n }\n }\n")
    wire.send(PASSES["tcp"])

    assert [PASSES["tcp"]] == wire.received()


def test_our_own_frames_are_spared_us(wire):
    wire.socket.send(vnet.NONE + STRANGER + wire.own + b"\x08\x00" + udp(v4(FIRST)))

    assert [] == wire.received()


# Headers


def test_a_veth_delivers_unfinished_checksums(host, wire):
    with host.at_router(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (HOST4, FIRST))
    frame = memoryview(bytearray(70000))
    while not (size := wire.socket.read_into(frame)):
        continue

    flags, _, _, _, start, offset = vnet.unpack(frame, 0)
    assert (vnet.NEEDS_CSUM, 14 + 20, 6) == (flags, start, offset)
    assert not is_right(bytes(frame[24:size]))


def is_right(packet):
    kept = packet[26:28]
    computed = bytes(dpkt.ip.IP(packet[:26] + bytes(2) + packet[28:]))
    return kept == computed[26:28]


def test_a_device_without_link_layer_has_no_ethernet_header(host):
    with PacketSocket(TUNNEL, ethernet=False, first_port=FIRST) as sock:
        packet = udp(f"{FAR4}:53 > 10.64.0.2:{FIRST}")
        os.write(host.tunnel, packet)
        frame = memoryview(bytearray(70000))
        while not (size := sock.read_into(frame)):
            continue
        assert vnet.NONE + packet == bytes(frame[:size])

        sock.send(vnet.NONE + udp(f"10.64.0.2:{FIRST} > {FAR4}:53"))
        assert awaited(host.tunnel, lambda: os.read(host.tunnel, 70000), f"UDP 10.64.0.2:{FIRST}", describe)


def describe(packet):
    if packet[0] != 0x45:
        return "other"
    parsed = dpkt.ip.IP(packet)
    return f"UDP {socket.inet_ntoa(parsed.src)}:{parsed.data.sport}" if parsed.p == 17 else "other"


def test_virtio_headers_need_raw_sockets(host):
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sock,
        pytest.raises(OSError, match="Invalid argument"),
    ):
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)


def test_segments_that_are_too_big_leave_in_silence(host, wire):
    own, router = wire.own, host.wire
    packet = udp(f"{HOST4}:{FIRST} > {ROUTER4}:9", bytes(4000))
    header = struct.pack("<BBHHHH", vnet.NEEDS_CSUM, 5, 42, 3000, 34, 6)

    assert wire.socket.send(header + BROADCAST + own + b"\x08\x00" + packet)
    assert router.recv(70000)  # what the veth's other end makes of it is its own affair


def test_a_plain_frame_that_is_too_big_does_not(wire):
    with pytest.raises(OSError, match="too long") as failure:
        wire.socket.send(vnet.NONE + BROADCAST + wire.own + b"\x08\x00" + udp(v4(FIRST), bytes(2000)))
    assert errno.EMSGSIZE == failure.value.errno


# Devices that go


def test_a_device_that_goes_down_is_told_once(host, wire):
    host.ip(f"link set {UPLINK} down")
    frame = memoryview(bytearray(100))
    with pytest.raises(OSError, match="down") as failure:
        wire.socket.read_into(frame)

    assert (errno.ENETDOWN, None) == (failure.value.errno, wire.socket.read_into(frame))


def test_and_works_again_when_it_is_back(host, wire):
    host.ip(f"link set {UPLINK} down")
    with pytest.raises(OSError, match="down"):
        wire.socket.read_into(memoryview(bytearray(100)))
    host.ip(f"link set {UPLINK} up")
    wire.send(PASSES["tcp"])

    assert [PASSES["tcp"]] == wire.received()


def test_a_device_that_is_gone_takes_no_frame(host, wire):
    own = wire.own
    host.ip(f"link delete {UPLINK}")
    with pytest.raises(OSError, match="No such device"):
        wire.socket.send(vnet.NONE + BROADCAST + own + b"\x08\x00" + udp(v4(FIRST)))
