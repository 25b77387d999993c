"""DNS messages as our reader sees them, for tests that hold dnspython's and dnslib's word against it."""

from tests.fakes.resolvers import query, read
from tunsplit.wire import dns as wire

A = "www.example.com. 60 IN A 192.0.2.1"
SOA = "example.com. 900 IN SOA ns.example.com. admin.example.com. 1 3600 600 86400 300"


def question(*arguments, **options) -> wire.Question:
    return question_of(query(*arguments, **options))


def question_of(message: bytes) -> wire.Question:
    found = wire.read_question_untrusted(message)
    assert found is not None
    return found


def understood(message: bytes, asked: bytes) -> wire.Answer:
    found = wire.read_answer_untrusted(message, question_of(asked).section)
    assert found is not None
    return found


def records(message: bytes) -> list[str]:
    got = read(message)
    return [rrset.to_text() for section in (got.answer, got.authority, got.additional) for rrset in section]


def bent(message: bytes, at: int, data: bytes) -> bytes:
    return message[:at] + data + message[at + len(data) :]


EDNS = query(use_edns=0)
ASKED = query()
