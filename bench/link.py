"""Two namespaces and one veth pair: the kernel's direct path, and tunsplit in its place.

Shared by the benchmarks. The host's only way out is eth0 and the tunnel is absent, so only the excluded copy of a
program gets anywhere: by tunsplit, with full attribution and NAT.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunsplit.lab.netns import Namespace, create, delete

SERVER = {4: "198.51.100.1", 6: "2001:db8:100::1"}
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Link:
    """`host` and `net`, joined by eth0; `directory` holds copies of programs and the configuration."""

    host: Namespace
    net: Namespace
    directory: Path

    def copy(self, program: str) -> str:
        """A copy of a program, excluded by the configuration of `tunsplit`."""
        found = shutil.which(program)
        if found is None:
            sys.exit(f"{program} is not installed")
        return shutil.copy(found, str(self.directory / program))

    @contextmanager
    def background(self, namespace: Namespace, argv: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
        """Run a program beside the block."""
        with subprocess.Popen(namespace.command(argv), text=True, **options) as process:
            try:
                yield process
            finally:
                process.terminate()

    @contextmanager
    def tunsplit(self, others: str = "") -> Iterator[int]:
        """Run tunsplit in the host, from ready on; its pid. `others` are further sections of its configuration."""
        config = self.directory / "tunsplit.toml"
        config.write_text(
            f'[tunnel]\ninterface = "wg0"\nendpoint = "none"\n[log]\nlevel = "warning"\n'
            f'[control]\nsocket = "{self.directory}/tunsplit.sock"\n[[app]]\npath = "{self.directory}/*"\n{others}'
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        argv = [sys.executable, "-m", "tunsplit", "run", "-c", str(config)]
        with self.background(self.host, argv, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                sys.exit("tunsplit did not start")
            yield process.pid


@contextmanager
def open_link() -> Iterator[Link]:
    """Build it; gone afterwards."""
    names = [f"tsbench{os.getpid()}{end}" for end in "hn"]
    create(names)
    try:
        host, net = (Namespace(name) for name in names)
        for namespace in (host, net):
            namespace.sysctl({"net/ipv6/conf/all/accept_dad": 0, "net/ipv6/conf/default/accept_dad": 0})
        host.ip(f"link add eth0 type veth peer name eth0 netns {net.name}")
        host.ip(
            "link set lo up\nlink set eth0 up\naddr add 192.0.2.2/24 dev eth0\naddr add 2001:db8::2/64 dev eth0 nodad"
        )
        net.ip(
            "link set lo up\nlink set eth0 up\naddr add 192.0.2.1/24 dev eth0\naddr add 2001:db8::1/64 dev eth0 nodad"
        )
        net.ip(f"addr add {SERVER[4]}/32 dev lo\naddr add {SERVER[6]}/128 dev lo nodad")
        host.ip("route add default via 192.0.2.1\nroute add default via 2001:db8::1")
        with tempfile.TemporaryDirectory(prefix="tsbench") as directory:
            yield Link(host, net, Path(directory))
    finally:
        delete(names)


def cpu_us(pid: int) -> float:
    """The CPU time of a process so far (Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat)."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1000


def serve_iperf(link: Link, stack: ExitStack) -> None:
    """Run a server for each IP version until the stack closes; they listen when this returns."""
    for address in SERVER.values():
        # Bound: a UDP server on all addresses would answer from the one nearest to the client.
        argv = ["iperf3", "-s", "-B", address, "--forceflush"]
        server = stack.enter_context(link.background(link.net, argv, stdout=subprocess.PIPE))
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            pass


def iperf(link: Link, client: str, version: int, *options: str) -> dict[str, Any]:
    """One test from the host: what iperf3 reports at its end."""
    argv = [client, "-c", SERVER[version], "-J", *options]
    for _ in range(20):
        done = subprocess.run(link.host.command(argv), capture_output=True, text=True, check=False)
        answer: dict[str, Any] = json.loads(done.stdout)
        if "error" not in answer:
            return dict(answer["end"])
        time.sleep(0.1)  # the server is still busy with the last test
    sys.exit(f"iperf3: {answer['error']}")
