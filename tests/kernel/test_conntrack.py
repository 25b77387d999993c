"""What the kernel tracks is found by either of its tuples."""

import errno
import socket
import subprocess
from pathlib import Path

import pytest

from tests.apps import own_network
from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel import conntrack
from tunsplit.kernel.conntrack import Conntrack, Entry, Tuple
from tunsplit.kernel.netlink import NetlinkSocket, Refused

pytestmark = pytest.mark.netns

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP

TRACKING = """
table inet tracking {
    chain output {
        type filter hook output priority 0
        ct state established accept
    }
}
"""
REDIRECT = """
table inet elsewhere {
    chain output {
        type nat hook output priority -100
        udp dport 53 redirect to :5353
    }
}
"""


@pytest.fixture
def network():
    with own_network():
        yield


@pytest.fixture
def track(network):
    with Conntrack() as found:
        yield found


def nft(ruleset):
    subprocess.run(["nft", "-f", "-"], input=ruleset, text=True, check=True)


def exchange(address, port=0, asked=None):
    """A datagram from one socket to another: the ports of both."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server, socket.socket(family, socket.SOCK_DGRAM) as client:
        server.bind((address, port))
        client.bind((address, 0))
        client.sendto(b"?", (address, asked or server.getsockname()[1]))
        return client.getsockname()[1], server.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_entry_is_found_from_both_ends(track, address):
    nft(TRACKING)
    client, server = exchange(address)
    packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    entry = Entry(Tuple(packed, packed, client, server), Tuple(packed, packed, server, client))
    assert entry == track.find(UDP, packed, packed, client, server)
    assert entry == track.find(UDP, packed, packed, server, client)
    assert track.has_entry(UDP, packed, packed, client, server)


def test_a_translated_flow_shows_where_it_went(track):
    nft(REDIRECT)
    client, _ = exchange("127.0.0.1", 5353, asked=53)
    here = socket.inet_aton("127.0.0.1")
    entry = track.find(UDP, here, here, client, 53)
    assert (53, 5353) == (entry.original.destination_port, entry.reply.source_port)
    assert entry == track.find(UDP, here, here, 5353, client)
    assert track.find(UDP, here, here, 53, client) is None


def test_another_protocol_is_another_flow(track):
    nft(TRACKING)
    client, server = exchange("127.0.0.1")
    here = socket.inet_aton("127.0.0.1")
    assert not track.has_entry(TCP, here, here, client, server)


def test_nothing_is_tracked_where_no_rule_asks_for_it(track):
    client, server = exchange("127.0.0.1")
    here = socket.inet_aton("127.0.0.1")
    assert track.available
    assert track.find(UDP, here, here, client, server) is None


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_kernel_that_does_not_track_knows_nothing(network, monkeypatch, code):
    def refuse(self, what, *_):
        raise Refused(what, code)

    monkeypatch.setattr(NetlinkSocket, "look_up", refuse)
    with Conntrack() as track:
        assert not track.available
        assert track.find(UDP, bytes(4), bytes(4), 1, 2) is None


def test_a_kernel_without_netfilter_knows_nothing(network, monkeypatch):
    monkeypatch.setattr(conntrack, "NETLINK_NETFILTER", 31)
    assert not Conntrack().available


def test_any_other_answer_is_an_error(network, monkeypatch):
    def refuse(self, what, *_):
        raise Refused(what, errno.EIO)

    with Conntrack() as track:
        monkeypatch.setattr(NetlinkSocket, "look_up", refuse)
        with pytest.raises(KernelError, match="conntrack: Input/output error"):
            track.find(UDP, bytes(4), bytes(4), 1, 2)
        with pytest.raises(KernelError, match="conntrack: Input/output error"):
            Conntrack()


def test_a_user_namespace_of_its_own_is_named_as_what_forbids_to_ask(monkeypatch):
    def refuse(self, what, *_):
        raise Refused(what, errno.EPERM)

    monkeypatch.setattr(NetlinkSocket, "look_up", refuse)
    with pytest.raises(PermissionMissing, match="not permitted: CAP_NET_ADMIN counts in the user namespace that owns"):
        Conntrack()


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Sets how many connections there may be, and are; None: the kernel does not track."""
    monkeypatch.setattr("tunsplit.kernel.sysctl.ROOT", tmp_path)
    (tmp_path / "net/netfilter").mkdir(parents=True)

    def be(most, count):
        for name, number in (("max", most), ("count", count)):
            file = tmp_path / f"net/netfilter/nf_conntrack_{name}"
            file.unlink(missing_ok=True)
            if number is not None:
                file.write_text(f"{number}\n")
        return conntrack.shortage()

    return be


def test_room_for_connections_is_as_the_kernel_says():
    most, count = (int(Path(f"/proc/sys/net/netfilter/nf_conntrack_{name}").read_text()) for name in ("max", "count"))
    assert (most < conntrack.FEW or count >= 0.9 * most) == (conntrack.shortage() is not None)


@pytest.mark.parametrize(("most", "count"), [(262_144, 0), (16_384, 0), (20_000, 17_999), (None, None)])
def test_enough_room_is_not_told_of(room, most, count):
    assert room(most, count) is None


@pytest.mark.parametrize(("most", "count"), [(20_000, 18_000), (16_383, 0), (8192, 9000)])
def test_too_little_room_is_told_of(room, most, count):
    assert f"room for {most:,} connections, and {count:,} are open" in room(most, count)


def test_room_that_cannot_be_read_is_told_of(room, tmp_path):
    (tmp_path / "net/netfilter/nf_conntrack_max").mkdir()
    assert "cannot be known" in str(conntrack.shortage())
