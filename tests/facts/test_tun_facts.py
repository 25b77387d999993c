"""What the tun relies on from Linux."""

import errno
import fcntl
import os
import select
import socket
import struct

import pytest
import trio

from tests.craft import SYN, tcp, udp
from tests.hosts import FAR4, TUN4, open_host, run
from tunsplit.kernel.descriptors import holds_tun
from tunsplit.kernel.tun import TUN_F_CSUM, TUN_F_TSO4, TUNSETOFFLOAD, Tun
from tunsplit.wire import vnet

pytestmark = pytest.mark.netns

NAME = "ts-tun"
PEER = "10.99.0.2"
UDP_SEGMENT = 103
GSO_TCP4, GSO_UDP_L4 = 1, 5


@pytest.fixture
def host():
    with open_host() as made:
        yield made


@pytest.fixture
def tun(host):
    with Tun(NAME) as made:
        host.ip(f"link set {NAME} up")
        host.ip(f"address add 10.99.0.1/24 dev {NAME}")
        yield made


def read(tun, wanted=lambda _: True):
    """Wait for a packet that is wanted: virtio header and packet."""
    buffer = memoryview(bytearray(70000))
    while select.select([tun], [], [], 5)[0]:
        if (size := tun.read_into(buffer)) and buffer[10] == 0x45 and wanted(bytes(buffer[10:size])):
            return vnet.unpack(buffer, 0), bytes(buffer[10:size])
    raise AssertionError("nothing came")


def test_reading_an_empty_tun_gives_none(host):
    with Tun(NAME) as tun:
        assert tun.read_into(bytearray(100)) is None


def test_a_large_datagram_of_many_segments_comes_as_one_super_packet(tun):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1200)
        sock.sendto(bytes(24_000), (PEER, 9))

    (_, gso_type, _, gso_size, _, _), packet = read(tun)
    assert (GSO_UDP_L4, 1200, 24_028) == (gso_type, gso_size, len(packet))


def test_an_unfinished_checksum_counts_from_the_ip_header(tun):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (PEER, 9))

    (flags, _, _, _, start, offset), _ = read(tun)
    assert (vnet.NEEDS_CSUM, 20, 6) == (flags, start, offset)


def test_tcp_comes_as_super_packets(tun):
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex((PEER, 80))
        _, opening = read(tun, lambda packet: packet[9] == 6)
        port, sequence = struct.unpack_from("!H2xI", opening, 20)
        answer = tcp(f"{PEER}:80 > 10.99.0.1:{port}", flags=18, seq=7, ack=sequence + 1, options=b"\x02\x04\x05\xb4")
        assert tun.write(vnet.NONE + answer)
        assert select.select([], [sock], [], 5)[1]
        sock.send(bytes(10_000))

        (_, gso_type, header, gso_size, _, _), packet = read(tun, lambda packet: len(packet) > 2000)
    assert (GSO_TCP4, 40, 1460) == (gso_type, header, gso_size)
    assert len(packet) > 2 * 1460


def test_super_packets_without_checksums_are_refused(host):
    with Tun(NAME) as tun, pytest.raises(OSError, match="Invalid argument"):
        fcntl.ioctl(tun.fileno(), TUNSETOFFLOAD, TUN_F_TSO4)


def test_an_unknown_offload_refuses_the_whole_set(host):
    with Tun(NAME) as tun, pytest.raises(OSError, match="Invalid argument"):
        fcntl.ioctl(tun.fileno(), TUNSETOFFLOAD, TUN_F_CSUM | 1 << 30)


def test_the_device_goes_with_its_last_descriptor(host):
    tun = Tun(NAME)
    other = os.dup(tun.fileno())
    tun.close()
    assert NAME in run("ip", "link")

    os.close(other)
    assert NAME not in run("ip", "link")


def test_writing_to_a_device_that_is_down_is_an_error(host):
    with Tun(NAME) as tun, pytest.raises(OSError, match="Input/output error") as failure:
        os.write(tun.fileno(), vnet.NONE + udp(f"{FAR4}:1 > {TUN4}:2"))
    assert errno.EIO == failure.value.errno


def test_a_removed_device_is_another(host):
    with Tun(NAME) as tun:
        host.ip(f"link delete {NAME}")
        with pytest.raises(OSError, match="bad state") as failure:
            tun.read_into(bytearray(100))
        assert errno.EBADFD == failure.value.errno


async def test_and_wakes_who_waits_for_it(host):
    with Tun(NAME) as tun, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.wait_readable, tun.fileno())
            host.ip(f"link delete {NAME}")


def test_a_packet_may_be_larger_than_the_mtu_on_its_way_in(tun):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("10.99.0.1", 4000))
        sock.settimeout(5)
        assert tun.write(vnet.NONE + udp(f"{PEER}:1 > 10.99.0.1:4000", bytes(3000)))

        assert 3000 == len(sock.recv(4000))


def test_a_syn_leaves_before_anybody_answers(tun):
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex((PEER, 80))
        _, packet = read(tun, lambda packet: packet[9] == 6)
        assert SYN == packet[33]


def test_who_holds_a_tun_is_shown_with_its_name(host):
    """drivers/net/tun.c, tun_chr_show_fdinfo; a descriptor that has no device yet shows none."""
    unattached = os.open("/dev/net/tun", os.O_RDWR)
    try:
        assert not holds_tun(os.getpid(), NAME)
        with Tun(NAME):
            assert holds_tun(os.getpid(), NAME)
            assert not holds_tun(os.getpid(), NAME[:-1])
            assert not holds_tun(os.getppid(), NAME)
        assert not holds_tun(os.getpid(), NAME)
    finally:
        os.close(unattached)
    assert not holds_tun(2**22 + 1, NAME)  # above every pid
