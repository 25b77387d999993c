"""How many connections a second (connect, a byte each way, close) does an excluded app make, one after the other?

Prints connections a second, direct and through tunsplit in the same run, idle and beside PROCESSES programs that hold
SOCKETS sockets each, which attribution has to tell from the one that asks.
Needs root: python -m bench.connections [SECONDS]
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.link import SERVER, Link, open_link
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
seconds, count, slowest = float(sys.argv[1]), 0, 0.0
began = now = time.perf_counter()
while now - began < seconds:
    with socket.create_connection(("{SERVER[4]}", {PORT})) as connection:
        connection.sendall(b"?")
        connection.recv(1)
    count, before, now = count + 1, now, time.perf_counter()
    slowest = max(slowest, now - before)
print(count / (now - began), slowest * 1000)
"""

HOLD = f"""
import socket, time
held = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range({SOCKETS})]
for one in held:
    one.bind(("127.0.0.1", 0))
print("held", flush=True)
time.sleep(3600)
"""


def measure(link: Link, client: str, seconds: float) -> tuple[float, float]:
    """Connections a second, and the slowest of them in milliseconds."""
    argv = link.host.command([client, "-c", CONNECT, str(seconds)])
    rate, slowest = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    return float(rate), float(slowest)


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
        direct, _ = measure(link, client, seconds)
        with link.tunsplit():
            report("idle", direct, measure(link, client, seconds), GOAL_IDLE)
        with neighbours(link):
            direct, _ = measure(link, client, seconds)
            with link.tunsplit():
                report(f"{PROCESSES} x {SOCKETS}", direct, measure(link, client, seconds), GOAL_BUSY)


def report(name: str, direct: float, through: tuple[float, float], goal: int) -> None:
    """Print one row."""
    rate, slowest = through
    print(
        f"{name:9}  direct {direct:7,.0f}/s  tunsplit {rate:7,.0f}/s  ratio {rate / direct:.2f}  "
        f"slowest {slowest:.1f} ms  (goal {goal:,}/s)",
        flush=True,
    )


if __name__ == "__main__":
    main()
