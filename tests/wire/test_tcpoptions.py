"""Options of TCP that are hidden or read, and any bytes at all in their place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunsplit.wire import tcpoptions


@given(st.binary(min_size=20, max_size=80), st.frozensets(st.integers(2, 255), max_size=4))
def test_whatever_stands_there_no_octet_moves_and_only_options_change(segment, kinds):
    hidden = bytearray(segment)
    tcpoptions.hide_untrusted(hidden, kinds)

    assert len(segment) == len(hidden)
    end = min((segment[12] >> 4) * 4, len(segment))
    assert (segment[:20], segment[max(end, 20) :]) == (bytes(hidden[:20]), bytes(hidden[max(end, 20) :]))
    assert all(new in (old, tcpoptions.NO_OPERATION) for old, new in zip(segment, hidden, strict=True))
    again = bytearray(hidden)
    tcpoptions.hide_untrusted(again, kinds)
    assert hidden == again


TIME = bytes((8, 10, 1, 2, 3, 4, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (TIME, 0x01020304),
        (bytes((2, 4, 5, 180, 4, 2)) + TIME, 0x01020304),
        (bytes((1, 1)) + TIME + TIME[:2] + bytes(8), 0x01020304),
        (b"", None),
        (bytes((0,)) + TIME, None),
        (bytes((8, 6, 1, 2, 3, 4)), None),
        (TIME[:8], None),
    ],
)
def test_the_time_that_a_segment_shows(options, shown):
    size = 20 + len(options)
    header = bytearray(20)
    header[12] = (size + 3) // 4 << 4

    assert shown == tcpoptions.timestamp(bytes(header) + options + bytes(-size % 4))


@given(st.binary(min_size=20, max_size=80))
def test_any_octets_show_some_time_or_none(segment):
    shown = tcpoptions.timestamp(segment)

    assert shown is None or shown.to_bytes(4, "big") in segment
