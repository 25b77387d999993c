"""Sockets are found by what they send."""

import errno
import socket
import sys
from contextlib import ExitStack

import pytest

from tests.apps import FAR4, FAR6, OWN4, OWN6, TUN, connecting, flow, inode, key, udp
from tunsplit.errors import KernelError
from tunsplit.kernel import sockdiag
from tunsplit.kernel.sockdiag import CLOSE, ESTABLISHED, LISTEN, SYN_SENT, SockDiag

pytestmark = pytest.mark.netns

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture
def diag(tun):
    with SockDiag(socket.if_nametoindex(TUN)) as sockets:
        yield sockets


def connected_pair(family, address):
    with socket.create_server((address, 0), family=family) as server:
        client = socket.create_connection(server.getsockname()[:2])
        return client, server.accept()[0]


@pytest.mark.parametrize(("family", "address"), [(V4, "127.0.0.1"), (V6, "::1")])
def test_both_ends_of_a_connection_are_found(diag, family, address):
    client, server = connected_pair(family, address)
    with client, server:
        for one in (client, server):
            found = diag.find(TCP, key(family, *one.getsockname()[:2], *one.getpeername()[:2]))
            assert (inode(one), ESTABLISHED) == (found.inode, found.state)


@pytest.mark.parametrize(("version", "family"), [(4, V4), (4, V6), (6, V6)])
def test_a_connecting_socket_is_found(diag, version, family):
    with connecting(version=version, family=family) as sock:
        found = diag.find(TCP, flow(sock, version=version))
        assert (inode(sock), 0, SYN_SENT, 0) == (found.inode, found.uid, found.state, found.interface)


@pytest.mark.parametrize(
    ("family", "bound", "version"), [(V4, "", 4), (V4, OWN4, 4), (V6, "::", 4), (V6, "::", 6), (V6, OWN6, 6)]
)
def test_an_unconnected_udp_socket_is_found(diag, family, bound, version):
    with udp(bound, family=family) as sock:
        found = diag.find(UDP, flow(sock, version=version))
        assert (inode(sock), CLOSE) == (found.inode, found.state)
        assert [found] == diag.find_all(flow(sock, version=version))


def test_a_connected_udp_socket_is_found(diag):
    with udp() as sock:
        sock.connect((FAR4, 80))
        found = diag.find(UDP, flow(sock))
        assert (inode(sock), ESTABLISHED) == (found.inode, found.state)


@pytest.mark.parametrize("device", ["", TUN])
def test_a_socket_that_is_bound_to_the_tun_is_found_like_any_other(diag, device):
    with connecting(device=device) as sock:
        assert inode(sock) == diag.find(TCP, flow(sock)).inode


def test_no_socket_no_answer(diag):
    with udp(port=80):  # bound to the remote port of the flow that is asked for
        assert diag.find(UDP, key(V4, OWN4, 4000, FAR4, 80)) is None
    assert diag.find(TCP, key(V4, OWN4, 4000, FAR4, 80)) is None
    assert [] == diag.find_all(key(V6, OWN6, 4000, "2001:db8::1", 80))
    assert {"found": 2, "missed": 2, "destroyed": 0, "failed": 0, "stale": 0} == diag.statistics()


@pytest.mark.parametrize("bound", ["0.0.0.0", OWN4])
def test_a_listener_is_found_for_whoever_connects(diag, bound):
    with socket.create_server((bound, 8080)) as server:
        found = diag.find_listener(key(V4, OWN4, 8080, FAR4, 5555))
        assert (inode(server), LISTEN) == (found.inode, found.state)
    assert diag.find_listener(key(V4, OWN4, 8080, FAR4, 5555)) is None


def test_everybody_on_a_udp_port_may_be_the_sender(diag):
    reuse = (socket.SO_REUSEADDR,)
    group = "224.0.0.251"
    with (
        udp("", 5353, options=reuse) as wildcard,
        udp("", 5353, options=reuse) as connected,
        udp(group, 5353, options=reuse) as multicast,
        udp("127.0.0.1", 5353, options=reuse) as elsewhere,
        udp("::", 5353, options=reuse, family=V6) as dual_stack,
    ):
        connected.connect((FAR4, 9))
        found = diag.find_all(key(V4, OWN4, 5353, FAR4, 80))
        everybody = {inode(one) for one in (wildcard, connected, multicast, elsewhere, dual_stack)}
        assert everybody == {one.inode for one in found}


def test_a_socket_for_ipv6_alone_sends_no_ipv4(diag):
    with socket.socket(V6, socket.SOCK_DGRAM) as only6, udp("", 5353):
        only6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        only6.bind(("::", 5353))
        assert inode(only6) not in {one.inode for one in diag.find_all(key(V4, OWN4, 5353, FAR4, 80))}
        assert [inode(only6)] == [one.inode for one in diag.find_all(key(V6, OWN6, 5353, "2001:db8::1", 80))]


