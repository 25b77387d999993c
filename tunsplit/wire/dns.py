"""DNS messages as they lie on the wire (RFC 1035 §4): read only as far as we must, passed on as they are.

An answer's records stay byte for byte, so that its compression pointers stay valid and unknown types pass (RFC 3597).
Found once are what changes on the way: the identifier, the TTLs, and the OPT record (RFC 6891), which belongs to one
hop and is dropped with all that follows it: ours goes to the next.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

import dnslib

# identifier · flags · counts of questions, answers, authority and additional records
_HEADER = struct.Struct("!HHHHHH")
_unpack_header = _HEADER.unpack_from
_unpack_record = struct.Struct("!HHIH").unpack_from  # type · class · TTL · length of the data, behind the owner's name
_unpack_u32 = struct.Struct("!I").unpack_from
_pack_u32 = struct.Struct("!I").pack_into
_pack_flags = struct.Struct("!H").pack_into

HEADER_SIZE = 12
QR, OPCODE, AA, TC, RD, RA, AD, CD = 0x8000, 0x7800, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16
SOA, AAAA, OPT, IXFR, AXFR, ANY = 6, 28, 41, 251, 252, 255
SHORTEST_SOA = 22  # bytes: two root names and five numbers; the last is the minimum TTL (RFC 1035 §3.3.13)

DO = 0x8000  # of the OPT record's TTL field
SMALLEST_UDP = 512  # RFC 1035 §4.2.1
OWN_SIZE = 1232  # what fits an IPv6 packet of the least MTU: nobody has to fragment
LARGEST = 65535
LARGEST_UDP = LARGEST - 20 - 8  # what is left of an IPv4 packet; a longer answer could not be sent at all
LONGEST_TTL_S = 86_400
LONGEST_NEGATIVE_S = 3 * 3600  # RFC 2308 §5

_OPT = {do: struct.pack("!BHHIH", 0, OPT, OWN_SIZE, do, 0) for do in (0, DO)}
_COPIED = RD | AD | CD  # what of a question's flags changes its answer


class Question(NamedTuple):
    """One question as an app asked it.

    `section` is the question section in the app's spelling; `key` the same in lower case, with the flags that change
    the answer; `size` the largest UDP answer that the app takes, in bytes.
    """

    id: bytes
    flags: int
    section: bytes
    key: bytes
    size: int
    edns: bool
    do: int
    version: int

    @property
    def type(self) -> int:
        """The type that is asked for."""
        return int.from_bytes(self.section[-4:-2], "big")


class Answer(NamedTuple):
    """One answer without its identifier and OPT record.

    `ttls` says where each TTL lies and what it was; `lifetime` is for how many seconds the answer may be stored, 0 if
    not at all.
    """

    message: bytes
    rcode: int
    truncated: bool
    ttls: tuple[tuple[int, int], ...] = ()
    lifetime: int = 0


def read_question_untrusted(message: bytes) -> Question | None:
    """Read a message that asks one question, as all do (RFC 9619); None: it is no such message."""
    if len(message) < HEADER_SIZE + 5:
        return None
    _, flags, questions, answers, authority, additional = _unpack_header(message)
    if flags & (QR | OPCODE) or questions != 1 or answers or authority:
        return None
    try:
        at = HEADER_SIZE
        while length := message[at]:
            if length > 63:
                return None
            at += length + 1
        end = at + 5
        if at - HEADER_SIZE > 254 or end > len(message):
            return None
        section = message[HEADER_SIZE:end]
        size, edns, do, version = SMALLEST_UDP, False, 0, 0
        for _ in range(additional):
            end = _after_name(message, end)
            kind, size_given, ttl, length = _unpack_record(message, end)
            end += 10 + length
            if kind == OPT:
                if edns:
                    return None  # RFC 6891 §6.1.1
                size, edns = min(max(size_given, SMALLEST_UDP), LARGEST_UDP), True
                do, version = ttl & DO, ttl >> 16 & 0xFF
        if end > len(message):
            return None
    except (IndexError, struct.error):
        return None
    bits = (flags & _COPIED) >> 4 | do >> 13
    # Not the type: as a number it may look like a capital letter.
    return Question(
        message[:2], flags, section, section[:-4].lower() + section[-4:] + bytes((bits,)), size, edns, do, version
    )


def fault_untrusted(message: bytes) -> bytes | None:
    """The answer to a message that asks no question that we can read; None: nothing, for answers above all."""
    if len(message) < HEADER_SIZE:
        return None
    id_, flags, *_ = _unpack_header(message)
    if flags & QR:
        return None
    rcode = NOTIMP if flags & OPCODE else FORMERR
    return _HEADER.pack(id_, QR | flags & (OPCODE | RD) | rcode, 0, 0, 0, 0)


def _after_name(message: bytes, at: int) -> int:
    """Where the name that begins here ends; IndexError if the message ends first."""
    while True:
        length = message[at]
        if length >= 0xC0:
            return at + 2
        if length > 63:
            raise IndexError(at)
        at += length + 1
        if not length:
            return at


def upstream_question(question: Question, id_: int, *, edns: bool) -> bytes:
    """The same question in our own name: of the app's EDNS, only the DO bit goes on."""
    header = _HEADER.pack(id_, question.flags & _COPIED, 1, 0, 0, 1 if edns else 0)
    return header + question.section + (_OPT[question.do] if edns else b"")


