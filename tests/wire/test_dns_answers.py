"""Answers of resolvers; dnspython and dnslib, which share no code with ours, write and judge them."""

import struct

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dnslib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.resolvers import answer, query, read
from tests.wire.messages import ASKED, SOA, A, bent, question, records, understood
from tunsplit.wire import dns as wire

# Answers


def test_an_answer_is_passed_on_record_by_record():
    asked = query("www.example.com", use_edns=0, payload=4096)
    given_ = answer(
        asked, A, "www.example.com. 60 IN TYPE65280 \\# 3 010203", authority=("example.com. 5 IN NS ns.example.com.",)
    )
    got = understood(given_, asked)
    told = wire.answer_for(question(use_edns=0), got.message, over_tcp=False)

    assert records(given_) == records(told)
    assert wire.OWN_SIZE == read(told).payload
    assert (0, False, 60) == (got.rcode, got.truncated, got.lifetime)


def test_the_opt_record_of_one_hop_does_not_reach_the_next():
    asked = query("www.example.com", use_edns=0)
    told = dnslib.DNSRecord.parse(answer(asked, A))
    told.header.id = 0
    told.ar = [dnslib.EDNS0(udp_len=4000, opts=[dnslib.EDNSOption(10, b"server-cookie")])]
    got = understood(told.pack(), asked)

    assert b"server-cookie" not in got.message
    assert [] == dnslib.DNSRecord.parse(wire.answer_for(question(), got.message, over_tcp=False)).ar


def test_additional_records_before_the_opt_record_stay():
    told = dnslib.DNSRecord.parse(answer(ASKED, A))
    told.ar = [dnslib.RR("ns.example.com", ttl=9, rdata=dnslib.A("192.0.2.2")), dnslib.EDNS0(udp_len=4000)]
    got = understood(told.pack(), ASKED)

    assert [A, "ns.example.com. 9 IN A 192.0.2.2"] == records(wire.answer_for(question(), got.message, over_tcp=False))


def test_the_answer_spells_the_name_as_it_was_asked():
    got = understood(answer(query("WWW.example.com"), A), ASKED)
    asked = question("wWw.Example.com")

    assert "wWw.Example.com. IN A" == read(wire.answer_for(asked, got.message, over_tcp=False)).question[0].to_text()


def test_codes_that_need_edns_are_read_whole():
    asked = query(use_edns=0)
    made = dns.message.make_response(read(asked))
    made.set_rcode(dns.rcode.BADVERS)

    assert wire.BADVERS == understood(made.to_wire(), asked).rcode


def test_a_truncated_answer_is_not_read_further():
    got = understood(answer(ASKED, flags=dns.flags.TC) + b"\xc0", ASKED)

    assert (True, 0) == (got.truncated, got.lifetime)


def test_who_cannot_read_a_question_need_not_repeat_it():
    got = understood(struct.pack("!HHHHHH", 0, 0x8001, 0, 0, 0, 0), ASKED)

    assert wire.FORMERR == got.rcode
    assert dns.rcode.FORMERR == read(wire.answer_for(question(), got.message, over_tcp=False)).rcode()


ANSWER = answer(ASKED, A)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        ANSWER[:11],
        ASKED,  # a question
        bent(ANSWER, 2, b"\xa9"),  # of another kind
        bent(ANSWER, 4, b"\0\0"),
        bent(ANSWER, 4, b"\0\2"),
        answer(query("www.example.org"), A),
        answer(query("www.example.com", "AAAA")),
        bent(ANSWER, 6, b"\0\2"),  # a record that is not there
        ANSWER[:-1],
        ANSWER[:-5],
        bent(ANSWER, len(ASKED), b"\x40"),
        bent(ANSWER, len(ASKED) + 2, b"\0\x29"),  # an OPT record among the answers
        # One with a name.
        bent(ANSWER, 6, b"\0\0\0\0\0\1").replace(b"\xc0\x0c\0\1", b"\xc0\x0c\0\x29"),
    ],
)
def test_what_is_no_answer_is_none(message):
    found = question()

    assert wire.read_answer_untrusted(message, found.section) is None


@given(st.binary(max_size=600))
def test_anything_may_come_as_an_answer(message):
    wire.read_answer_untrusted(message, ASKED[12:])
    wire.read_answer_untrusted(
        ASKED[:2] + b"\x81\x80\0\1" + message[:6].ljust(6, b"\0") + ASKED[12:] + message, ASKED[12:]
    )


@given(st.data())
def test_a_bent_answer_may_come(data):
    message = bytearray(answer(ASKED, A, "www.example.com. 70 IN TXT hello", authority=(SOA,)))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    got = wire.read_answer_untrusted(bytes(message), ASKED[12:])
    if got is not None:
        # Whatever it is, its parts are where they are said to be.
        wire.aged(got.message, got.ttls, 5)
        wire.answer_for(question(use_edns=0), got.message, over_tcp=False)
        wire.without_records(got.message, ASKED[12:])


# How long an answer may be stored


@pytest.mark.parametrize(
    ("lifetime", "given_"),
    [
        (60, {"records": (A,)}),
        (20, {"records": ("www.example.com. 20 IN CNAME other.example.com.", "other.example.com. 60 IN A 192.0.2.1")}),
        (0, {"records": ("www.example.com. 0 IN A 192.0.2.1",)}),
        (86400, {"records": ("www.example.com. 604800 IN A 192.0.2.1",)}),
        (0, {}),  # no SOA record
        (300, {"authority": (SOA,)}),
        (300, {"authority": (SOA,), "rcode": dns.rcode.NXDOMAIN}),
        (20, {"records": ("www.example.com. 20 IN CNAME other.example.com.",), "authority": (SOA,)}),
        (0, {"records": ("www.example.com. 20 IN CNAME other.example.com.",)}),
        (0, {"authority": ("example.com. 900 IN NS ns.example.com.",)}),  # a referral
        (0, {"records": (A,), "rcode": dns.rcode.SERVFAIL}),
    ],
)
def test_an_answer_lives_as_long_as_it_says(lifetime, given_):
    message = answer(
        ASKED, *given_.get("records", ()), authority=given_.get("authority", ()), rcode=given_.get("rcode", 0)
    )

    assert lifetime == understood(message, ASKED).lifetime


def test_any_record_answers_who_asks_for_any():
    asked = query("www.example.com", "ANY")

    assert 60 == understood(answer(asked, A), asked).lifetime


def test_a_ttl_beyond_31_bits_is_none():
    message = ANSWER.replace(struct.pack("!I", 60), struct.pack("!I", 0x80000000 | 60))

    assert ((ANSWER.index(struct.pack("!I", 60)), 0),) == understood(message, ASKED).ttls
    assert 0 == understood(message, ASKED).lifetime


def test_an_soa_record_too_short_to_be_one_says_nothing():
    message = answer(ASKED, authority=("example.com. 900 IN TYPE65280 \\# 4 00000005",))

    assert 0 == understood(message.replace(b"\xff\x00\0\1", b"\0\6\0\1"), ASKED).lifetime


def test_ttls_count_down_to_nothing():
    got = understood(answer(ASKED, A, authority=(SOA,)), ASKED)
    older = wire.aged(got.message, got.ttls, 100)

    assert ["www.example.com. 0 IN A 192.0.2.1", SOA.replace("900", "800")] == records(older)
