"""IPv4 and IPv6 headers of every shape; what is none says so, and nothing else."""

import struct

import dpkt
import pytest
from hypothesis import given

from tests import craft
from tests.craft import DESTINATION_OPTIONS, HOP_BY_HOP, PADDING, ROUTING, address, tcp, udp
from tests.strategies import untrusted, wrapped
from tunsplit.errors import MalformedPacket
from tunsplit.wire.ip import Headers, parse_untrusted, protocol_name, set_header_checksum, without_options

V4 = "10.0.0.2:5000 > 1.1.1.1:53"
V6 = "[fd00::2]:5000 > [2001:db8::1]:53"


def parsed(packet: bytes) -> Headers:
    return parse_untrusted(packet, len(packet))


def cut(packet: bytes, at: int, value: int) -> bytes:
    return packet[:at] + struct.pack("!H", value) + packet[at + 2 :]


def test_a_plain_packet_of_each_version():
    assert Headers(4, 29, 17, 20, address("10.0.0.2"), address("1.1.1.1")) == parsed(udp(V4, b"?"))
    assert Headers(6, 61, 6, 40, address("fd00::2"), address("2001:db8::1")) == parsed(tcp(V6, b"?"))


def test_padding_behind_the_packet_is_not_the_packets():
    assert 29 == parsed(udp(V4, b"?") + bytes(31)).size
    assert 49 == parsed(udp(V6, b"?") + bytes(11)).size


def test_what_lies_past_the_size_is_another_packets():
    with pytest.raises(MalformedPacket):
        parse_untrusted(udp(V4, b"?"), 28)
    with pytest.raises(MalformedPacket):
        parse_untrusted(udp(V6, b"?"), 48)


def test_options_move_the_transport():
    headers = parsed(craft.with_options(udp(V4), craft.RECORD_ROUTE))

    assert (32, True, False) == (headers.transport, headers.options, headers.routed)


@pytest.mark.parametrize("kind", [131, 137])
def test_a_source_route_is_seen_behind_other_options(kind):
    options = bytes((1, 7, 7, 4, 0, 0, 0, 0)) + bytes((kind, 7, 4, 0, 0, 0, 0, 0))

    assert parsed(craft.with_options(udp(V4), options)).routed


def test_a_source_route_behind_the_end_of_options_is_none():
    assert not parsed(craft.with_options(udp(V4), bytes((0, 131, 7, 4)))).routed


def test_options_may_fill_the_header_to_its_end():
    assert not parsed(craft.with_options(udp(V4), bytes((1, 1, 1, 1)))).routed


def test_fragments_have_a_name_and_a_place():
    first, later = (parsed(piece) for piece in craft.fragments(udp(V4, bytes(16)), 16))

    assert (b"\0\7", 0, True, True) == (first.identification, first.offset, first.more, first.has_transport)
    assert (b"\0\7", 16, False, False) == (later.identification, later.offset, later.more, later.has_transport)

    first, later = (parsed(piece) for piece in craft.fragments(udp(V6, bytes(16)), 16))

    assert (b"\0\0\0\7", 0, True, 48, 17) == (
        first.identification, first.offset, first.more, first.transport, first.protocol,
    )  # fmt: skip
    assert (b"\0\0\0\7", 16, False, 48) == (later.identification, later.offset, later.more, later.transport)


def test_extension_headers_are_walked():
    headers = parsed(craft.with_extensions(udp(V6), (HOP_BY_HOP, PADDING), (DESTINATION_OPTIONS, PADDING + bytes(8))))

    assert (17, 64, True, False) == (headers.protocol, headers.transport, headers.options, headers.routed)
    assert parsed(craft.with_extensions(udp(V6), (ROUTING, PADDING))).routed


def test_eight_extension_headers_are_taken_and_nine_are_not():
    assert 17 == parsed(craft.with_extensions(udp(V6), *[(DESTINATION_OPTIONS, PADDING)] * 8)).protocol
    with pytest.raises(MalformedPacket, match="too many"):
        parsed(craft.with_extensions(udp(V6), *[(DESTINATION_OPTIONS, PADDING)] * 9))


