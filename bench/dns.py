"""How many questions a second does tunsplit answer, beside dnsmasq forwarding to the same upstream?

Prints questions a second and CPU time per question, uncached (every name once) and cached (a hundred names), asked by
dnsperf; then the median time of one question after the other less that of the direct way. "proxy" is the DNS proxy
alone behind a plain UDP socket, "tunsplit" the whole: an excluded app's questions, taken out of the tun.
Needs root, dnsperf and dnsmasq: python -m bench.dns [SECONDS]
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.link import ROOT, SERVER, Link, open_link
from tunsplit.lab.copies import copy_program
from tunsplit.lab.netns import Namespace

NAMES = 400_000
PEER, PROXY = "127.0.0.1", "127.0.0.2"
GOAL_UNCACHED, GOAL_CACHED, GOAL_ADDED_MS = 0.3, 0.2, 0.5

SERVE = f"""
import socket, sys
from ipaddress import ip_address
import trio
from tunsplit.engine.dnstable import DnsTable
from tunsplit.engine.policy import Verdict
from tunsplit.tasks.dnsproxy import Asker, DnsProxy, boottime

class Network:
    def side_device(self, route, family):
        return "eth0"
    def side_identity(self, route):
        return 0

async def main():
    proxy = DnsProxy(DnsTable("linux", relay=(ip_address("{SERVER[4]}"),)), Network())
    served = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    served.setblocking(False)
    served.bind(("{PROXY}", 53))
    asker = Asker(None, Verdict.TUNNEL, None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(proxy.run)
        print("ready", flush=True)
        while True:
            await trio.lowlevel.wait_readable(served)
            now = boottime()
            for _ in range(64):
                try:
                    message, peer = served.recvfrom(4096)
                except BlockingIOError:
                    break
                proxy.ask(message, asker, lambda answer, peer=peer: served.sendto(answer, peer), now)

trio.run(main)
"""

ONE_BY_ONE = """
import socket, struct, sys, time
asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asked.connect((sys.argv[1], 53))
asked.settimeout(1)
for number in range(3000):
    name = b"%s-%d" % (sys.argv[2].encode(), number)
    header = struct.pack("!HHHHHH", number, 0x100, 1, 0, 0, 0)
    message = header + bytes((len(name),)) + name + b"\\5bench\\4test\\0\\0\\1\\0\\1"
    began = time.perf_counter()
    asked.send(message)
    asked.recv(4096)
    print(time.perf_counter() - began)
    time.sleep(0.0002)
"""


class Target(NamedTuple):
    """What answers: its address, its process, and the programs that ask it."""

    name: str
    address: str
    pid: int
    dnsperf: str = "dnsperf"
    python: str = sys.executable


class Result(NamedTuple):
    """Questions a second with microseconds of CPU time for each; the median time of one, beyond the direct way's."""

    uncached: tuple[float, float]
    cached: tuple[float, float]
    added_ms: float


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Bench:
    """What is measured with: a link whose far end has a resolver, and how long a round takes."""

    link: Link
    seconds: float
    rounds: int = 0

    def questions(self, target: Target, *, cached: bool) -> tuple[float, float]:
        """Questions a second, and microseconds of the target's CPU time for each."""
        self.rounds += 1
        names = self.link.directory / "names"
        prefix, count = ("few", 100) if cached else (f"{target.name}{self.rounds}", NAMES)
        names.write_text("".join(f"{prefix}-{number}.bench.test A\n" for number in range(count)))
        options = ["-s", target.address, "-d", str(names), "-l", str(self.seconds), "-q", "100", "-c", "4"]
        before = cpu_s(target.pid)
        command = self.link.host.command([target.dnsperf, *options])
        done = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return number_in(done, "Queries per second"), (cpu_s(target.pid) - before) / number_in(
            done, "Queries completed"
        ) * 1e6

    def median_ms(self, address: str, python: str = sys.executable) -> float:
        """The median time of a question of its own name."""
        self.rounds += 1
        command = self.link.host.command([python, "-c", ONE_BY_ONE, address, f"p{self.rounds}"])
        times = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return statistics.median(map(float, times)) * 1000

    def measure(self, target: Target, direct_ms: float) -> Result:
        """Everything about one target; the better of two rounds counts."""
        uncached = max(self.questions(target, cached=False) for _ in range(2))
        cached = max(self.questions(target, cached=True) for _ in range(2))
        return Result(uncached, cached, self.median_ms(target.address, target.python) - direct_ms)


def number_in(report: str, name: str) -> float:
    """One figure of dnsperf's report."""
    found = re.search(rf"{name}:\s+([\d.]+)", report)
    assert found is not None
    return float(found[1])


def dnsmasq(namespace: Namespace, *options: str) -> list[str]:
    """The command of one in the foreground."""
    return namespace.command(
        ["dnsmasq", "-k", "-C", "/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces", "--pid-file=", *options]
    )


def main() -> None:
    """Measure and print."""
    if shutil.which("dnsperf") is None:
        sys.exit("dnsperf is not installed")
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    with open_link() as link, ExitStack() as stack:

        def started(command: list[str], **options: Any) -> subprocess.Popen[str]:
            process = stack.enter_context(subprocess.Popen(command, text=True, **options))
            stack.callback(process.terminate)
            return process

        bench = Bench(link, seconds)
        upstream = ["--address=/bench.test/192.0.2.9", "--local-ttl=3600"]
        started(dnsmasq(link.net, f"--listen-address={SERVER[4]}", *upstream))
        peer = started(dnsmasq(link.host, f"--listen-address={PEER}", f"--server={SERVER[4]}"))
        command = link.host.command([sys.executable, "-c", SERVE])
        proxy = started(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert proxy.stdout is not None
        proxy.stdout.readline()
        direct = bench.median_ms(SERVER[4])
        first = report(bench.measure(Target("dnsmasq", PEER, peer.pid), direct), "dnsmasq")
        report(bench.measure(Target("proxy", PROXY, proxy.pid), direct), "proxy", first)
        python = str(copy_program("python", link.directory / "python"))
        with link.tunsplit(f'[dns]\ncustom = ["{SERVER[4]}"]\n') as pid:
            whole = Target("tunsplit", SERVER[4], pid, link.copy("dnsperf"), python)
            report(bench.measure(whole, direct), "tunsplit", first)
        print(f"goals: uncached {GOAL_UNCACHED}, cached {GOAL_CACHED} of dnsmasq's; p50 + {GOAL_ADDED_MS} ms")


def report(result: Result, name: str, beside: Result | None = None) -> Result:
    """Print one row."""
    parts = []
    for kind in ("uncached", "cached"):
        rate, cpu = getattr(result, kind)
        ratio = f" ratio {rate / getattr(beside, kind)[0]:.2f}" if beside else ""
        parts.append(f"{kind} {rate:7,.0f}/s {cpu:6.1f} us{ratio}")
    print(f"{name:9} {'  '.join(parts)}  p50 {result.added_ms:+.3f} ms", flush=True)
    return result


if __name__ == "__main__":
    main()
