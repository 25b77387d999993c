"""How many connections a second (connect, a byte each way, close) does an excluded app make, one after the other?

Prints connections a second, direct, through tunsplit and through the nearest peer in the same run, idle and beside
PROCESSES programs that hold SOCKETS sockets each, which attribution has to tell from the one that asks.
Needs root, and for the peer a package index: python -m bench.connections [SECONDS]
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.link import SERVER, Link, open_link
from bench.peer import install_peer, run_peer
from tunsplit.lab.copies import copy_program

PROCESSES, SOCKETS = 300, 40
GOAL_IDLE, GOAL_BUSY = 2000, 1500
PORT = 7000

SERVE = f"""
import socket
listener = socket.create_server(("{SERVER[4]}", {PORT}), backlog=1024)
print("listening", flush=True)
while True:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(connection.recv(1))
"""

CONNECT = f"""
import socket, sys, time
seconds, count, failed, slowest = float(sys.argv[1]), 0, 0, 0.0
began = now = time.perf_counter()
while now - began < seconds:
    try:
        with socket.create_connection(("{SERVER[4]}", {PORT}), 5) as connection:
            connection.sendall(b"?")
            done = connection.recv(1) == b"?"
    except OSError:
        done = False
    before, now = now, time.perf_counter()
    count, failed = count + done, failed + (not done)
    slowest = max(slowest, now - before)
print(count / (now - began), slowest * 1000, failed)
"""

HOLD = f"""
import socket, time
held = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range({SOCKETS})]
for one in held:
    one.bind(("127.0.0.1", 0))
print("held", flush=True)
time.sleep(3600)
"""


class Rate(NamedTuple):
    """What a client came to."""

    per_second: float
    slowest_ms: float
    failed: int

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.per_second:7,.0f}/s (slowest {self.slowest_ms:.0f} ms{failed})"


def measure(link: Link, client: str, seconds: float) -> Rate:
    """Connect again and again."""
    argv = link.host.command([client, "-c", CONNECT, str(seconds)])
    rate, slowest, failed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    return Rate(float(rate), float(slowest), int(failed))


@contextmanager
def neighbours(link: Link) -> Iterator[None]:
    """Many other programs with many sockets, in the same host."""
    with ExitStack() as stack:
        held = [
            stack.enter_context(link.background(link.host, [sys.executable, "-c", HOLD], stdout=subprocess.PIPE))
            for _ in range(PROCESSES)
        ]
        for one in held:
            assert one.stdout is not None
            one.stdout.readline()
        yield


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    with open_link() as link, ExitStack() as stack:
        client = str(copy_program("python", Path(link.directory) / "client"))
        argv = [sys.executable, "-c", SERVE]
        server = stack.enter_context(link.background(link.net, argv, stdout=subprocess.PIPE))
        assert server.stdout is not None
        server.stdout.readline()
        peer = install_peer(link)
        compare("idle", link, client, peer, seconds, GOAL_IDLE)
        with neighbours(link):
            compare(f"{PROCESSES} x {SOCKETS}", link, client, peer, seconds, GOAL_BUSY)


def compare(name: str, link: Link, client: str, peer: Path | None, seconds: float, goal: int) -> None:
    """Measure and print one row."""
    direct = measure(link, client, seconds)
    with link.tunsplit():
        ours = measure(link, client, seconds)
    row = f"{name:9}  direct {direct}  tunsplit {ours}  ratio {ours.per_second / direct.per_second:.2f}"
    if peer is not None:
        with run_peer(link, peer, client):
            theirs = measure(link, client, seconds)
        row += f"  mihomo {theirs}"
    print(f"{row}  (goal {goal:,}/s)", flush=True)


if __name__ == "__main__":
    main()
