"""Options of TCP that are hidden, and any bytes at all in their place."""

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
