"""Packets of our own, judged by dpkt: resets and ICMP errors, and where neither may be sent."""

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import craft
from tests.craft import ACK, FIN, PSH, RST, SYN, address, echo, error, fragments, tcp, udp
from tests.strategies import untrusted
from tunsplit.errors import MalformedPacket
from tunsplit.wire import checksum
from tunsplit.wire import craft as ours
from tunsplit.wire.ip import parse_untrusted

ROUTER = {4: address("10.128.0.2"), 6: address("fd75::2")}
V4, V4_BACK = "10.128.0.1:5000 > 1.1.1.1:80", "1.1.1.1:80 > 10.128.0.1:5000"
V6, V6_BACK = "[fd75::1]:5000 > [2001:db8::1]:80", "[2001:db8::1]:80 > [fd75::1]:5000"
DF = 0x4000
BOTH = pytest.mark.parametrize(("there", "back"), [(V4, V4_BACK), (V6, V6_BACK)])


def frozen(packet: bytearray | None) -> bytes | None:
    return None if packet is None else bytes(packet)


def reset(packet: bytes) -> bytes | None:
    return frozen(ours.reset(packet, parse_untrusted(packet, len(packet))))


def refusal(packet: bytes) -> bytes | None:
    headers = parse_untrusted(packet, len(packet))
    return frozen(ours.refusal(packet, headers, ROUTER[headers.version]))


def too_big(packet: bytes, mtu: int) -> bytes | None:
    headers = parse_untrusted(packet, len(packet))
    return frozen(ours.too_big(packet, headers, ROUTER[headers.version], mtu))


@BOTH
@pytest.mark.parametrize(
    ("segment", "answer"),
    [
        ({"flags": SYN, "seq": 7}, {"flags": RST | ACK, "seq": 0, "ack": 8}),
        ({"flags": SYN, "seq": 7, "data": b"fast open"}, {"flags": RST | ACK, "seq": 0, "ack": 17}),
        ({"flags": FIN, "seq": 0xFFFFFFFF}, {"flags": RST | ACK, "seq": 0, "ack": 0}),
        ({"flags": 0, "seq": 7, "data": b"?"}, {"flags": RST | ACK, "seq": 0, "ack": 8}),
        ({"flags": SYN, "seq": 7, "options": b"\x02\x04\x05\xb4"}, {"flags": RST | ACK, "seq": 0, "ack": 8}),
        ({"flags": ACK, "seq": 7, "ack": 99}, {"flags": RST, "seq": 99, "ack": 0}),
        ({"flags": ACK | PSH, "seq": 7, "ack": 99, "data": b"?"}, {"flags": RST, "seq": 99, "ack": 0}),
    ],
)
def test_a_reset_has_the_numbers_of_rfc_9293(there, back, segment, answer):
    expected = craft.transport(back, craft.TCP, bytes(dpkt.tcp.TCP(sport=80, dport=5000, win=0, **answer)), flags=DF)

    assert expected == reset(tcp(there, **segment))
    assert expected == refusal(tcp(there, **segment))


@BOTH
def test_no_reset_answers_a_reset_a_cut_segment_or_another_protocol(there, back):
    segment = tcp(there, b"?" * 32)
    at = 20 if there == V4 else 40

    assert reset(tcp(there, flags=RST)) is None
    assert reset(tcp(there, flags=RST | ACK)) is None
    assert reset(udp(there, bytes(20))) is None
    assert reset(craft.ip(craft.ends(there), craft.TCP, bytes(19))) is None
    assert reset(fragments(segment, 16)[1]) is None
    for data_offset in (0x00, 0x40, 0xF0):  # shorter than a header, longer than the packet
        body = segment[at : at + 12] + bytes((data_offset,)) + segment[at + 13 :]
        assert reset(craft.ip(craft.ends(there), craft.TCP, body)) is None


@pytest.mark.parametrize(
    ("there", "back", "kind", "code"),
    [(V4, "10.128.0.2 > 10.128.0.1", 3, 13), (V6, "fd75::2 > fd75::1", 1, 1)],
)
@pytest.mark.parametrize("size", [0, 1, 64, 4000])
def test_all_but_tcp_is_refused_as_prohibited(there, back, kind, code, size):
    packet = udp(there, bytes(size))
    quoted = packet[: 548 if there == V4 else 1232]

    assert error(back, quoted, kind, code, flags=DF) == refusal(packet)


@pytest.mark.parametrize(
    ("there", "back", "kind", "code"), [(V4, "10.128.0.2 > 10.128.0.1", 3, 4), (V6, "fd75::2 > fd75::1", 2, 0)]
)
def test_too_big_says_how_much_fits(there, back, kind, code):
    packet = udp(there, bytes(2000))
    quoted = packet[: 548 if there == V4 else 1232]

    assert error(back, quoted, kind, code, word=1420, flags=DF) == too_big(packet, 1420)


