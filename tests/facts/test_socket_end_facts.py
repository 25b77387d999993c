"""What ending sockets, and hearing of their end, relies on from Linux."""

import errno
import os
import select
import socket
import sys

import pytest
from dpkt import ip, tcp
from dpkt import udp as udp_packet

from tests.apps import FAR4, OWN4, connecting, flow, key, own_network, udp
from tunsplit.kernel.sockdeaths import SocketDeaths
from tunsplit.kernel.sockdiag import SOCK_DESTROY

pytestmark = pytest.mark.netns

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP


def sent(tun, wanted=None):
    """The next packet of this kind that comes out of the tun; None when none does."""
    while select.select([tun], [], [], 1)[0]:
        packet = ip.IP(os.read(tun, 65536))
        if wanted is None or wanted(packet):
            return packet
    return None


def is_reset(packet):
    return isinstance(packet.data, tcp.TCP) and packet.data.flags & tcp.TH_RST


def connected(tun):
    """A connection to the far end, which we play."""
    sock = connecting()
    syn = sent(tun).data
    answer = tcp.TCP(sport=80, dport=syn.sport, seq=7000, ack=syn.seq + 1, flags=tcp.TH_SYN | tcp.TH_ACK)
    packet = ip.IP(src=socket.inet_aton(FAR4), dst=socket.inet_aton(OWN4), p=TCP, ttl=64, data=answer)
    os.write(tun, bytes(packet))
    assert select.select([], [sock], [], 1)[1]
    return sock


# SOCK_DESTROY


def test_a_connection_that_is_ended_says_so_to_its_process(tun, diag):
    with connected(tun) as sock:
        diag.destroy(TCP, flow(sock))
        with pytest.raises(ConnectionAbortedError):
            sock.recv(1)


def test_the_kernels_rst_of_an_ended_connection_comes_out_of_the_tun(tun, diag):
    with connected(tun) as sock:
        port = sock.getsockname()[1]
        diag.destroy(TCP, flow(sock))
        reset = sent(tun, is_reset)
        assert (FAR4, port, 80) == (socket.inet_ntoa(reset.dst), reset.data.sport, reset.data.dport)


def test_a_connection_not_yet_made_ends_without_a_rst(tun, diag):
    with connecting() as sock:
        diag.destroy(TCP, flow(sock))
        assert sent(tun, is_reset) is None


def test_a_connected_udp_socket_that_is_ended_has_no_peer_any_more(tun, diag):
    with udp() as sock:
        sock.connect((FAR4, 80))
        diag.destroy(UDP, flow(sock))
        with pytest.raises(ConnectionAbortedError):
            sock.recv(1)
        with pytest.raises(OSError) as caught:  # noqa: PT011 -- its errno is the point
            sock.send(b"x")
        assert errno.EDESTADDRREQ == caught.value.errno


def test_a_wildcard_udp_socket_that_is_ended_sends_again(tun, diag):
    with udp() as sock:
        diag.destroy(UDP, flow(sock))
        with pytest.raises(ConnectionAbortedError):
            sock.recv(1)
        sock.sendto(b"x", (FAR4, 80))
        packet = sent(tun, lambda packet: isinstance(packet.data, udp_packet.UDP))
        assert sock.getsockname()[1] == packet.data.sport


def answer_to_destroy(diag, protocol, wanted, cookie):
    """The kernel's error number, for the four-tuple as it is given."""
    source_port, destination_port, source, destination = wanted
    ports = source_port.to_bytes(2), destination_port.to_bytes(2)
    addresses = socket.inet_aton(source), socket.inet_aton(destination)
    diag._ask(5, socket.AF_INET, protocol, *ports, *addresses, SOCK_DESTROY, cookie)  # noqa: SLF001 -- as it is sent
    diag._receive()  # noqa: SLF001 -- as it is sent
    return -int.from_bytes(diag._answer[16:20], sys.byteorder, signed=True)  # noqa: SLF001 -- as it is sent


@pytest.mark.parametrize(("swapped", "code"), [(False, 0), (True, errno.ENOENT)])
def test_the_end_of_a_udp_socket_is_asked_for_in_plain_order(diag, swapped, code):
    with udp(address=OWN4) as sock:
        sock.connect((FAR4, 80))
        cookie, port = diag.find(UDP, flow(sock)).cookie, sock.getsockname()[1]
        wanted = (80, port, FAR4, OWN4) if swapped else (port, 80, OWN4, FAR4)
        assert code == answer_to_destroy(diag, UDP, wanted, cookie)


def test_without_a_cookie_the_listener_would_be_ended_in_the_place_of_a_connection(diag):
    with socket.create_server(("", 8080)):
        assert 0 == answer_to_destroy(diag, TCP, (8080, 5555, OWN4, FAR4), b"\xff" * 8)
        assert diag.find_listener(key(socket.AF_INET, OWN4, 8080, FAR4, 5555)) is None


def test_a_cookie_that_is_not_the_sockets_spares_it(diag):
    with socket.create_server(("", 8080)):
        assert errno.ENOENT == answer_to_destroy(diag, TCP, (8080, 5555, OWN4, FAR4), b"\1" * 8)
        assert diag.find_listener(key(socket.AF_INET, OWN4, 8080, FAR4, 5555)) is not None


# Socket deaths


@pytest.fixture
def deaths(diag):
    with SocketDeaths(socket.IPPROTO_TCP, socket.IPPROTO_UDP) as listening:
        while select.select([listening], [], [], 0.05)[0]:
            listening.read()
        yield listening


def test_a_shared_socket_dies_with_its_last_descriptor(deaths, diag):
    with udp() as sock:
        cookie = diag.find(UDP, flow(sock)).cookie
        with sock.dup():
            sock.close()
            assert not select.select([deaths], [], [], 0.1)[0]
    assert select.select([deaths], [], [], 3)[0]
    assert [(UDP, cookie)] == [(death.protocol, death.cookie) for death in deaths.read()]


def test_a_connection_in_time_wait_counts_as_dead(deaths, diag):
    with socket.create_server(("127.0.0.1", 0)) as server:
        client, (accepted, _) = socket.create_connection(server.getsockname()), server.accept()
        one = key(socket.AF_INET, *client.getsockname(), *client.getpeername())
        cookie = diag.find(TCP, one).cookie
        client.close()
        accepted.close()
        died = []
        while (TCP, cookie) not in died:
            assert select.select([deaths], [], [], 3)[0]
            died += [(death.protocol, death.cookie) for death in deaths.read()]
        assert (0, cookie) == diag.find(TCP, one)[0:3:2]


def test_sockets_of_other_network_namespaces_die_unheard(deaths):
    with own_network():
        udp().close()
    assert not select.select([deaths], [], [], 0.1)[0]
