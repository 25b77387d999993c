"""Whether TCP's timestamps tell whoever reads them that two connections are one host's (RFC 7323 §7.1).

Some facts about TCP's clock:
- Each connection adds an offset of its own to the host's clock. Older kernels make it of the two addresses alone, so
  that a server reads one time on all connections from an address; since 2026 the ports take part, in stable kernels too
  (net/core/secure_seq.c, secure_tcp_ts_off). With net.ipv4.tcp_timestamps = 2 nobody has an offset.
- A socket tells the time that it would send (TCP_TIMESTAMP), in milliseconds mostly.
"""

import socket

TCP_TIMESTAMP = 24  # linux/tcp.h
CLOSE = 1000  # ticks; two offsets drawn by lot are as close once in two million times
PATIENCE_S = 0.2


def is_shared() -> bool:
    """Whether two connections between the same addresses show the same time; True also where nobody can tell."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            with (
                socket.create_connection(address, PATIENCE_S) as one,
                socket.create_connection(address, PATIENCE_S) as other,
            ):
                times = [time_of(own) for own in (one, other)]
    except OSError:  # loopback is down, or somebody's firewall is in the way
        return True
    apart = (times[1] - times[0]) % (1 << 32)
    return min(apart, (1 << 32) - apart) < CLOSE


def time_of(own: socket.socket) -> int:
    """The time that a connection shows, in ticks; signed, as getsockopt has it."""
    return own.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP)
