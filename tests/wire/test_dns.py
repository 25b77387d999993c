"""Questions, and what apps get; dnspython and dnslib, which share no code with ours, write and judge them."""

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
from tests.wire.messages import ASKED, EDNS, A, bent, question, question_of, records, understood
from tunsplit.wire import dns as wire

# Questions


@pytest.mark.parametrize("name", ["www.example.com", ".", "a" * 63 + ".example", r"odd\.label\000\255.example"])
@pytest.mark.parametrize("kind", ["A", "AAAA", "HTTPS", "TYPE65280"])
def test_a_question_is_read_as_it_was_written(name, kind):
    asked = query(name, kind)
    found = question_of(asked)

    assert asked[12:] == found.section
    assert asked[:2] == found.id
    assert read(asked).question[0].rdtype == found.type
    assert (512, False, 0, 0) == (found.size, found.edns, found.do, found.version)
    assert read(asked).question[0].name.to_text() == wire.name_of(found.section)


def test_of_edns_the_size_and_do_are_read():
    found = question(use_edns=0, payload=4096, ednsflags=dns.flags.DO)

    assert (4096, True, wire.DO) == (found.size, found.edns, found.do)


def test_a_size_below_what_everybody_takes_is_no_size():
    assert 512 == question(use_edns=0, payload=100).size


def test_a_size_beyond_what_a_datagram_takes_is_cut():
    """An answer between the two could neither be sent nor fetched over TCP: nobody would hear that it is truncated."""
    assert 65507 == question(use_edns=0, payload=65535).size


def test_other_additional_records_do_no_harm():
    asked = dnslib.DNSRecord.question("www.example.com")
    asked.add_ar(dnslib.RR("x.example.com", rdata=dnslib.A("192.0.2.1")))
    asked.add_ar(dnslib.EDNS0(udp_len=1400))
    found = wire.read_question_untrusted(asked.pack())

    assert found is not None
    assert 1400 == found.size


def test_spelling_makes_no_other_question():
    assert question("www.example.com").key == question("WWW.eXample.com").key


def test_what_changes_the_answer_makes_another_question():
    plain = question()
    others = [
        question("www.example.org"),
        question("www.example.com", "AAAA"),
        question("www.example.com", "TYPE97"),
        question("www.example.com", "TYPE65"),
        question(use_edns=0, ednsflags=dns.flags.DO),
        question(flags=dns.flags.RD | dns.flags.CD),
        question(flags=dns.flags.RD | dns.flags.AD),
        question(flags=0),
    ]

    assert 9 == len({plain.key, *(other.key for other in others)})