def test_what_follows_a_later_fragments_header_is_not_walked():
    header = craft.fragment_header(64, more=True, identification=7)
    headers = parsed(craft.with_extensions(udp(V6), header, (ROUTING, PADDING)))

    assert (ROUTING, 48, False) == (headers.protocol, headers.transport, headers.routed)


def test_a_fragment_of_a_fragment_is_none():
    """RFC 8200 §4.1: a fragment header stands once; two names would let later fragments take another flow's."""
    header = craft.fragment_header(0, more=True, identification=7)

    with pytest.raises(MalformedPacket, match="two"):
        parsed(craft.with_extensions(udp(V6), header, header))


V4_PACKET, V6_PACKET = udp(V4), udp(V6)


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (b"", "empty"),
        (b"\x45", "cut"),
        (b"\x55" + V4_PACKET[1:], "version 5"),
        (b"\x44" + V4_PACKET[1:], "header is cut"),
        (b"\x4f" + V4_PACKET[1:], "header is cut"),
        (cut(V4_PACKET, 2, 19), "total length"),
        (cut(V4_PACKET, 2, 29), "total length"),
        (craft.with_options(udp(V4), bytes((1, 1, 1, 7))), "option is cut"),
        (craft.with_options(udp(V4), bytes((7, 1, 0, 0))), "option is cut"),
        (V6_PACKET[:39], "header is cut"),
        (cut(V6_PACKET, 4, 9), "payload length"),
        (craft.ip(craft.ends(V6), craft.FRAGMENT, bytes(7)), "fragment header is cut"),
        (craft.ip(craft.ends(V6), HOP_BY_HOP, bytes(7)), "extension header is cut"),
        (craft.ip(craft.ends(V6), HOP_BY_HOP, b"\x11\x01" + bytes(8)), "extension header is cut"),
    ],
)
def test_what_does_not_fit_is_malformed(packet, why):
    with pytest.raises(MalformedPacket, match=why):
        parsed(packet)


@given(untrusted)
def test_any_bytes_are_headers_that_fit_or_malformed(packet):
    try:
        headers = parsed(packet)
    except MalformedPacket:
        return
    width = {4: 4, 6: 16}[headers.version]
    assert {4: 20, 6: 40}[headers.version] <= headers.transport <= headers.size <= len(packet)
    assert (width, width) == (len(headers.source), len(headers.destination))
    assert headers.has_transport or headers.identification is not None
    assert 0 == headers.offset % 8
    assert headers == parse_untrusted(bytearray(packet + b"previous"), len(packet))


@given(wrapped())
def test_without_options_only_they_are_missing(packet):
    if packet[0] >> 4 != 4:
        return
    stripped = bytes(without_options(packet))
    theirs, ours = dpkt.ip.IP(packet), dpkt.ip.IP(stripped)

    assert (b"", 20 + len(packet) - theirs.hl * 4) == (ours.opts, ours.len)
    assert packet[theirs.hl * 4 :] == stripped[20:]
    assert 0 == dpkt.dpkt.in_cksum(stripped[:20])
    assert (theirs.id, theirs._flags_offset, theirs.ttl, theirs.p, theirs.src, theirs.dst) == (  # noqa: SLF001  # dpkt's field
        ours.id, ours._flags_offset, ours.ttl, ours.p, ours.src, ours.dst,  # noqa: SLF001  # dpkt's field
    )  # fmt: skip


def test_a_header_checksum_is_dpkts():
    packet = bytearray(craft.with_options(udp(V4), craft.RECORD_ROUTE))
    expected = bytes(packet)
    packet[10:12] = b"\xbe\xef"

    set_header_checksum(packet)
    assert expected == packet


def test_protocols_have_names_or_numbers():
    assert ["tcp", "udp", "icmp", "icmpv6", "254"] == [protocol_name(number) for number in (6, 17, 1, 58, 254)]
