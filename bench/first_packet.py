"""What does the first packet of a flow cost: of a process that has been looked at before, and of one that has not?

A client sends one datagram from each of FLOWS sockets and waits for its answer, and connects FLOWS others; idle, and
beside the PROCESSES programs with SOCKETS sockets each of `bench.connections`. A process is unknown that has just
started: each of its kind opens one flow alone. Prints p50 and p99 of the answer, beside the kernel's direct path, and
the daemon's own CPU time for one flow, which means something also while others keep the machine busy: less what it
spends in as long a time without a flow, for it hears of every process that starts on the machine.
Needs root: python -m bench.first_packet [FLOWS]
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from bench.connections import PROCESSES, SOCKETS, neighbours
from bench.link import SERVER, Link, cpu_us, open_link
from tunsplit.lab.copies import copy_program

T = TypeVar("T")

PORT = 7001
QUIET_S = 2.0
UNKNOWN = 40  # new processes: each takes longer to start than to be looked at

SERVE = f"""
import socket, threading
listener = socket.create_server(("{SERVER[4]}", {PORT}), backlog=1000)
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("{SERVER[4]}", {PORT}))
def accept():
    while True:
        listener.accept()[0].close()
threading.Thread(target=accept, daemon=True).start()
print("listening", flush=True)
while True:
    datagram, client = server.recvfrom(100)
    server.sendto(datagram, client)
"""

# Prints microseconds, one a flow; the first of a process is not counted where there are more.
ASK = f"""
import socket, sys, time
kind, flows = socket.SocketKind[sys.argv[1]], int(sys.argv[2])
for number in range(flows + (flows > 1)):
    with socket.socket(socket.AF_INET, kind) as one:
        one.settimeout(5)
        began = time.perf_counter()
        one.connect(("{SERVER[4]}", {PORT}))
        if kind == socket.SOCK_DGRAM:
            one.send(b"?")
            one.recv(100)
        if number or flows == 1:
            print((time.perf_counter() - began) * 1e6)
"""
KINDS = {"TCP": "SOCK_STREAM", "UDP": "SOCK_DGRAM"}


class Asker(NamedTuple):
    """What opens flows: a program in the host of `link`, and the kind of its sockets."""

    link: Link
    program: str
    kind: str

    def ask(self, flows: int) -> list[float]:
        """Microseconds until the answer, of each flow of one new process."""
        argv = self.link.host.command([self.program, "-I", "-S", "-c", ASK, self.kind, str(flows)])
        return [float(line) for line in subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()]

    def ask_often(self, times: int, flows: int) -> list[float]:
        """The same of several processes, one after the other."""
        return [answer for _ in range(times) for answer in self.ask(flows)]


def spent(pid: int, work: Callable[[], T]) -> tuple[T, float, float]:
    """What some work comes to, and the microseconds of a process's CPU time, and of the clock's, that it took."""
    before, began = cpu_us(pid), time.perf_counter()
    done = work()
    return done, cpu_us(pid) - before, (time.perf_counter() - began) * 1e6


def compare(name: str, asker: Asker, flows: int) -> None:
    """Measure and print two rows."""
    direct = asker.ask(flows)
    with asker.link.tunsplit() as daemon:
        asker.ask(1)
        _, idle, _ = spent(daemon, partial(time.sleep, QUIET_S))
        idle_share = idle / (QUIET_S * 1e6)
        for kind, times, each in (("known", 1, flows), ("unknown", UNKNOWN, 1)):
            answers, used, took = spent(daemon, partial(asker.ask_often, times, each))
            p50, p99 = quantiles(answers)
            print(
                f"{name:13}  {kind:7}  p50 {p50:7,.0f} µs  p99 {p99:7,.0f} µs  "
                f"CPU {(used - took * idle_share) / len(answers):6,.0f} µs a flow  "
                f"(direct p50 {quantiles(direct)[0]:,.0f} µs)",
                flush=True,
            )


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The median, and what one of a hundred exceeds."""
    hundredths = statistics.quantiles(values, n=100)
    return hundredths[49], hundredths[98]


def main() -> None:
    """Measure and print."""
    flows = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with open_link() as link, ExitStack() as stack:
        client = str(copy_program("python", Path(link.directory) / "client"))
        server = stack.enter_context(link.background(link.net, [sys.executable, "-c", SERVE], stdout=subprocess.PIPE))
        assert server.stdout is not None
        server.stdout.readline()
        askers = {name: Asker(link, client, kind) for name, kind in KINDS.items()}
        for name, asker in askers.items():
            compare(f"idle {name}", asker, flows)
        with neighbours(link):
            for name, asker in askers.items():
                compare(f"{PROCESSES} x {SOCKETS} {name}", asker, flows)


if __name__ == "__main__":
    main()
