"""The service manager that has started us, if there is one: what it is told, and how often it wants to hear of us.

Some facts, from sd_notify(3) and systemd.service(5):

- It is a datagram to the socket that $NOTIFY_SOCKET names; a leading @ stands for the zero byte of an abstract one.
- $WATCHDOG_USEC is the longest silence it bears, in microseconds; $WATCHDOG_PID whom it means. It asks to hear from us
  twice as often.
"""

import os
import socket


def tell(state: str) -> None:
    """Tell it, as `READY=1` or `WATCHDOG=1`; without a service manager nothing happens."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(state.encode())


def watchdog_period() -> float | None:
    """How often it wants to hear `WATCHDOG=1`, in seconds; None: never."""
    pid, longest = (os.environ.get(name, "") for name in ("WATCHDOG_PID", "WATCHDOG_USEC"))
    if not longest.isdecimal() or (pid and pid != str(os.getpid())):
        return None
    return int(longest) / 2e6
