"""Frames kept, flows counted."""

from collections import Counter
from ipaddress import ip_address

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunsplit.lab import record
from tunsplit.lab.frames import parse_untrusted
from tunsplit.lab.record import Record, get_key_untrusted

IPV4, IPV6 = 0x0800, 0x86DD


def udp(source, destination, payload=b"0123456789abcdef0123456789abcdef"):
    """A packet, from "a:1" to "b:2"."""
    (a, sport), (b, dport) = (end.rsplit(":", 1) for end in (source, destination))
    data = dpkt.udp.UDP(sport=int(sport), dport=int(dport), ulen=8 + len(payload), data=payload)
    return bytes(dpkt.ip.IP(src=ip_address(a).packed, dst=ip_address(b).packed, p=17, data=data))


def see(records: Record, packet: bytes, direction="out", ethertype=IPV4) -> None:
    """What an observer does with a frame."""
    if not records.count_untrusted(packet, ethernet=False, ethertype=ethertype):
        records.keep_untrusted(
            packet, ethernet=False, ethertype=ethertype, direction=direction, time=0.0, octets=len(packet)
        )


@pytest.fixture
def seen_two():
    records = Record()
    see(records, udp("10.0.0.1:5000", "10.0.0.2:53", b"question" * 4))
    see(records, udp("10.0.0.2:53", "10.0.0.1:5000", b"an answer" * 4), "in")
    return records


@pytest.mark.parametrize(
    ("wanted", "directions"),
    [
        ({}, ["out", "in"]),
        ({"protocol": "udp"}, ["out", "in"]),
        ({"protocol": "tcp"}, []),
        ({"destination": "10.0.0.2"}, ["out"]),
        ({"source": ip_address("10.0.0.2")}, ["in"]),
        ({"address": "10.0.0.2"}, ["out", "in"]),
        ({"address": "10.0.0.3"}, []),
        ({"port": 5000}, ["out", "in"]),
        ({"port": 54}, []),
        ({"payload": b"answer"}, ["in"]),
        ({"payload": b"answer", "destination": "10.0.0.2"}, []),
    ],
)
def test_all_that_is_asked_for_must_apply(seen_two, wanted, directions):
    assert directions == [seen.direction for seen in seen_two.seen(**wanted)]


def test_all_frames_are_counted_and_the_first_of_each_flow_are_kept(monkeypatch):
    monkeypatch.setattr(record, "KEPT", 10)
    records = Record()
    for number in range(25):
        see(records, udp("10.0.0.1:1", "10.0.0.2:2", b"%032d" % number))
    see(records, udp("10.0.0.1:3", "10.0.0.2:2"))

    assert [25, 1] == list(records.flows().values())
    assert [10, 1] == [len(records.seen(port=port)) for port in (1, 3)]


def test_the_vpns_own_packets_are_kept_apart_from_clear_text_on_their_port(monkeypatch):
    monkeypatch.setattr(record, "KEPT", 1)
    records = Record()
    for _ in range(3):
        see(records, udp("10.0.0.1:9", "203.0.113.10:51820", b"\4\0\0\0" + bytes(28)))
        see(records, udp("10.0.0.1:9", "203.0.113.10:51820", b"clear text" * 4))

    assert [("udp", 3)] == [(flow.protocol, count) for flow, count in records.flows().items()]
    assert [b"clear"] == [seen.payload[:5] for seen in records.seen()]
    assert 1 == len(records.seen("wireguard"))


def test_more_flows_than_can_be_told_apart_are_counted_as_one(monkeypatch):
    monkeypatch.setattr(record, "FLOWS", 3)
    records = Record()
    for port in range(1, 11):
        see(records, udp(f"10.0.0.1:{port}", "10.0.0.2:2"))
        see(records, udp(f"10.0.0.1:{port}", "10.0.0.2:2"))

    assert 20 == records.flows().total()
    assert 4 == len(records.flows())
    assert 14 == records.flows()[record.OTHERS]


def test_a_frame_of_a_flow_that_is_counted_with_others_is_found_as_what_it_is(monkeypatch):
    monkeypatch.setattr(record, "FLOWS", 1)
    records = Record()
    see(records, bytes(dpkt.ip.IP(src=bytes(4), dst=bytes(4), p=99, data=b"")))
    for _ in range(2):
        see(records, udp("10.0.0.1:9", "10.0.0.2:2"))

    assert 2 == len(records.seen(port=9))


@pytest.mark.parametrize("length", [20, 27])
def test_a_packet_that_says_it_is_too_short_for_ports_has_none(length):
    records = Record()
    whole = udp("10.0.0.1:9", "10.0.0.2:2")
    see(records, whole)
    see(records, whole[:2] + length.to_bytes(2, "big") + whole[4:])

    assert [9, None] == [seen.source_port for seen in records.seen()]
    assert 1 == len(records.seen(port=9))


def test_nothing_is_left_after_clear(seen_two):
    seen_two.clear()

    assert [] == seen_two.seen()
    assert not seen_two.flows()


# The count by octets must agree with what a parser says.

header = st.sampled_from([b"\x45", b"\x46", b"\x60"])
protocol = st.sampled_from([6, 17, 1, 44])
port = st.sampled_from([b"\x00\x07", (51820).to_bytes(2, "big")])


@st.composite
def packets(draw):
    first = draw(header)
    ports = draw(port) + draw(port)
    rest = ports + b"\0\x20\0\0" + draw(st.sampled_from([b"\4\0\0\0", b"text"])) + bytes(draw(st.sampled_from([0, 40])))
    length = bytes((0, draw(st.sampled_from([0, 4, 8, 22, 28, 52, 96]))))  # the truth or not
    if first == b"\x60":
        return IPV6, first + bytes(3) + length + bytes((draw(protocol), 64)) + draw(address) * 4 + rest
    fragment = draw(st.sampled_from([b"\0\0", b"\x40\0", b"\x20\0", b"\0\x10"]))
    head = first + b"\0" + length + b"\0\0" + fragment + b"\x40" + bytes((draw(protocol),)) + b"\0\0"
    return IPV4, head + draw(address) * 2 + rest


address = st.sampled_from([b"\x0a\0\0\1", b"\x0a\0\0\2"])


@given(packets(), packets())
def test_octets_tell_flows_apart_as_a_parser_does(one, other):
    keys = [get_key_untrusted(packet, 0, ethertype) for ethertype, packet in (one, other)]
    flows = [parse_untrusted(packet, ethernet=False, ethertype=ethertype).flow for ethertype, packet in (one, other)]

    if None not in keys:
        assert (keys[0] == keys[1]) == (flows[0] == flows[1])


@given(st.lists(packets(), max_size=6))
def test_a_frame_is_kept_as_what_a_parser_says_that_it_is(several):
    records = Record()
    for ethertype, packet in several:
        see(records, packet, ethertype=ethertype)

    parsed = [parse_untrusted(packet, ethernet=False, ethertype=ethertype) for ethertype, packet in several]
    for one in parsed:
        same = [other.payload for other in parsed if other.flow == one.flow]
        found = records.seen(one.protocol, one.destination, one.source, payload=one.payload)
        assert [payload for payload in same if one.payload in payload] == [
            seen.payload for seen in found if seen.flow == one.flow
        ]
    clear = [one.flow for one in parsed if one.protocol != "wireguard"]
    assert Counter(clear) == records.flows()


@given(st.binary(max_size=80), st.sampled_from([IPV4, IPV6]))
def test_any_octets_may_be_counted(frame, ethertype):
    key = get_key_untrusted(frame, 14, ethertype)
    assert key is None or len(key) in (13, 37)
