"""Ping and raw sockets are found in their tables."""

import socket
import sys
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.apps import FAR4, FAR6, OWN4, OWN6, inode
from tunsplit.errors import KernelError
from tunsplit.kernel.procnet import (
    PacketSocket,
    TableSocket,
    count_xdp_sockets,
    find_ping,
    find_raw,
    packet_sockets,
    parse_packet_table,
    parse_protocols,
    parse_table,
    ping_sockets,
    raw_sockets,
)

ICMP, ICMPV6 = socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6
V4, V6 = socket.AF_INET, socket.AF_INET6

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref\n"


def packed(address):
    return socket.inet_pton(V6 if ":" in address else V4, address)


def ping(address, identifier):
    family = V6 if ":" in address else V4
    sock = socket.socket(family, socket.SOCK_DGRAM, ICMPV6 if family == V6 else ICMP)
    sock.bind((address, identifier))
    return sock


@pytest.mark.netns
@pytest.mark.parametrize(
    ("version", "own", "bound"), [(4, OWN4, "0.0.0.0"), (4, OWN4, OWN4), (6, OWN6, "::"), (6, OWN6, OWN6)]
)
def test_a_ping_socket_is_found_by_its_identifier(tun, version, own, bound):
    with ping(bound, 777) as sock, ping(bound, 778):
        assert [inode(sock)] == [row.inode for row in find_ping(ping_sockets(version), 777, packed(own))]


@pytest.mark.netns
def test_a_ping_socket_of_another_address_is_not_the_sender(tun):
    with ping("127.0.0.1", 777):
        assert [] == find_ping(ping_sockets(4), 777, packed(OWN4))


@pytest.mark.netns
@pytest.mark.parametrize(("version", "own", "far", "protocol"), [(4, OWN4, FAR4, ICMP), (6, OWN6, FAR6, ICMPV6)])
def test_raw_sockets_are_found_by_protocol_address_and_peer(tun, version, own, far, protocol):
    family = V6 if version == 6 else V4

    def raw(number=protocol):
        return socket.socket(family, socket.SOCK_RAW, number)

    with raw() as anywhere, raw() as bound, raw() as connected, raw() as elsewhere, raw() as other_peer, raw(47):
        bound.bind((own, 0))
        connected.connect((far, 0))
        elsewhere.bind(("::1" if version == 6 else "127.0.0.1", 0))
        other_peer.connect((own, 0))
        found = find_raw(raw_sockets(version), protocol, packed(own), packed(far))
        assert {inode(one) for one in (anywhere, bound, connected)} == {row.inode for row in found}


@pytest.mark.netns
def test_nobody_pings_in_a_new_namespace(tun):
    assert [] == find_ping(ping_sockets(4), 777, packed(OWN4)) + find_raw(
        raw_sockets(6), ICMPV6, packed(OWN6), packed(FAR6)
    )


def test_a_kernel_without_a_table_has_no_such_sockets(monkeypatch, tmp_path):
    monkeypatch.setattr("tunsplit.kernel.procnet.TABLES", tmp_path)
    assert [] == find_ping(ping_sockets(6), 777, packed(OWN6))


def test_a_table_that_cannot_be_read_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "icmp").mkdir()
    monkeypatch.setattr("tunsplit.kernel.procnet.TABLES", tmp_path)
    with pytest.raises(KernelError, match="/proc/net/icmp: Is a directory"):
        find_ping(ping_sockets(4), 777, packed(OWN4))


def shown(address):
    words = [int.from_bytes(address[at : at + 4], sys.byteorder) for at in range(0, len(address), 4)]
    return "".join(f"{word:08X}" for word in words)


def line(row):
    return (
        f"{row.number % 64:5}: {shown(row.local)}:{row.number:04X} {shown(row.remote)}:0000 07 00000000:00000000"
        f" 00:00000000 00000000 {row.uid:5}        0 {row.inode} 2 0000000041d8da0a 0"
    )


numbers = st.integers(0, 0xFFFFFFFF)
rows = st.sampled_from((4, 16)).flatmap(
    lambda size: st.builds(
        TableSocket,
        numbers,
        numbers,
        st.integers(0, 0xFFFF),
        st.binary(min_size=size, max_size=size),
        st.binary(min_size=size, max_size=size),
    )
)


@given(st.lists(rows))
def test_a_table_is_read_as_it_was_written(table):
    assert table == parse_table(HEADER + "".join(line(row) + "      \n" for row in table))


@given(st.text(), st.integers(0, 200))
def test_a_table_of_nonsense_is_refused_or_empty(text, cut):
    good = line(TableSocket(1, 2, 3, bytes(4), bytes(4)))
    for table in (text, HEADER + text, HEADER + good[:cut]):
        with suppress(KernelError):
            parse_table(table)


@pytest.mark.parametrize(
    "row", ["1:", "1: 00:1 00000000:0 07 0 0 0 0 0 1", "1: 00000000:1 00000000:0 07 0 0 0 0 0 inode"]
)
def test_an_unknown_row_is_refused(row):
    with pytest.raises(KernelError, match="unknown row"):
        parse_table(HEADER + row)


AF_XDP = 44


@pytest.mark.netns
def test_packet_sockets_are_told_by_device(tun):
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as anywhere,
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as bound,
    ):
        bound.bind(("lo", 0x0800))
        wanted = {PacketSocket(inode(anywhere), 0), PacketSocket(inode(bound), socket.if_nametoindex("lo"))}
        assert wanted == set(packet_sockets())


@pytest.mark.netns
def test_xdp_sockets_are_counted(tun):
    assert 0 == count_xdp_sockets()
    with socket.socket(AF_XDP, socket.SOCK_RAW), socket.socket(AF_XDP, socket.SOCK_RAW):
        assert 2 == count_xdp_sockets()


@pytest.mark.parametrize("row", ["0000 3 3 0300", "0000 3 3 0300 eth0 1 0 0 7", "0000 3 3 0300 1 1 0 0 inode"])
def test_an_unknown_row_of_packet_sockets_is_refused(row):
    with pytest.raises(KernelError, match="/proc/net/packet: unknown row"):
        parse_packet_table(f"sk RefCnt Type Proto  Iface R Rmem   User   Inode\n{row}\n")


@pytest.mark.parametrize("row", ["", "XDP 1088", "XDP 1088 some"])
def test_unknown_protocols_are_refused(row):
    with pytest.raises(KernelError, match="/proc/net/protocols: unknown row"):
        parse_protocols(f"protocol  size sockets\n{row}\n")


def test_protocols_that_are_not_counted_have_none():
    assert {"XDP": 3, "NETLINK": 0} == parse_protocols("protocol size sockets\nXDP 1088 3 -1\nNETLINK 1 -1 -1\n")
