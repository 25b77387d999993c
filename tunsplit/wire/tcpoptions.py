"""TCP's options as they lie behind its header (RFC 9293 §3.1), and how some are hidden from the other end."""

from collections.abc import Iterator

from tunsplit.wire.ip import unpack_u16, unpack_u32

OPTIONS_AT = 20  # of the transport header
END, NO_OPERATION = 0, 1
TIMESTAMPS, MPTCP, FAST_OPEN = 8, 30, 34  # RFC 7323 §3, RFC 8684 §3, RFC 7413 §4.1.1
EXPERIMENTS, FAST_OPEN_EXPERIMENT = (253, 254), 0xF989  # RFC 6994; Linux tries it where the option got no answer


def hide_untrusted(segment: bytearray | memoryview, kinds: frozenset[int]) -> None:
    """Overwrite options of these kinds with such as mean nothing, in place; Fast Open's first form counts as such.

    `segment` begins with TCP's header and has at least 20 bytes. What follows an option that is cut stays: nobody
    reads it.
    """
    end = min((segment[12] >> 4) * 4, len(segment))
    for kind, start, after in _options(segment, end):
        if kind in EXPERIMENTS and after - start >= 4 and unpack_u16(segment, start + 2)[0] == FAST_OPEN_EXPERIMENT:
            kind = FAST_OPEN
        if kind in kinds:
            segment[start:after] = bytes((NO_OPERATION,)) * (after - start)


def timestamp(segment: bytes | bytearray | memoryview) -> int | None:
    """The time that a segment shows, in the sender's ticks (TSval, RFC 7323 §3.2); None: it shows none."""
    end = min((segment[12] >> 4) * 4, len(segment))
    for kind, start, after in _options(segment, end):
        if kind == TIMESTAMPS and after - start == 10:
            return int(unpack_u32(segment, start + 2)[0])
    return None


def _options(segment: bytes | bytearray | memoryview, end: int) -> Iterator[tuple[int, int, int]]:
    """Each option that is whole: its kind, where it begins, and where the next one does."""
    at = OPTIONS_AT
    while at < end and (kind := segment[at]) != END:
        if kind == NO_OPERATION:
            at += 1
            continue
        if at + 1 >= end or (length := segment[at + 1]) < 2 or at + length > end:
            return
        yield kind, at, at + length
        at += length
