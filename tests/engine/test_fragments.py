"""Fragments are held and remembered within bounds."""

import pytest

from tests.craft import fragments, udp
from tests.world import World
from tunsplit.engine import fragments as rules
from tunsplit.engine.fragments import Fragments, Refused
from tunsplit.wire.ip import Headers, parse_untrusted

TEXT = "10.128.0.1:5000 > 1.1.1.1:53"
TEXT6 = "[fd75::1]:5000 > [2001:db8::1]:53"


def pieces(identification: int, text: str = TEXT) -> list[Headers]:
    return [
        parse_untrusted(one, len(one)) for one in fragments(udp(text, bytes(48)), 32, identification=identification)
    ]


@pytest.fixture
def flow():
    return World().open(TEXT, outside="192.0.2.7:40000")


def test_later_fragments_are_held_in_order_until_their_first_comes(flow):
    one = Fragments()
    first, later = pieces(1)
    for packet in (b"second", b"third"):
        assert 0 == one.hold(later, b"vnet", packet, 0.0)

    assert one.later(later) is None
    assert [(b"vnet", b"second"), (b"vnet", b"third")] == one.first(first, flow.original, 0.0)
    assert flow.original is one.later(later)
    assert {"fragments_known": 1, "fragments_held": 0} == one.statistics()


def test_a_datagram_is_named_by_all_that_its_fragments_share(flow):
    one = Fragments()
    one.first(pieces(1)[0], flow.original, 0.0)

    assert one.later(pieces(2)[1]) is None
    assert one.later(pieces(1, "10.128.0.1:5000 > 1.1.1.2:53")[1]) is None
    assert one.later(pieces(1, TEXT6)[1]) is None


def test_the_oldest_datagram_gives_way():
    one = Fragments()
    for number in range(rules.MOST_HELD):
        assert 0 == one.hold(pieces(number // 2)[1], b"", bytes(8), 0.0)

    assert 2 == one.hold(pieces(9999)[1], b"", bytes(8), 1.0)
    assert rules.MOST_HELD - 1 == one.statistics()["fragments_held"]


def test_held_octets_are_bounded():
    one = Fragments()
    size = 60_000
    room = rules.MOST_HELD_OCTETS // size
    dropped = sum(one.hold(pieces(number)[1], b"", bytes(size), 0.0) for number in range(room + 5))

    assert (5, room) == (dropped, one.statistics()["fragments_held"])


def test_what_is_known_is_bounded(flow):
    one = Fragments()
    for number in range(rules.MOST_KNOWN + 1):
        one.first(pieces(number)[0], flow.original, 0.0)

    assert rules.MOST_KNOWN == one.statistics()["fragments_known"]
    assert one.later(pieces(0)[1]) is None
    assert flow.original is one.later(pieces(1)[1])


def test_what_nobody_completes_is_forgotten(flow):
    one = Fragments()
    one.first(pieces(1)[0], flow.original, 0.0)
    one.hold(pieces(2)[1], b"", b"", 1.0)
    one.first(pieces(1)[0], flow.original, 2.0)

    assert 0 == one.expire(rules.KNOWN_S)
    assert {"fragments_known": 1, "fragments_held": 1} == one.statistics()
    assert 1 == one.expire(rules.KNOWN_S + 1)
    assert 0 == one.expire(rules.KNOWN_S + 2)
    assert {"fragments_known": 0, "fragments_held": 0} == one.statistics()


def test_a_refused_name_is_refused_until_it_comes_round(flow):
    one = Fragments()
    first, later = pieces(1)
    one.hold(later, b"", b"", 0.0)

    assert 1 == one.refuse(first, 0.0)
    with pytest.raises(Refused):
        one.later(later)
    one.start(first)
    assert one.later(later) is None
    one.first(first, flow.original, 1.0)
    assert flow.original is one.later(later)