@pytest.mark.parametrize(
    "packet",
    [
        error("10.128.0.1 > 1.1.1.1", udp(V4_BACK), 3, 3),
        error("fd75::1 > 2001:db8::1", udp(V6_BACK), 1, 4),
        craft.transport("fd75::1 > 2001:db8::1", craft.ICMPV6, bytes((135,)) + bytes(23)),  # neighbour solicitation
        craft.ip(craft.ends("10.128.0.1 > 1.1.1.1"), craft.ICMP, b""),
        fragments(udp(V4, bytes(64)), 32)[1],
        fragments(udp(V6, bytes(64)), 32)[1],
        udp("10.128.0.1:5353 > 224.0.0.251:5353"),
        udp("10.128.0.1:67 > 255.255.255.255:68"),
        udp("[fd75::1]:5353 > [ff02::fb]:5353"),
        udp("0.0.0.0:68 > 1.1.1.1:67"),
        udp("[::]:68 > [2001:db8::1]:67"),
        udp("224.0.0.1:68 > 1.1.1.1:67"),
        udp("[ff02::1]:68 > [2001:db8::1]:67"),
    ],
)
def test_no_error_about_errors_fragments_or_what_is_of_many(packet):
    """RFC 1122 §3.2.2, RFC 4443 §2.4 (e)."""
    assert refusal(packet) is None
    assert too_big(packet, 1400) is None


@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("text", ["10.128.0.1 > 1.1.1.1", "fd75::1 > 2001:db8::1"])
def test_echo_is_answered_like_any_other(text, reply):
    assert refusal(echo(text, 9, reply=reply)) is not None


@given(untrusted, st.integers(0, 0xFFFF))
def test_an_answer_to_any_bytes_is_none_or_a_whole_packet(packet, mtu):
    try:
        headers = parse_untrusted(packet, len(packet))
    except MalformedPacket:
        return
    for answer in (refusal(packet), too_big(packet, mtu)):
        if answer is None:
            continue
        parsed = parse_untrusted(answer, len(answer))
        assert (len(answer), headers.source) == (parsed.size, parsed.destination)
        assert len(answer) <= {4: 576, 6: 1280}[parsed.version]
        if parsed.version == 4:
            assert 0 == dpkt.dpkt.in_cksum(bytes(answer[:20]))
        ends = craft.Ends(parsed.source, parsed.destination)
        whole = craft.with_checksum(ends, parsed.protocol, bytes(answer[parsed.transport :]))
        assert whole == answer[parsed.transport :]


@BOTH
@pytest.mark.parametrize("payload", [b"", b"x", b"answer" * 10_000])
def test_a_datagram_of_our_own(there, back, payload):
    """Up to what fits: the tun takes it whole."""
    packet = ours.Datagrams(craft.ends(back).key).packet(payload)

    parsed = dpkt.ip.IP(packet) if packet[0] >> 4 == 4 else dpkt.ip6.IP6(packet)
    source, destination = craft.ends(there).source, craft.ends(there).destination
    if packet[0] >> 4 == 4:
        assert 0 == checksum.internet_checksum(packet[:20])
    assert (destination, source) == (parsed.src, parsed.dst)
    assert udp(back, payload)[-len(payload) - 8 :] == bytes(parsed.data)
    assert (80, 5000, payload) == (parsed.data.sport, parsed.data.dport, parsed.data.data)


def test_a_datagrams_checksum_is_never_none():
    """RFC 768: a computed 0 goes out as 0xFFFF."""
    flow = ours.Datagrams(craft.ends(V4).key)
    sums = {flow.packet(number.to_bytes(2, "big"))[26:28] for number in range(0x10000)}

    assert b"\xff\xff" in sums
    assert bytes(2) not in sums


@BOTH
def test_the_shortest_packet_of_a_flow(there, back):
    key = craft.ends(there).key
    for protocol, size in ((craft.UDP, 8), (craft.TCP, 0), (132, 0)):
        packet = ours.shortest(protocol, key)
        headers = parse_untrusted(packet, len(packet))
        assert (protocol, key[: len(headers.source)]) == (headers.protocol, headers.source)
        assert len(packet) == headers.transport + size
    assert key[-4:] == ours.shortest(craft.UDP, key)[-8:-4]
    for protocol, kind in ((craft.ICMP, 8), (craft.ICMPV6, 128)):
        assert bytes((kind, 0, 0, 0)) + key[-4:-2] + bytes(2) == ours.shortest(protocol, key)[-8:]
