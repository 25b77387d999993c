"""How many questions a second does the DNS proxy answer, beside dnsmasq forwarding to the same upstream?

Prints questions a second and CPU time per question, uncached (every name once) and cached (a hundred names), asked by
dnsperf; then the median time of one question after the other, and what dnsmasq and the proxy add to the direct way.
The proxy stands behind a plain UDP socket here: no tun, no attribution.
Needs root, dnsperf and dnsmasq: python -m bench.dns [SECONDS]
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from bench.link import ROOT, SERVER, Link, open_link

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
    message = struct.pack("!HHHHHH", number, 0x100, 1, 0, 0, 0) + bytes((len(name),)) + name + b"\\5bench\\4test\\0\\0\\1\\0\\1"
    began = time.perf_counter()
    asked.send(message)
    asked.recv(4096)
    print(time.perf_counter() - began)
    time.sleep(0.0002)
"""  # noqa: E501  # one line of the program


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def dnsperf(link: Link, address: str, names: Path, seconds: float, pid: int) -> tuple[float, float]:
    """Questions a second, and microseconds of the server's CPU time for each."""
    command = ["dnsperf", "-s", address, "-d", str(names), "-l", str(seconds), "-q", "100", "-c", "4"]
    before = cpu_s(pid)
    done = subprocess.run(link.host.command(command), capture_output=True, text=True, check=True).stdout
    completed = int(re.search(r"Queries completed:\s+(\d+)", done)[1])  # type: ignore[index]  # dnsperf says so
    rate = float(re.search(r"Queries per second:\s+([\d.]+)", done)[1])  # type: ignore[index]  # the same
    return rate, (cpu_s(pid) - before) / completed * 1e6


def median_ms(link: Link, address: str, prefix: str) -> float:
    """The median time of a question of its own name."""
    command = link.host.command([sys.executable, "-c", ONE_BY_ONE, address, prefix])
    times = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return statistics.median(map(float, times)) * 1000


def dnsmasq(link: Link, namespace: str, *options: str) -> subprocess.Popen[str]:
    """Start one in the foreground."""
    command = ["dnsmasq", "-k", "-C", "/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces", "--pid-file=",
               "--dns-forward-max=1000", *options]  # fmt: skip
    return subprocess.Popen(getattr(link, namespace).command(command), text=True)


def main() -> None:
    """Measure and print."""
    if shutil.which("dnsperf") is None:
        sys.exit("dnsperf is not installed")
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    with open_link() as link, ExitStack() as stack:

        def started(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        started(
            dnsmasq(link, "net", f"--listen-address={SERVER[4]}", "--address=/bench.test/192.0.2.9", "--local-ttl=3600")
        )
        peer = started(dnsmasq(link, "host", f"--listen-address={PEER}", f"--server={SERVER[4]}", "--cache-size=150"))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        argv = link.host.command([sys.executable, "-c", SERVE])
        proxy = started(subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, env=environment))
        assert proxy.stdout is not None
        proxy.stdout.readline()
        servers = {"dnsmasq": (PEER, peer.pid), "proxy": (PROXY, proxy.pid)}
        few = link.directory / "few"
        few.write_text("".join(f"n{number}.bench.test A\n" for number in range(100)))
        for kind, goal in (("uncached", GOAL_UNCACHED), ("cached", GOAL_CACHED)):
            rates = {}
            for round_ in (1, 2):
                for name, (address, pid) in servers.items():
                    names = few
                    if kind == "uncached":
                        names = link.directory / "many"
                        names.write_text("".join(f"{name}{round_}-{n}.bench.test A\n" for n in range(NAMES)))
                    rates[name] = dnsperf(link, address, names, seconds, pid)
            ratio = rates["proxy"][0] / rates["dnsmasq"][0]
            shown = "  ".join(f"{name} {rate:8,.0f}/s {cpu:5.1f} us" for name, (rate, cpu) in rates.items())
            print(f"{kind:9} {shown}  ratio {ratio:.2f}  (goal {goal})", flush=True)
        direct = median_ms(link, SERVER[4], "d")
        for name, (address, _) in servers.items():
            print(f"p50 added {name:8} {median_ms(link, address, name) - direct:.3f} ms  (goal {GOAL_ADDED_MS})")


if __name__ == "__main__":
    main()
