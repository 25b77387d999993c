"""The internet checksum, against dpkt's and against RFC 1071 word by word."""

import dpkt
from hypothesis import given
from hypothesis import strategies as st

from tests.craft import Ends, address
from tests.craft import pseudo_header as stranger
from tunsplit.wire.checksum import checksum_delta, internet_checksum, pseudo_header


def word_by_word(data: bytes) -> int:
    """RFC 1071 §1, as it is written there."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@given(st.binary(min_size=1, max_size=2000).filter(any))
def test_it_is_dpkts_and_the_rfcs(data):
    assert dpkt.dpkt.in_cksum(data) == internet_checksum(data) == word_by_word(data)


def test_the_example_of_rfc_1071():
    assert 0xDDF2 ^ 0xFFFF == internet_checksum(bytes.fromhex("0001f203f4f5f6f7"))


@given(st.binary(min_size=2, max_size=40), st.binary(min_size=12, max_size=12), st.binary(min_size=12, max_size=12))
def test_it_falls_by_what_the_bytes_rise(rest, old, new):
    rest = rest[: len(rest) & ~1]

    assert internet_checksum(rest + new) == (internet_checksum(rest + old) - checksum_delta(old, new)) % 0xFFFF


def test_the_pseudo_headers_of_both_versions():
    v4 = Ends(address("10.0.0.1"), address("10.0.0.2"))
    v6 = Ends(address("fd00::1"), address("fd00::2"))

    assert bytes.fromhex("0a0000010a000002 00 06 0028") == pseudo_header(v4.source + v4.destination, 6, 40)
    for ends, length in ((v4, 40), (v6, 40), (v6, 70_000)):
        ours = pseudo_header(ends.source + ends.destination, 17, length)
        assert internet_checksum(stranger(ends, 17, length)) == internet_checksum(ours)
