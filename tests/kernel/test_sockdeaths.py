"""Dead sockets are told of by their cookies."""

import select
import socket
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.apps import flow, key, udp
from tunsplit.errors import KernelError
from tunsplit.kernel import sockdeaths
from tunsplit.kernel.sockdeaths import SocketDeaths, parse_death

netns = pytest.mark.netns

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture
def deaths(tun, diag):
    with SocketDeaths(socket.IPPROTO_TCP, socket.IPPROTO_UDP) as listening:
        while select.select([listening], [], [], 0.05)[0]:  # of those that the other fixtures tried
            listening.read()
        yield listening


def told_of(deaths, wanted):
    """Read until one is told of, by protocol and cookie; None when nothing more comes."""
    while select.select([deaths], [], [], 3)[0]:
        for death in deaths.read():
            if (death.protocol, death.cookie) == wanted:
                return death
    return None


@netns
@pytest.mark.parametrize(("version", "family"), [(4, V4), (4, V6), (6, V6)])
def test_a_dead_udp_socket_is_told_of(deaths, diag, version, family):
    with udp("" if family == V4 else "::", family=family) as sock:
        cookie = diag.find(UDP, flow(sock, version=version)).cookie
        assert [] == deaths.read()
        port = sock.getsockname()[1]
    assert port == int.from_bytes(told_of(deaths, (UDP, cookie)).port, "big")


@netns
@pytest.mark.parametrize(("family", "address"), [(V4, "127.0.0.1"), (V6, "::1")])
def test_both_ends_of_a_connection_are_told_of(deaths, diag, family, address):
    with socket.create_server((address, 0), family=family) as server:
        client = socket.create_connection(server.getsockname()[:2])
        accepted = server.accept()[0]
    ends = [client.getsockname()[:2], accepted.getsockname()[:2]]
    cookies = [diag.find(TCP, key(family, *one, *other)).cookie for one, other in (ends, ends[::-1])]
    for sock, cookie in zip((client, accepted), cookies, strict=True):
        sock.close()
        assert told_of(deaths, (TCP, cookie))


@netns
def test_what_was_told_is_counted(deaths):
    """Nobody has to die meanwhile, but somebody may: the news of a socket closed earlier come late."""
    before = deaths.statistics()["deaths"]
    assert {"deaths": before + len(deaths.read()), "overruns": 0} == deaths.statistics()


@netns
def test_a_batch_is_bounded(deaths, monkeypatch):
    monkeypatch.setattr(sockdeaths, "BATCH", 3)
    before = deaths.statistics()["deaths"]
    for _ in range(5):
        udp().close()
    total = 0
    while total < 5 and select.select([deaths], [], [], 3)[0]:
        found = deaths.read()
        assert len(found) <= 3
        total += len(found)
    assert 5 <= total == deaths.statistics()["deaths"] - before  # one of the fixtures' may come late


@netns
def test_what_was_lost_is_counted(tun, monkeypatch):
    monkeypatch.setattr(sockdeaths, "BUFFER", 1)
    with SocketDeaths(socket.IPPROTO_TCP, socket.IPPROTO_UDP) as deaths:
        while not deaths.statistics()["overruns"]:
            for _ in range(20):
                udp().close()
            assert select.select([deaths], [], [], 3)[0]
            deaths.read()


@netns
def test_a_kernel_that_does_not_tell_is_an_error(tun, monkeypatch):
    monkeypatch.setattr(sockdeaths, "GROUPS", {socket.IPPROTO_TCP: (1000,), socket.IPPROTO_UDP: ()})
    with pytest.raises(KernelError, match="news of dead sockets: Invalid argument"):
        SocketDeaths(socket.IPPROTO_TCP, socket.IPPROTO_UDP)


@netns
def test_a_kernel_without_sock_diag_is_an_error(tun, monkeypatch):
    monkeypatch.setattr(sockdeaths, "NETLINK_SOCK_DIAG", 31)
    with pytest.raises(KernelError, match="sock_diag: news of dead sockets: Protocol not supported"):
        SocketDeaths(socket.IPPROTO_TCP, socket.IPPROTO_UDP)


@netns
def test_news_that_end_are_an_error(deaths):
    deaths.close()
    with pytest.raises(KernelError, match="Bad file descriptor"):
        deaths.read()


@given(st.binary(max_size=200))
def test_any_bytes_tell_of_a_death_or_of_none(message):
    death = parse_death(message, len(message))
    assert death is None or (len(death.port), len(death.cookie)) == (2, 8)


@pytest.mark.parametrize("kind", [2, 20])
def test_what_is_no_death_or_has_no_protocol_is_none(kind):
    message = bytearray(100)
    message[4:6] = kind.to_bytes(2, sys.byteorder)
    assert parse_death(message, len(message)) is None


@given(st.binary(min_size=84, max_size=84), st.lists(st.binary(max_size=9), max_size=4), st.integers(0, 255))
def test_the_protocol_is_found_after_any_attributes(body, others, protocol):
    """The header's kind is set; attribute 2 is INET_DIAG_INFO, 10 INET_DIAG_PROTOCOL."""
    message = bytearray(bytes(4) + body)
    message[4:6] = (20).to_bytes(2, sys.byteorder)
    for other in others:
        size = len(other) + 4
        message += size.to_bytes(2, sys.byteorder) + (2).to_bytes(2, sys.byteorder) + other + bytes(-size % 4)
    message += (5).to_bytes(2, sys.byteorder) + (10).to_bytes(2, sys.byteorder) + bytes((protocol, 0, 0, 0))
    assert (protocol, bytes(message[20:22]), bytes(message[60:68])) == parse_death(message, len(message))
