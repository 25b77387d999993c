"""What an observer writes down about a frame; dpkt builds, hypothesis breaks."""

from ipaddress import ip_address

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunsplit.lab.frames import Seen, parse_untrusted

HOST, SERVER = ip_address("192.168.50.2"), ip_address("198.51.100.1")
HOST6, SERVER6 = ip_address("2001:db8:50::2"), ip_address("2001:db8:100::1")
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD


def ipv4(transport, protocol, **fields):
    return bytes(dpkt.ip.IP(src=HOST.packed, dst=SERVER.packed, p=protocol, data=transport, **fields))


def ipv6(transport, protocol, destination=SERVER6):
    body = bytes(transport)
    return bytes(dpkt.ip6.IP6(src=HOST6.packed, dst=destination.packed, nxt=protocol, plen=len(body), data=transport))


def parse(packet, ethertype=IPV4):
    return parse_untrusted(packet, ethernet=False, ethertype=ethertype)


def ends(seen: Seen):
    return seen.protocol, seen.source, seen.source_port, seen.destination, seen.destination_port


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
def test_ports_and_payload(protocol, version):
    transport = {
        "tcp": dpkt.tcp.TCP(sport=1000, dport=7, data=b"hello", opts=b"\1\1\1\1", off=6),
        "udp": dpkt.udp.UDP(sport=1000, dport=7, ulen=13, data=b"hello"),
    }[protocol]
    number = {"tcp": 6, "udp": 17}[protocol]
    seen = parse(ipv4(transport, number)) if version == 4 else parse(ipv6(transport, number), IPV6)

    assert (protocol, *((HOST, 1000, SERVER, 7) if version == 4 else (HOST6, 1000, SERVER6, 7))) == ends(seen)
    assert b"hello" == seen.payload


@pytest.mark.parametrize("version", [4, 6])
def test_a_reset_is_known_as_such(version):
    for flags, expected in ((dpkt.tcp.TH_RST, True), (dpkt.tcp.TH_RST | dpkt.tcp.TH_ACK, True), (0xFB, False)):
        segment = dpkt.tcp.TCP(sport=1000, dport=7, flags=flags)
        seen = parse(ipv4(segment, 6)) if version == 4 else parse(ipv6(segment, 6), IPV6)

        assert expected is seen.is_reset


def test_a_link_header_and_a_vlan_tag_are_looked_through():
    packet = ipv4(dpkt.udp.UDP(sport=1, dport=2, ulen=9, data=b"x"), 17)
    macs = bytes(12)

    assert b"x" == parse_untrusted(macs + b"\x08\x00" + packet, ethernet=True, ethertype=0).payload
    tagged = macs + b"\x81\x00\x00\x05\x08\x00" + packet
    assert b"x" == parse_untrusted(tagged, ethernet=True, ethertype=0).payload


def test_padding_is_no_payload():
    packet = ipv4(dpkt.udp.UDP(sport=1, dport=2, ulen=9, data=b"x"), 17)

    assert b"x" == parse(packet + bytes(18)).payload


def test_an_echo_has_an_identifier():
    packet = ipv4(dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=77, seq=1, data=b"ping")), 1)

    seen = parse(packet)

    assert ("icmp", 77, 8, b"ping") == (seen.protocol, seen.identifier, seen.kind, seen.payload)


def test_an_error_quotes_its_packet():
    quoted = ipv4(dpkt.udp.UDP(sport=5, dport=6, ulen=8), 17)
    error = dpkt.icmp.ICMP(type=3, code=3, data=dpkt.icmp.ICMP.Unreach(data=quoted[:28]))

    seen = parse(ipv4(error, 1))

    assert seen.quoted is not None
    assert ("udp", HOST, 5, SERVER, 6) == ends(seen.quoted)


def test_fragments_are_known_as_such_and_later_ones_have_no_ports():
    first = parse(ipv4(dpkt.udp.UDP(sport=5, dport=6, ulen=8), 17, mf=1))
    later = parse(ipv4(b"the rest of it", 17, offset=185))

    assert (True, 5) == (first.fragment, first.source_port)
    assert (True, "udp", None, b"the rest of it") == (later.fragment, later.protocol, later.source_port, later.payload)


def test_fragments_of_ipv6_too():
    header = bytes((17, 0, 0, 0b00001000 | 1)) + bytes(4)  # offset 8 octets, more to come
    seen = parse(ipv6(header + b"the rest of it", 44), IPV6)

    assert (True, "udp", None, b"the rest of it") == (seen.fragment, seen.protocol, seen.source_port, seen.payload)


def test_extension_headers_are_looked_through():
    options = bytes((17, 0, 1, 4)) + bytes(4)  # next header UDP, PadN
    seen = parse(ipv6(options + bytes(dpkt.udp.UDP(sport=5, dport=6, ulen=9, data=b"x")), 60), IPV6)

    assert ("udp", HOST6, 5, SERVER6, 6) == ends(seen)
    assert b"x" == seen.payload


def test_arp_goes_to_the_address_that_it_asks_for():
    request = dpkt.arp.ARP(op=1, spa=HOST.packed, tpa=SERVER.packed, sha=bytes(6), tha=bytes(6))

    assert ("arp", HOST, None, SERVER, None) == ends(parse(bytes(request), ARP))


def test_so_does_a_neighbour_solicitation():
    solicitation = bytes((135, 0, 0, 0)) + bytes(4) + SERVER6.packed
    group = ip_address("ff02::1:ff00:1")

    assert ("ndp", HOST6, None, SERVER6, None) == ends(parse(ipv6(solicitation, 58, group), IPV6))


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_the_vpns_own_packets_are_known_by_port_and_type(kind):
    packet = ipv4(dpkt.udp.UDP(sport=40000, dport=51820, ulen=40, data=bytes((kind, 0, 0, 0)) + bytes(28)), 17)

    assert "wireguard" == parse(packet).protocol


@pytest.mark.parametrize(("port", "payload"), [(51820, b"clear text"), (51821, b"\4\0\0\0" + bytes(28))])
def test_clear_text_and_other_ports_are_not_the_vpns(port, payload):
    packet = ipv4(dpkt.udp.UDP(sport=40000, dport=port, ulen=8 + len(payload), data=payload), 17)

    assert "udp" == parse(packet).protocol


def test_other_protocols_go_by_number():
    assert "ip-47" == parse(ipv4(bytes(20), 47)).protocol
    assert "ethertype-0x88cc" == parse(bytes(20), 0x88CC).protocol


@given(
    st.binary(max_size=120),
    st.sampled_from([IPV4, ARP, IPV6, 0x8100, 0x1234]),
    st.booleans(),
    st.sampled_from([b"", b"\x45", b"\x60", b"\x4f", b"\x45\0\0\0\0\0\0\0\x40\1", b"\x60\0\0\0\0\0\0"]),
)
def test_no_frame_is_too_absurd_to_be_written_down(frame, ethertype, ethernet, start):
    assert parse_untrusted(start + frame, ethernet=ethernet, ethertype=ethertype).protocol