def read_answer_untrusted(message: bytes, section: bytes) -> Answer | None:
    """Read the answer to a question section; None: it is none, or malformed."""
    end = HEADER_SIZE + len(section)
    if len(message) < HEADER_SIZE:
        return None
    _, flags, questions, answers, authority, additional = _unpack_header(message)
    if not flags & QR or flags & OPCODE:
        return None
    rcode = flags & 0xF
    if not questions and rcode in (FORMERR, NOTIMP):
        # Who cannot read a question may not repeat it.
        return Answer(_HEADER.pack(0, flags, 1, 0, 0, 0) + section, rcode, False)
    asked = message[HEADER_SIZE:end]
    if questions != 1 or asked[-4:] != section[-4:] or asked.lower() != section.lower():
        return None
    if flags & TC:
        return Answer(_HEADER.pack(0, flags, 1, 0, 0, 0) + section, rcode, True)
    try:
        return _read_records(message, flags, (answers, authority, additional), section)
    except (IndexError, struct.error):
        return None


def _read_records(message: bytes, flags: int, counts: tuple[int, int, int], section: bytes) -> Answer | None:
    answers, authority, _ = counts
    rcode, wanted = flags & 0xF, int.from_bytes(section[-4:-2], "big")
    ttls: list[tuple[int, int]] = []
    lifetime, negative, answered = LONGEST_TTL_S, 0, False
    at = begin = HEADER_SIZE + len(section)
    for number in range(sum(counts)):
        begin = at
        at = _after_name(message, at)
        kind, _, ttl, length = _unpack_record(message, at)
        if kind == OPT:
            if number < answers + authority or message[begin]:
                return None
            rcode |= ttl >> 24 << 4
            break
        if ttl & 0x80000000:
            ttl = 0  # RFC 2181 §8
        ttls.append((at + 4, ttl))
        at = begin = at + 10 + length
        if number < answers:
            lifetime = min(lifetime, ttl)
            answered = answered or kind == wanted or wanted == ANY
        elif number < answers + authority and kind == SOA and length >= SHORTEST_SOA:
            negative = min(ttl, _unpack_u32(message, at - 4)[0], LONGEST_NEGATIVE_S)
            lifetime = min(lifetime, negative)
    if begin > len(message):
        return None
    # RFC 2308 §2, §5: that a name, or a type of it, is not there may be stored for as long as an SOA record says.
    storable = rcode in (NOERROR, NXDOMAIN) and (negative or answered)
    header = _HEADER.pack(0, flags, 1, answers, authority, len(ttls) - answers - authority)
    body = header + section + message[HEADER_SIZE + len(section) : begin]
    return Answer(body, rcode, False, tuple(ttls), lifetime if storable else 0)


def aged(message: bytes, ttls: Iterable[tuple[int, int]], seconds: int) -> bytes:
    """The answer as it is after this time in a cache: every TTL counted down."""
    changed = bytearray(message)
    for at, ttl in ttls:
        _pack_u32(changed, at, max(ttl - seconds, 0))
    return bytes(changed)


def answer_for(question: Question, message: bytes, *, over_tcp: bool) -> bytes:
    """An `Answer.message` as the app gets it: its identifier, its spelling, our OPT if it sent one, what fits."""
    section = question.section
    size = len(message)
    if question.edns:
        size += len(_OPT[0])
    if size > (LARGEST if over_tcp else question.size):
        return _bare(question, int.from_bytes(message[2:4], "big") | TC)
    rest = message[HEADER_SIZE + len(section) :]
    if not question.edns:
        return b"".join((question.id, message[2:HEADER_SIZE], section, rest))
    additional = int.from_bytes(message[10:12], "big") + 1
    return b"".join((question.id, message[2:10], additional.to_bytes(2, "big"), section, rest, _OPT[question.do]))


def without_records(message: bytes, section: bytes) -> bytes:
    """The answer with its code, and nothing in it (RFC 2308 §2.2, type 3)."""
    flags = int.from_bytes(message[2:4], "big") & ~AD
    return _HEADER.pack(0, flags, 1, 0, 0, 0) + section


def refusal(question: Question, rcode: int) -> bytes:
    """An answer of our own that has no records. Codes above 15 need the app's EDNS (RFC 6891 §6.1.3)."""
    return _bare(question, QR | RA | question.flags & (RD | CD) | rcode & 0xF, rcode >> 4)


def _bare(question: Question, flags: int, extended: int = 0) -> bytes:
    header = question.id + _HEADER.pack(0, flags, 1, 0, 0, int(question.edns))[2:]
    if not question.edns:
        return header + question.section
    opt = bytearray(_OPT[question.do])
    opt[5] = extended
    return header + question.section + bytes(opt)


def name_of(section: bytes) -> str:
    """The name that a question section asks for, in the notation of zone files (RFC 1035 §5.1)."""
    at, labels = 0, []
    while length := section[at]:
        labels.append("".join(map(_letter, section[at + 1 : at + 1 + length])) + ".")
        at += length + 1
    return "".join(labels) or "."


def _letter(octet: int) -> str:
    if not 0x20 < octet < 0x7F:
        return f"\\{octet:03}"
    return f"\\{octet:c}" if octet in b'.\\;()@$"' else chr(octet)


def type_name(number: int) -> str:
    """The mnemonic of a record's type; TYPE and the number if it has none (RFC 3597 §5)."""
    return str(dnslib.QTYPE[number])


def rcode_name(number: int) -> str:
    """The mnemonic of an answer's code."""
    return str(dnslib.RCODE.get(number))
