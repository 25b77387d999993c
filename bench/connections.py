"""How many connections a second (connect, a byte each way, close) does an excluded app make?

Prints connections a second, direct, through tunsplit and through the nearest peer in the same run: by one client, one
after the other, and by CLIENTS at once; idle, and beside PROCESSES programs that hold SOCKETS sockets each, which
attribution has to tell from the one that asks. One client waits for each packet in turn, so its rate is that of
processors that wake up; many keep them awake, and their rate is what the way carries. And the daemon's own CPU time for
one connection, which says more while others keep the machine busy.

Each figure is made towards a server's port of its own. A connection is remembered for a minute, by the server
(TIME_WAIT) and by the host's connection tracking, and whoever comes next towards the same port with the same address
has to draw another port, or is asked who it is: the second of two measurements would pay for the first.
Needs root, and for the peer a package index: python -m bench.connections [SECONDS]
"""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.link import SERVER, Link, cpu_us, open_link
from bench.peer import install_peer, run_peer
from tunsplit.lab.copies import copy_program

PROCESSES, SOCKETS = 300, 40
CLIENTS = 8
GOAL_IDLE, GOAL_BUSY = 2000, 1500
ports = itertools.count(7000)

# As many servers as clients, or one that has connected and waits for its turn to speak would keep the others waiting.
SERVE = f"""
import os, signal, socket, sys
port, clients = int(sys.argv[1]), int(sys.argv[2])
os.setpgrp()
signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
listener = socket.create_server(("{SERVER[4]}", port), backlog=1024)
print("listening", flush=True)
for _ in range(clients - 1):
    if not os.fork():
        break
while True:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(connection.recv(1))
"""

# From the moment that it is known: what a process costs that is not, `bench.first_packet` measures.
CONNECT = f"""
import socket, sys, time
port, seconds, count, failed, slowest = int(sys.argv[1]), float(sys.argv[2]), 0, 0, 0.0
def connect():
    try:
        with socket.create_connection(("{SERVER[4]}", port), 5) as connection:
            connection.sendall(b"?")
            return connection.recv(1) == b"?"
    except OSError:
        return False
while not connect():
    pass
print("ready", flush=True)
input()
began = now = time.perf_counter()
while now - began < seconds:
    done = connect()
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
    """What clients came to together, and the CPU time of whoever carries it, for one connection."""

    per_second: float
    slowest_ms: float
    failed: int
    cpu_us: float

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.per_second:7,.0f}/s (slowest {self.slowest_ms:.0f} ms{failed})"


def measure(link: Link, client: str, seconds: float, clients: int, carrier: int | None = None) -> Rate:
    """Connect again and again, with so many clients at once; `carrier` is the pid of the way's own process."""
    port, pipe = str(next(ports)), subprocess.PIPE
    with ExitStack() as stack:
        argv = [sys.executable, "-c", SERVE, port, str(clients)]
        server = stack.enter_context(link.background(link.net, argv, stdout=pipe))
        assert server.stdout is not None
        server.stdout.readline()
        argv = [client, "-c", CONNECT, port, str(seconds)]
        programs = [
            stack.enter_context(link.background(link.host, argv, stdin=pipe, stdout=pipe)) for _ in range(clients)
        ]
        for program in programs:
            assert program.stdout is not None
            program.stdout.readline()
        spent = 0.0 if carrier is None else -cpu_us(carrier)
        for program in programs:
            assert program.stdin is not None
            program.stdin.write("\n")
            program.stdin.flush()
        results = [program.communicate()[0].split() for program in programs]
        spent += 0.0 if carrier is None else cpu_us(carrier)
    per_second = sum(float(rate) for rate, _, _ in results)
    slowest, failed = max(float(one) for _, one, _ in results), sum(int(one) for _, _, one in results)
    return Rate(per_second, slowest, failed, spent / (per_second * seconds))


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
            with one.stdout as ready:  # who starts clients is to have few descriptors: it is looked at for each of them
                ready.readline()
        yield


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    with open_link() as link:
        client = str(copy_program("python", Path(link.directory) / "client"))
        peer = install_peer(link)
        for clients in (1, CLIENTS):
            compare(f"idle, {clients} at once", link, client, clients, peer, seconds, GOAL_IDLE)
        with neighbours(link):
            for clients in (1, CLIENTS):
                name = f"{PROCESSES} x {SOCKETS}, {clients} at once"
                compare(name, link, client, clients, peer, seconds, GOAL_BUSY)


def compare(name: str, link: Link, client: str, clients: int, peer: Path | None, seconds: float, goal: int) -> None:
    """Measure and print one row."""
    direct = measure(link, client, seconds, clients)
    with link.tunsplit() as daemon:
        ours = measure(link, client, seconds, clients, daemon)
    ratio = ours.per_second / direct.per_second
    row = f"{name:20}  direct {direct}  tunsplit {ours}  ratio {ratio:.2f}  CPU {ours.cpu_us:.0f} µs"
    if peer is not None:
        with run_peer(link, peer, client) as carrier:
            theirs = measure(link, client, seconds, clients, carrier)
        row += f"  mihomo {theirs}  CPU {theirs.cpu_us:.0f} µs"
    print(f"{row}  (goal {goal:,}/s)", flush=True)


if __name__ == "__main__":
    main()
