"""Answers that are given again, for as long as they may be."""

import struct

import pytest

from tunsplit.engine.dnscache import PARTITION, DnsCache
from tunsplit.wire.dns import Answer

INSIDE, OUTSIDE = (0).to_bytes(PARTITION, "big"), (1).to_bytes(PARTITION, "big")
NOW = 1000.0


def an_answer(lifetime: int = 60, size: int = 40) -> Answer:
    """An answer whose one TTL is at its end."""
    return Answer(bytes(size - 4) + struct.pack("!I", lifetime), 0, False, ((size - 4, lifetime),), lifetime)


def ttl(cache: DnsCache, key: bytes, now: float) -> int | None:
    entry = cache.get(key, now)
    return None if entry is None else int.from_bytes(entry.shown[-4:], "big")


@pytest.fixture
def cache():
    return DnsCache(most_entries=3)


def test_an_answers_ttl_counts_down_until_it_is_gone(cache):
    cache.put(INSIDE + b"a", an_answer(60), NOW)

    assert [60, 60, 59, 1, None] == [ttl(cache, INSIDE + b"a", NOW + later) for later in (0, 0.9, 1, 59.9, 60)]
    assert {"cache_entries": 0, "cache_octets": 0} == cache.statistics()


def test_what_may_not_be_stored_is_not(cache):
    cache.put(INSIDE + b"a", an_answer(0), NOW)

    assert cache.get(INSIDE + b"a", NOW) is None


def test_partitions_share_nothing(cache):
    cache.put(INSIDE + b"a", an_answer(), NOW)

    assert cache.get(OUTSIDE + b"a", NOW) is None


def test_a_partition_is_forgotten_alone(cache):
    cache.put(INSIDE + b"a", an_answer(), NOW)
    cache.put(OUTSIDE + b"a", an_answer(), NOW)
    alone = cache.statistics()["cache_octets"] // 2
    cache.flush({INSIDE})

    assert cache.get(INSIDE + b"a", NOW) is None
    assert cache.get(OUTSIDE + b"a", NOW) is not None
    assert {"cache_entries": 1, "cache_octets": alone} == cache.statistics()


def test_what_was_used_last_is_kept(cache):
    for name in (b"a", b"b", b"c"):
        cache.put(INSIDE + name, an_answer(), NOW)
    cache.get(INSIDE + b"a", NOW)
    cache.put(INSIDE + b"d", an_answer(), NOW)

    assert [True, False, True, True] == [cache.get(INSIDE + name, NOW) is not None for name in (b"a", b"b", b"c", b"d")]


def test_a_newer_answer_takes_the_place_of_the_older(cache):
    cache.put(INSIDE + b"a", an_answer(60), NOW)
    before = cache.statistics()
    cache.put(INSIDE + b"a", an_answer(90), NOW)

    assert 90 == ttl(cache, INSIDE + b"a", NOW)
    assert before == cache.statistics()


def test_it_is_bounded_in_bytes():
    cache = DnsCache(most_octets=100_000)
    for number in range(100):
        cache.put(INSIDE + bytes((number,)), an_answer(size=5000), NOW)

    assert 100_000 >= cache.statistics()["cache_octets"]
    assert 5 < cache.statistics()["cache_entries"]
    assert cache.get(INSIDE + bytes((99,)), NOW) is not None


def test_an_answer_larger_than_the_cache_is_not_kept():
    cache = DnsCache(most_octets=1000)
    cache.put(INSIDE + b"a", an_answer(size=5000), NOW)

    assert {"cache_entries": 0, "cache_octets": 0} == cache.statistics()
