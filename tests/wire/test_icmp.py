"""ICMP errors, and the packet that they speak of."""

import pytest
from hypothesis import given

from tests import craft
from tests.craft import error, udp
from tests.strategies import untrusted
from tunsplit.errors import MalformedPacket
from tunsplit.wire import icmp
from tunsplit.wire.ip import ICMP, ICMPV6, Headers, parse_untrusted

QUOTED4 = udp("192.0.2.7:40000 > 1.1.1.1:53", b"some question")
QUOTED6 = udp("[2001:db8::7]:40000 > [2001:db8::1]:53", b"some question")
ERROR4 = "203.0.113.1 > 192.0.2.7"
ERROR6 = "2001:db8::ff > 2001:db8::7"


def embedded(packet: bytes) -> tuple[int, Headers]:
    return icmp.embedded_untrusted(packet, parse_untrusted(packet, len(packet)))


@pytest.mark.parametrize(("text", "quoted", "at"), [(ERROR4, QUOTED4, 28), (ERROR6, QUOTED6, 48)])
def test_the_packet_inside_is_found(text, quoted, at):
    assert (at, parse_untrusted(quoted, len(quoted))) == embedded(error(text, quoted, 3))


@pytest.mark.parametrize(("text", "quoted", "header"), [(ERROR4, QUOTED4, 20), (ERROR6, QUOTED6, 40)])
def test_eight_bytes_of_transport_are_enough_and_seven_are_not(text, quoted, header):
    _, headers = embedded(error(text, quoted[: header + 8], 3))
    assert (header, header + 8) == (headers.transport, headers.size)

    with pytest.raises(MalformedPacket, match="too little"):
        embedded(error(text, quoted[: header + 7], 3))
    with pytest.raises(MalformedPacket, match="cut"):
        embedded(error(text, quoted[: header - 1], 3))


def test_a_quoted_later_fragment_names_no_flow():
    later = craft.fragments(udp("192.0.2.7:40000 > 1.1.1.1:53", bytes(64)), 32)[1]

    with pytest.raises(MalformedPacket, match="too little"):
        embedded(error(ERROR4, later, 3))


@pytest.mark.parametrize(("text", "quoted"), [(ERROR4, QUOTED6), (ERROR6, QUOTED4)])
def test_an_error_about_the_other_version_is_malformed(text, quoted):
    with pytest.raises(MalformedPacket):
        embedded(error(text, quoted, 3))


def test_what_is_an_error():
    assert [3, 11, 12] == [kind for kind in range(256) if icmp.is_error(ICMP, kind)]
    assert [1, 2, 3, 4] == [kind for kind in range(256) if icmp.is_error(ICMPV6, kind)]
    assert not icmp.is_error(6, 3)


@given(untrusted)
def test_any_bytes_inside_are_headers_that_fit_or_malformed(quoted):
    for text in (ERROR4, ERROR6):
        try:
            at, headers = embedded(error(text, quoted, 3))
        except MalformedPacket:
            continue
        assert headers.transport + 8 <= headers.size == len(quoted)
        assert quoted == error(text, quoted, 3)[at:]