def test_what_does_not_change_the_answer_makes_no_other_question():
    assert (
        question().key
        == question(
            use_edns=0, payload=4096, options=[dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")]
        ).key
    )


@pytest.mark.parametrize(
    "message",
    [
        b"",
        ASKED[:11],
        ASKED[:-1],
        ASKED[:16],
        bent(ASKED, 2, b"\x81"),  # an answer
        bent(ASKED, 2, b"\x29"),  # an update
        bent(ASKED, 4, b"\0\0"),  # no question
        bent(ASKED, 4, b"\0\2"),  # two
        bent(ASKED, 6, b"\0\1"),  # with an answer
        bent(ASKED, 8, b"\0\1"),
        bent(ASKED, 10, b"\0\1"),  # an additional record that is not there
        bent(ASKED, 12, b"\xc0\x0c"),  # a name that points at itself
        bent(ASKED, 12, b"\x40"),  # a label of a kind that there is not
        ASKED[:12] + b"\x01a" * 128 + b"\0\0\1\0\1",  # a name of more than 255 bytes
        ASKED[:12] + b"\x3f" + b"a" * 20,
        EDNS[:-1],
        bent(EDNS, len(EDNS) - 2, b"\0\1"),  # data that are not there
        bent(EDNS, 10, b"\0\2") + EDNS[-11:],  # two OPT records
        bent(EDNS, len(EDNS) - 11, b"\x40"),
    ],
)
def test_what_is_no_question_is_none(message):
    assert wire.read_question_untrusted(message) is None


@given(st.binary(max_size=600))
def test_anything_may_come_as_a_question(message):
    wire.read_question_untrusted(message)
    wire.fault_untrusted(message)


@given(st.data())
def test_a_bent_question_may_come(data):
    message = bytearray(
        query("www.example.com", use_edns=0, options=[dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")])
    )
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    found = wire.read_question_untrusted(bytes(message))
    if found is not None:
        assert found.section == bytes(message[12 : 12 + len(found.section)])
        wire.name_of(found.section)


@pytest.mark.parametrize(("flags", "rcode"), [(0x0100, dns.rcode.FORMERR), (0x2900, dns.rcode.NOTIMP)])
def test_who_asks_nothing_that_we_can_read_is_told_so(flags, rcode):
    told = wire.fault_untrusted(struct.pack("!HHHHHH", 77, flags, 3, 2, 1, 0) + b"\xff\xff")
    assert told is not None
    got = read(told)

    assert (77, rcode) == (got.id, got.rcode())
    assert flags & 0x7900 == got.flags & 0x7900


@pytest.mark.parametrize("message", [b"", b"\0" * 11, bent(ASKED, 2, b"\x81")])
def test_garbage_and_answers_are_not_answered(message):
    assert wire.fault_untrusted(message) is None


def test_we_ask_in_our_own_name():
    found = question(
        use_edns=0,
        payload=4096,
        ednsflags=dns.flags.DO,
        options=[dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")],
    )
    ours = read(wire.upstream_question(found, 4711, edns=True))

    assert (4711, wire.OWN_SIZE, dns.flags.DO, ()) == (ours.id, ours.payload, ours.ednsflags, ours.options)
    assert "www.example.com. IN A" == ours.question[0].to_text()


def test_we_can_ask_without_edns():
    asked = wire.upstream_question(question(use_edns=0), 4711, edns=False)

    assert -1 == read(asked).edns
    assert not dnslib.DNSRecord.parse(asked).ar


# What apps get


def test_an_answer_that_does_not_fit_is_truncated():
    many = [f"www.example.com. 60 IN A 192.0.2.{n}" for n in range(1, 100)]
    got = understood(answer(ASKED, *many), ASKED)

    assert dns.flags.TC & read(wire.answer_for(question(), got.message, over_tcp=False)).flags
    assert [] == records(wire.answer_for(question(), got.message, over_tcp=False))
    assert 99 == len(read(wire.answer_for(question(), got.message, over_tcp=True)).answer[0])
    assert 99 == len(read(wire.answer_for(question(use_edns=0, payload=4096), got.message, over_tcp=False)).answer[0])


def test_an_answer_without_its_records_keeps_its_code():
    got = understood(answer(ASKED, A, flags=dns.flags.AD, rcode=dns.rcode.NXDOMAIN), ASKED)
    emptied = read(wire.without_records(got.message, ASKED[12:]))

    assert (dns.rcode.NXDOMAIN, [], 0) == (emptied.rcode(), emptied.answer, emptied.flags & dns.flags.AD)


@pytest.mark.parametrize("edns", [-1, 0])
def test_a_refusal_is_an_answer_of_its_own(edns):
    asked = query(use_edns=edns)
    got = read(wire.refusal(question_of(asked), wire.SERVFAIL))

    assert read(asked).is_response(got)
    assert (dns.rcode.SERVFAIL, edns) == (got.rcode(), got.edns)


def test_another_version_of_edns_is_refused_as_such():
    asked = query(use_edns=1)

    assert 1 == question_of(asked).version
    assert dns.rcode.BADVERS == read(wire.refusal(question_of(asked), wire.BADVERS)).rcode()


def test_numbers_have_names():
    assert ("HTTPS", "TYPE65280") == (wire.type_name(65), wire.type_name(65280))
    assert ("NXDOMAIN", "11") == (wire.rcode_name(3), wire.rcode_name(11))
