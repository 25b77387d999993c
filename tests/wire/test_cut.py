"""Packets that are too big, made to fit; dpkt and the fragments' other end judge."""

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import craft
from tests.craft import ACK, echo, put_together, tcp, udp
from tunsplit.wire import cut, vnet
from tunsplit.wire.ip import parse_untrusted

V4, V6 = "192.0.2.7:40000 > 1.1.1.1:80", "[2001:db8:50::2]:40000 > [2001:db8::1]:80"
BOTH = pytest.mark.parametrize("flow", [V4, V6])
NAME = b"\x12\x34\x56\x78"
DF, MF = 0x4000, 0x2000


def headers(packet):
    return parse_untrusted(packet, len(packet))


def pieces(packet, mtu=1300):
    return cut.into_fragments(packet, headers(packet), mtu, NAME)


@BOTH
@pytest.mark.parametrize("build", [udp, lambda flow, data: echo(flow, 7, data)])
def test_fragments_make_the_packet_that_they_were(flow, build):
    packet = build(flow, bytes(range(250)) * 20)
    cuts = pieces(packet)

    assert {V4: 4, V6: 5}[flow] == len(cuts)
    assert max(map(len, cuts)) <= 1300
    assert packet == put_together(cuts)
    assert put_together(cuts) == put_together(cuts[::-1])


@given(size=st.integers(1, 9000), mtu=st.integers(552, 1500))
def test_whatever_the_size(size, mtu):
    for flow in (V4, V6):
        packet = udp(flow, bytes(size))
        cuts = pieces(packet, max(mtu, 1280) if flow is V6 else mtu)
        assert max(map(len, cuts)) <= max(mtu, 1280 if flow is V6 else 0)
        if len(cuts) > 1:
            assert packet == put_together(cuts)


def test_header_checksums_are_right_and_the_name_is_one():
    for identification, name in ((0, 0x1234), (9, 9)):
        cuts = pieces(udp(V4, bytes(3000), identification=identification, flags=DF))
        for one in cuts:
            parsed = dpkt.ip.IP(one)
            shown, parsed.sum = parsed.sum, 0
            assert (shown, name, False) == (dpkt.ip.IP(bytes(parsed)).sum, parsed.id, bool(parsed.df))
        assert [True, True, False] == [bool(dpkt.ip.IP(one).mf) for one in cuts]


def test_a_fragment_is_cut_further():
    packet = udp(V4, bytes(range(250)) * 20)
    first, *rest = craft.fragments(packet, 1480)

    assert packet == put_together([*pieces(first, 800), *(piece for one in rest for piece in pieces(one, 800))])


def test_nothing_comes_of_an_ipv6_fragment_nor_of_extension_headers():
    first = craft.fragments(udp(V6, bytes(3000)), 1400)[0]
    optional = craft.with_extensions(udp(V6, bytes(1400)), (craft.DESTINATION_OPTIONS, craft.PADDING))

    assert ([], []) == (pieces(first), pieces(optional))


@pytest.mark.parametrize(("packet", "may"), [(udp(V4), True), (udp(V4, flags=DF), False), (udp(V6), False)])
def test_routers_cut_what_does_not_forbid_it_and_is_of_ipv4(packet, may):
    assert may == cut.may_be_cut(packet, headers(packet))


@BOTH
@pytest.mark.parametrize("flags", [ACK, ACK | cut.CWR])
@pytest.mark.parametrize("finished", [True, False])
def test_a_segment_becomes_segments(flow, flags, finished):
    packet = bytearray(tcp(flow, bytes(1388), flags=flags))
    at = headers(packet).transport
    expected = (4 if flow is V6 else 1) | (0x80 if flags & cut.CWR else 0)
    header = bytearray(vnet.NONE)
    if not finished:
        vnet.pack(header, 0, vnet.NEEDS_CSUM, 0, 0, 0, at, 16)
        packet[at + 16 : at + 18] = b"\xab\xcd"

    cut.into_segments(memoryview(header), memoryview(packet), headers(packet), 1300)

    assert (vnet.NEEDS_CSUM, expected, at + 20, 1280 - at, at, 16) == vnet.unpack(header)
    if finished:
        cut.finish_checksum(packet, at, 16, craft.TCP)
        assert tcp(flow, bytes(1388), flags=flags) == packet
    else:
        assert b"\xab\xcd" == packet[at + 16 : at + 18]


def test_a_computed_checksum_of_zero_says_so_in_udp():
    """RFC 768."""
    for protocol, expected in ((craft.UDP, b"\xff\xff"), (craft.TCP, b"\0\0")):
        packet = bytearray(b"\xff\xff" + bytes(8))
        cut.finish_checksum(packet, 0, 6, protocol)

        assert expected == packet[6:8]
