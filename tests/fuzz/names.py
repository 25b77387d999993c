"""DNS: questions of apps, answers of resolvers, over UDP and TCP."""

import struct

from tests.engine.wires import FIRST, NOW, SECOND, World
from tests.fakes.resolvers import answer, query
from tests.fuzz.target import Target, joined, split, target
from tunsplit.tasks.dnsconnections import take_untrusted
from tunsplit.wire import dns

TARGETS: dict[str, Target] = {}

ASKED = query()
SOA = "example.com. 900 IN SOA ns.example.com. admin.example.com. 1 3600 600 86400 300"
A = "www.example.com. 60 IN A 192.0.2.1"


def questions() -> list[bytes]:
    return [
        ASKED,
        query(use_edns=0),
        query(use_edns=0, want_dnssec=True, payload=4096),
        query("example.com", "AAAA", use_edns=1),
        query(".", "ANY"),
        query("a" * 63 + ".example.com", "TXT"),
        query("\\000\\032\\.b.example", "TYPE65280"),
    ]


def answers() -> list[bytes]:
    return [
        answer(ASKED, A),
        answer(ASKED, A, "www.example.com. 60 IN TXT text", authority=(SOA,)),
        answer(ASKED, authority=(SOA,), rcode=3),
        answer(ASKED, rcode=2),
        answer(ASKED, rcode=1),
        answer(ASKED, flags=dns.TC),
        answer(query(use_edns=0), A),
        answer(query(use_edns=0), rcode=16),
        answer(ASKED, *(f"www.example.com. 60 IN A 192.0.2.{number}" for number in range(60))),
        ASKED[:2] + struct.pack("!5H", dns.QR | dns.FORMERR, 0, 0, 0, 0),
    ]


@target(TARGETS, lambda: [*questions(), *answers()])
def a_question(data: bytes) -> None:
    """It is read, or answered by a fault, or it is nothing; what we ask in its name can be read again."""
    found = dns.read_question_untrusted(data)
    if found is None:
        fault = dns.fault_untrusted(data)
        assert fault is None or len(fault) == dns.HEADER_SIZE
        return
    assert dns.name_of(found.section).endswith(".")
    assert dns.type_name(found.type)
    asked = dns.upstream_question(found, 7, edns=True)
    again = dns.read_question_untrusted(asked)
    assert again is not None
    assert again.section == found.section
    for message in (dns.refusal(found, dns.SERVFAIL), dns.refusal(found, dns.BADVERS)):
        assert message[:2] == data[:2]
        assert dns.read_answer_untrusted(message, found.section) is not None


@target(TARGETS, answers)
def an_answer(data: bytes) -> None:
    """What may be handed on is an answer that says the same, however old, and no larger than the app takes."""
    for asked in (ASKED, query(use_edns=0, payload=4096)):
        question = dns.read_question_untrusted(asked)
        assert question is not None
        found = dns.read_answer_untrusted(data, question.section)
        if found is None:
            return
        assert dns.rcode_name(found.rcode)
        assert 0 <= found.lifetime <= dns.LONGEST_TTL_S
        assert len(dns.aged(found.message, found.ttls, 10)) == len(found.message)
        for over_tcp in (False, True):
            told = dns.answer_for(question, found.message, over_tcp=over_tcp)
            assert len(told) <= (dns.LARGEST if over_tcp else question.size)
            assert told[:2] == question.id
            again = dns.read_answer_untrusted(told, question.section)
            assert again is not None
        assert dns.read_answer_untrusted(dns.without_records(found.message, question.section), question.section)


@target(TARGETS, lambda: [joined(*questions()), joined(b"", ASKED), joined(ASKED)[:-1]])
def a_stream_of_questions(data: bytes) -> None:
    """Messages come out as they went in, whatever pieces they come in; what is left is less than one."""
    received, taken = bytearray(), []
    for at in range(0, len(data), 7):
        received += data[at : at + 7]
        while (message := take_untrusted(received)) is not None:
            taken.append(message)
    assert data == joined(*taken) + received


@target(TARGETS, lambda: [joined(one, other) for one in answers() for other in answers()[:3]])
def a_resolver_s_words(data: bytes) -> None:
    """Whatever comes in on the sockets that asked, each question ends once, and no attempt is left behind."""
    world = World()
    for name in ("www.example.com", "www.example.org"):
        world.ask(name)
    for number, message in enumerate(split(data, 6)):
        for _, channel, sent in list(world.wires.sent):
            for said in (message, sent[:2] + message[2:]):
                world.resolver.answered_untrusted(channel, said, NOW + number)
    for second in range(0, 60, 2):
        world.resolver.expire(NOW + second)
    assert world.is_idle
    assert 2 == len(world.outcomes)
    assert {outcome.server for outcome in world.outcomes} <= {None, FIRST, SECOND}