def test_a_socket_that_is_bound_to_another_device_is_no_sender(diag):
    with socket.socket(V4, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        sock.bind(("", 5353))
        assert [] == diag.find_all(key(V4, OWN4, 5353, FAR4, 80))


def test_a_thousand_sockets_on_a_port_are_all_seen(diag):
    sockets = [udp("", 5353, options=(socket.SO_REUSEADDR,)) for _ in range(1000)]
    try:
        assert {inode(one) for one in sockets} == {one.inode for one in diag.find_all(key(V4, OWN4, 5353, FAR4, 80))}
    finally:
        for one in sockets:
            one.close()


@pytest.mark.parametrize("count", [2, 3, 7, 300])
def test_one_walk_finds_the_senders_of_many_flows(diag, count):
    """The same as one walk for each; some ports have nobody, one has two sockets, and some flows are IPv6."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(udp("", 0)) for _ in range(count)]
        ports = [one.getsockname()[1] for one in sockets]
        stack.enter_context(udp("::", 5353, options=(socket.SO_REUSEADDR,), family=V6))
        stack.enter_context(udp("", 5353, options=(socket.SO_REUSEADDR,)))
        flows = [key(V4, OWN4, port, FAR4, 80) for port in (*ports, 5353, 1, 65535)]
        flows.append(key(V6, OWN6, 5353, "2001:db8::1", 80))

        found = diag.find_all_of(flows)

        assert {one: diag.find_all(one) for one in flows} == found
        assert [[inode(one)] for one in sockets] == [[sender.inode for sender in found[one]] for one in flows[:count]]
        assert [2, 0, 0, 1] == [len(found[one]) for one in flows[count:]]


# The end of a socket


def told(sock):
    """What a socket says of itself: the name of its error, if any."""
    return errno.errorcode.get(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


@pytest.mark.parametrize(("family", "address"), [(V4, "127.0.0.1"), (V6, "::1")])
def test_one_end_of_a_connection_is_ended(diag, family, address):
    client, server = connected_pair(family, address)
    with client, server:
        assert diag.destroy(TCP, key(family, *client.getsockname()[:2], *client.getpeername()[:2]))
        assert ("ECONNABORTED", "ECONNRESET") == (told(client), told(server))
    assert 1 == diag.statistics()["destroyed"]


@pytest.mark.parametrize("device", ["", TUN])
@pytest.mark.parametrize(("version", "family"), [(4, V4), (4, V6), (6, V6)])
def test_a_connecting_socket_is_ended(diag, version, family, device):
    with connecting(version=version, family=family, device=device) as sock:
        assert diag.destroy(TCP, flow(sock, version=version))
        assert "ECONNABORTED" == told(sock)
        assert not diag.destroy(TCP, flow(sock, version=version))


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize(("version", "family", "bound"), [(4, V4, ""), (4, V4, OWN4), (4, V6, "::"), (6, V6, "::")])
def test_a_udp_socket_is_ended(diag, version, family, bound, connected):
    with udp(bound, family=family) as sock:
        if connected:
            sock.connect((FAR6 if version == 6 else FAR4 if family == V4 else f"::ffff:{FAR4}", 80))
        assert diag.destroy(UDP, flow(sock, version=version))
        assert "ECONNABORTED" == told(sock)


@pytest.mark.parametrize("cookie", [None, bytes(8)])
def test_a_listener_is_never_ended(diag, cookie):
    with socket.create_server(("", 8080)) as server:
        assert not diag.destroy(TCP, key(V4, OWN4, 8080, FAR4, 5555), cookie)
        assert diag.find_listener(key(V4, OWN4, 8080, FAR4, 5555)) is not None
        assert told(server) is None


def test_a_stranger_on_the_same_port_is_spared(diag):
    with udp(port=5353) as first:
        cookie = diag.find(UDP, flow(first)).cookie
    with udp(port=5353) as second:
        assert not diag.destroy(UDP, flow(second), cookie)
        assert told(second) is None
        assert diag.destroy(UDP, flow(second), diag.find(UDP, flow(second)).cookie)


def test_who_takes_the_port_in_the_last_moment_is_spared(diag, monkeypatch):
    """Between our look and the end itself, the kernel compares cookies."""
    with udp(port=5353) as sock:
        found = diag.find(UDP, flow(sock))
        monkeypatch.setattr(SockDiag, "find", lambda *_: found._replace(cookie=b"x" * 8))
        assert not diag.destroy(UDP, flow(sock))
        assert told(sock) is None


def test_an_innocent_socket_on_the_remote_port_is_spared(diag):
    with udp(port=80) as innocent:
        assert not diag.destroy(UDP, key(V4, OWN4, 4000, FAR4, 80))
        assert told(innocent) is None


class Answering:
    """A netlink socket that says no to whoever asks for an end."""

    def __init__(self, inner, code):
        self.inner, self.code, self.request = inner, code, b""

    def send(self, request):
        self.request = request
        return self.inner.send(request)

    def recv_into(self, buffer):
        size = self.inner.recv_into(buffer)
        if sockdiag.SOCK_DESTROY == int.from_bytes(self.request[4:6], sys.byteorder):
            buffer[16:20] = (-self.code).to_bytes(4, sys.byteorder, signed=True)
        return size

    def close(self):
        self.inner.close()


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.EOPNOTSUPP, r"not supported.+CONFIG_INET_DIAG_DESTROY"), (errno.EPERM, "Operation not permitted")],
)
def test_a_kernel_that_ends_no_sockets_says_why(diag, monkeypatch, code, says):
    monkeypatch.setattr(diag, "_socket", Answering(diag._socket, code))  # noqa: SLF001 -- the kernel's answer
    with udp() as sock, pytest.raises(KernelError, match=says):
        diag.destroy(UDP, flow(sock))


# Ports


def holder_of_port(kind, how):
    """A socket that has port 50000 in one of the ways in which one can."""
    sock = socket.socket(V6 if how == "dual-stack" else V4, kind)
    if how == "device":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, TUN.encode())
    sock.bind((OWN4 if how == "address" else "::" if how == "dual-stack" else "", 50000))
    if how == "connected":
        sock.setblocking(False)
        sock.connect_ex((FAR4, 80))
    if how == "listening":
        sock.listen()
    return sock


@pytest.mark.parametrize("how", ["wildcard", "address", "dual-stack", "connected", "device"])
@pytest.mark.parametrize(("protocol", "kind"), [(TCP, socket.SOCK_STREAM), (UDP, socket.SOCK_DGRAM)])
def test_a_port_that_any_socket_has_is_bound(diag, protocol, kind, how):
    with holder_of_port(kind, how):
        assert diag.is_bound(protocol, 4, 50000)
    assert not diag.is_bound(protocol, 4, 50000)


def test_a_listeners_port_is_bound(diag):
    with holder_of_port(socket.SOCK_STREAM, "listening"):
        assert diag.is_bound(TCP, 4, 50000)


def test_a_port_of_another_protocol_is_free(diag):
    with udp("127.0.0.1", 50000):
        assert not diag.is_bound(TCP, 4, 50000)
        assert not diag.is_bound(UDP, 4, 50001)


def test_a_port_of_the_other_family_is_free(diag):
    with socket.socket(V6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::1", 50000))
        assert not diag.is_bound(UDP, 4, 50000)
        assert diag.is_bound(UDP, 6, 50000)


def test_what_the_kernel_refuses_is_an_error(diag, monkeypatch):
    monkeypatch.setattr(sockdiag, "REQUEST_SIZE", 40)
    with pytest.raises(KernelError, match=r"sock_diag: Invalid argument"):
        diag.find(UDP, key(V4, OWN4, 4000, FAR4, 80))
    assert 1 == diag.statistics()["failed"]


def test_a_dump_that_was_given_up_does_not_answer_the_next_request(diag):
    with udp("", 5353) as sock:
        everybody = diag._dump(V4, UDP, [(5353).to_bytes(2)], sockdiag.ALL_STATES)  # noqa: SLF001 -- what find_all reads to its end
        next(everybody)
        assert inode(sock) == diag.find(UDP, flow(sock)).inode
        assert diag.statistics()["stale"] > 0


def test_an_answer_that_was_lost_is_an_error_not_an_absence(diag, monkeypatch):
    class Deaf:
        def __init__(self, inner):
            self.inner = inner

        def send(self, request):
            return len(request)

        def recv_into(self, buffer):
            return self.inner.recv_into(buffer)

        def close(self):
            self.inner.close()

    monkeypatch.setattr(diag, "_socket", Deaf(diag._socket))  # noqa: SLF001 -- the request never arrives
    with pytest.raises(KernelError, match="temporarily unavailable"):
        diag.find(UDP, key(V4, OWN4, 4000, FAR4, 80))


def test_a_kernel_without_sock_diag_is_named(monkeypatch):
    monkeypatch.setattr(sockdiag, "NETLINK_SOCK_DIAG", 31)
    with pytest.raises(KernelError, match=r"Protocol not supported.+CONFIG_INET_DIAG"):
        SockDiag()


def test_a_kernel_with_half_of_sock_diag_is_named(tun, monkeypatch):
    monkeypatch.setattr(SockDiag, "_find", lambda *_: None)
    with pytest.raises(KernelError, match=r"does not find a socket of our own.+CONFIG_INET_DIAG"):
        SockDiag()
