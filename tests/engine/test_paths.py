"""What is known of paths that are narrower than their device: on whose word, and for how long."""

import pytest

from tunsplit.engine.paths import KNOWN_S, MOST_KNOWN, MOST_SUSPECTED, SUSPECTED_S, UNLIMITED, WINDOW, Paths

FAR, OTHER, FAR6 = b"\x01" * 4, b"\x02" * 4, b"\x01" * 16
FLOW = b"\x09" * 12


@pytest.fixture
def paths():
    return Paths(1500)


def test_a_path_is_as_wide_as_its_device_until_somebody_says_otherwise(paths):
    assert (1500, UNLIMITED, 0) == (paths.mtu_to(FAR), paths.narrowest, len(paths))

    assert paths.learn(FAR, 1400, 0)
    assert (1400, 1500, 1400, 1) == (paths.mtu_to(FAR), paths.mtu_to(OTHER), paths.narrowest, len(paths))


def test_a_device_that_shrinks_takes_its_paths_along(paths):
    paths.learn(FAR, 1400, 0)
    paths.mtu = 1300

    assert 1300 == paths.mtu_to(FAR)


def test_a_path_becomes_narrower_by_word_and_wider_by_time(paths):
    paths.learn(FAR, 1300, 0)

    assert not paths.learn(FAR, 1400, 1)
    assert paths.learn(FAR, 1290, 2)
    assert not paths.expire(KNOWN_S)
    assert paths.expire(2 + KNOWN_S)
    assert (1500, UNLIMITED) == (paths.mtu_to(FAR), paths.narrowest)


@pytest.mark.parametrize(("destination", "told", "believed"), [(FAR, 0, 552), (FAR, 68, 552), (FAR6, 600, 1280)])
def test_nobody_makes_a_path_narrower_than_any_is(paths, destination, told, believed):
    paths.learn(destination, told, 0)

    assert believed == paths.mtu_to(destination)


def test_what_is_known_is_bounded(paths):
    for number in range(MOST_KNOWN + 1):
        paths.learn(number.to_bytes(4, "big"), 1400, 0)

    assert MOST_KNOWN == len(paths)
    assert 1500 == paths.mtu_to(bytes(4))


# TCP


@pytest.mark.parametrize("end", [1_001_000, 1_000_001, 1_000_000 + WINDOW, 999_000])
def test_a_segment_that_was_under_way_is_shown_by_the_next(paths, end):
    paths.suspect(FLOW, 1_000_000, 1300, 0)

    assert (1500, 1300) == (paths.mtu_to(FAR), paths.narrowest)
    assert paths.confirm(FLOW, FAR, end, 1)
    assert 1300 == paths.mtu_to(FAR)
    assert not paths.confirm(FLOW, FAR, end, 1)


def test_sequence_numbers_come_round(paths):
    paths.suspect(FLOW, 0xFFFFFFF0, 1300, 0)

    assert paths.confirm(FLOW, FAR, 1000, 1)


@pytest.mark.parametrize("end", [1_000_001 + WINDOW, 999_999 - WINDOW, 3_000_000_000])
def test_an_error_out_of_the_window_changes_nothing(paths, end):
    paths.suspect(FLOW, 1_000_000, 1300, 0)

    assert not paths.confirm(FLOW, FAR, end, 1)
    assert 1500 == paths.mtu_to(FAR)


def test_another_flow_confirms_nothing(paths):
    paths.suspect(FLOW, 1_000_000, 1300, 0)

    assert not paths.confirm(bytes(12), FAR, 1_000_000, 1)


def test_suspicion_is_bounded_in_number_and_time(paths):
    for number in range(MOST_SUSPECTED + 1):
        paths.suspect(number.to_bytes(12, "big"), 1, 1300, number)

    assert not paths.confirm(bytes(12), FAR, 1, 0)
    assert paths.expire(1 + SUSPECTED_S)
    assert not paths.confirm((1).to_bytes(12, "big"), FAR, 1, 0)
    assert paths.confirm((2).to_bytes(12, "big"), FAR, 1, 0)
