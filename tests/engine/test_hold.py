"""First packets wait in order, in bounds, and not for ever."""

import pytest

from tests.craft import udp
from tests.world import World, unknown
from tunsplit.engine import hold as rules
from tunsplit.engine.hold import Hold
from tunsplit.engine.slowpath import Unknown


def packet(port: int = 5000, data: bytes = b"", peer: str = "1.1.1.1") -> Unknown:
    return unknown(World().sent_slowly(udp(f"10.128.0.1:{port} > {peer}:53", data)))


def key(one: Unknown) -> tuple[int, bytes]:
    return one.protocol, one.key


def test_packets_come_back_in_the_order_in_which_they_came():
    hold = Hold(1.0)
    sent = [packet(data=bytes((number,))) for number in range(10)]
    assert all(hold.add(one, 0.0) for one in sent)

    assert key(sent[0]) in hold
    assert sent == hold.release(key(sent[0]))
    assert key(sent[0]) not in hold
    assert [] == hold.release(key(sent[0]))
    assert {"held_flows": 0, "held_octets": 0} == hold.statistics()


def test_each_flow_waits_for_itself():
    hold = Hold(1.0)
    one, other = packet(5000), packet(5001)
    hold.add(one, 0.0)
    hold.add(other, 0.0)

    assert (2, [other], 1) == (len(hold), hold.release(key(other)), len(hold))


def test_who_has_waited_too_long_is_given_back_oldest_first():
    hold = Hold(1.0)
    early, later = packet(5000), packet(5001)
    assert hold.next_deadline() is None
    hold.add(early, 10.0)
    hold.add(later, 10.5)
    hold.add(early, 10.9)  # what follows does not prolong the wait

    assert (11.0, []) == (hold.next_deadline(), hold.expire(10.99))
    assert [[early, early]] == hold.expire(11.0)
    assert (11.5, [[later]]) == (hold.next_deadline(), hold.expire(12.0))
    assert (None, []) == (hold.next_deadline(), hold.expire(99.0))


def test_one_flow_cannot_take_all_room():
    hold = Hold(1.0)
    added = [hold.add(packet(), 0.0) for _ in range(rules.MOST_PACKETS_A_FLOW + 1)]

    assert [True] * rules.MOST_PACKETS_A_FLOW + [False] == added
    assert hold.add(packet(5001), 0.0)


@pytest.mark.parametrize(("bound", "most"), [("MOST_FLOWS", 3), ("MOST_OCTETS", 3 * 29)])
def test_flows_and_octets_are_bounded(monkeypatch, bound, most):
    monkeypatch.setattr(rules, bound, most)
    monkeypatch.setattr(rules, "SHARE", 1)
    hold = Hold(1.0)

    assert [True, True, True, False] == [hold.add(packet(5000 + number, b"?"), 0.0) for number in range(4)]
    hold.release(key(packet(5000)))
    assert hold.add(packet(5003, b"?"), 0.0)


@pytest.mark.parametrize(("bound", "most"), [("MOST_FLOWS", 4 * 3), ("MOST_OCTETS", 4 * 3 * 29)])
def test_one_user_cannot_take_everybody_s_room(monkeypatch, bound, most):
    monkeypatch.setattr(rules, bound, most)
    hold = Hold(1.0)
    added = [hold.add(packet(5000 + number, b"?"), 0.0, 1000) for number in range(4)]

    assert [True, True, True, False] == added
    assert hold.add(packet(6000, b"?"), 0.0, 1001)
    assert hold.add(packet(7000, b"?"), 0.0)  # nobody knows whose
    hold.release(key(packet(5000)))
    assert hold.add(packet(5003, b"?"), 0.0, 1000)


def test_what_follows_counts_as_its_flow_s_user_s(monkeypatch):
    monkeypatch.setattr(rules, "MOST_OCTETS", 4 * 2 * 29)
    hold = Hold(1.0)

    assert [True, True, False] == [hold.add(packet(5000, b"?"), 0.0, user) for user in (1000, 1001, 1002)]
    assert hold.add(packet(5001, b"?"), 0.0, 1001)
