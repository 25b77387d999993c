"""Packet sockets."""

import errno
import os
import socket
import struct

import pytest

from tests.hosts import UPLINK
from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel import packet
from tunsplit.kernel.packet import PacketSocket, PacketStatistics, inbound_filter
from tunsplit.wire import vnet

pytestmark = pytest.mark.netns


def opened(device=UPLINK, **others):
    return PacketSocket(device, ethernet=True, first_port=49152, **others)


def test_nothing_there_is_no_bytes(host):
    with opened() as sock:
        assert sock.read_into(memoryview(bytearray(100))) is None


def test_it_is_not_inherited(host):
    with opened() as sock:
        assert (False, False) == (os.get_inheritable(sock.fileno()), os.get_blocking(sock.fileno()))


def test_a_device_that_is_not_there_is_an_error(host):
    with pytest.raises(KernelError, match="packet socket on ts-none: No such device"):
        opened("ts-none")


def test_a_missing_capability_is_named(host, monkeypatch):
    def forbid(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("tunsplit.kernel.packet.socket.socket", forbid)
    with pytest.raises(PermissionMissing, match="CAP_NET_RAW"):
        opened()


def test_statistics_add_up_over_looks(host):
    with opened() as sock, host.at_router(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as router:
        for seen in (1, 2):
            router.sendto(b"x", ("192.168.50.2", 50000))
            while not sock.read_into(memoryview(bytearray(100))):
                continue
            assert PacketStatistics(seen, 0) == sock.statistics()


def test_what_does_not_fit_into_the_queue_is_counted(host, monkeypatch):
    monkeypatch.setattr(packet, "QUEUE", 1)
    with opened() as sock, host.at_router(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as router:
        for _ in range(50):
            router.sendto(bytes(1000), ("192.168.50.2", 50000))
        statistics = sock.statistics()

    assert 50 == statistics.packets
    assert statistics.drops > 0


def test_the_filter_cannot_be_taken_off(host):
    with opened() as sock, pytest.raises(PermissionError):
        sock._attach(struct.pack("=HBBI", 6, 0, 0, 0))  # noqa: SLF001  # what somebody with the descriptor could try


def test_after_close_nothing_works(host):
    sock = opened()
    sock.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        sock.send(vnet.NONE)


@pytest.mark.parametrize("ethernet", [True, False])
def test_any_number_of_protocols_can_be_listed(host, ethernet):
    program = inbound_filter(49152, frozenset(range(256)), ethernet=ethernet)
    assert len(program) % 8 == 0
    with opened(protocols=frozenset(range(256))):
        pass


def test_no_jump_leads_out_of_the_program():
    program = inbound_filter(49152, frozenset(range(256)), ethernet=True)
    steps = list(struct.iter_unpack("=HBBI", program))
    for at, (code, yes, no, _) in enumerate(steps):
        if code & 7 == 5:  # BPF_JMP
            assert at + 1 + max(yes, no) < len(steps)
    assert 6 == steps[-1][0]  # BPF_RET
