"""What a server remembers of a TCP connection that it has closed (TIME_WAIT), and which new one it tells from it.

Theory of operation. For a minute, a SYN with the same addresses and ports counts as one of the old connection unless
what it says is beyond all that the old one said: its timestamp, or where either has none its sequence number (RFC 9293
§3.10.7.4, RFC 6191; tcp_minisocks.c, tcp_timewait_state_process). Else the server answers with an ACK of the old one,
the app's host with a RST, and the SYN comes again some milliseconds later. Each connection begins at a random number,
and one of two at a lower one than the last on its port.
"""

from typing import NamedTuple

from tunsplit.wire.ip import unpack_u32
from tunsplit.wire.tcpoptions import timestamp

HALF = 1 << 31  # numbers and times go round: what is ahead by less than this is later
TICKS = 1000  # a second at most (RFC 7323 §5.4); Linux has as many


class Connection(NamedTuple):
    """A TCP connection, as its server sees it."""

    ends: bytes  # both addresses, and the server's port
    syn: bytes  # from TCP's header on
    opened: float
    octets: int  # at least as many as the client has sent

    def may_follow(self, last: "Connection") -> bool:
        """Whether a server takes this one for a new one that remembers the `last` one of the same port."""
        if self.ends != last.ends or not last.syn:
            return True
        then, now = timestamp(last.syn), timestamp(self.syn)
        if then is not None and now is not None:
            return TICKS * (self.opened - last.opened) < (now - then) % (2 * HALF) < HALF
        return last.octets < (_number(self.syn) - _number(last.syn)) % (2 * HALF) < HALF


def _number(syn: bytes) -> int:
    return int(unpack_u32(syn, 4)[0])
