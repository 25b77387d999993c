"""What does a flood on the uplink cost an app in the tunnel?

Somebody on the uplink's network sends 200,000 packets a second to the host, of many kinds, while an included app
streams in the tunnel. The control is the same sender, whose packets go to another machine: on few cores it costs much
by itself. Both take turns of half a second beside one stream. Prints what the sender achieved, the stream's Gbit/s
beside both, and the median of the ratios. Needs root and iperf3: python -m bench.flood [PAIRS [RATE]]
"""

import json
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

import trio

from bench.arguments import whole_numbers
from bench.forged import CLOSED_PORTS, NAT_PORTS, SENDER, Forger
from tunsplit.lab import Lab, addresses, open_lab
from tunsplit.lab.daemon import Daemon

GOAL = 0.80
RATE = 200_000  # packets a second
SLICE_S = 0.5
SETTLES_S = 0.1  # of each slice, in which the last one's queues run empty
LEAD_S = 0.7  # until the stream runs
ELSEWHERE = "elsewhere"
LISTENER = 8080
NEIGHBOUR = IPv4Address("192.168.50.77")  # on the uplink's network

# An excluded app with a flow of its own, and a server.
APP = """
import socket, sys
server = socket.create_server(("", int(sys.argv[2])), backlog=1024)
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.settimeout(5)
own.connect((sys.argv[1], 7))
own.send(b"?")
own.recv(100)
print("open", flush=True)
sys.stdin.read()
"""


@asynccontextmanager
async def start_app(lab: Lab, program: Path) -> AsyncIterator[None]:
    """Run the excluded app beside the block."""
    argv = [str(program), "-I", "-S", "-c", APP, str(lab.server(4)), str(LISTENER)]
    async with lab.host.start(argv, stdin=subprocess.PIPE) as running:
        await running.wait_written("open\n")
        yield


async def find_port(daemon: Daemon) -> int:
    """The app's port on the uplink."""
    (flow,) = [one for one in await daemon.flows() if one["protocol"] == "udp" and one["verdict"] == "uplink"]
    return int(flow["nat"].rpartition(":")[2])


async def mac(lab: Lab, namespace: str, device: str) -> bytes:
    """The Ethernet address of a device."""
    shown = (await getattr(lab, namespace).run(["ip", "-json", "link", "show", device])).stdout
    return bytes.fromhex(json.loads(shown)[0]["address"].replace(":", ""))


async def forge(lab: Lab, port: int) -> dict[str, tuple[str, list[bytes]]]:
    """By kind, the router's device, and frames; `port` is one of NAT's that is in use."""
    own = IPv4Address(addresses.HOST[4].ip)
    server = IPv4Address(addresses.SERVER[4].ip)
    elsewhere = Forger(await mac(lab, "router", "inet0"), await mac(lab, "internet", "eth0"), NEIGHBOUR)
    host = Forger(await mac(lab, "router", "lan0"), await mac(lab, "host", "eth0"), own)
    frames = {
        "a closed port": host.datagrams(CLOSED_PORTS),
        "NAT's ports": host.datagrams(NAT_PORTS),
        "a live port, others' packets": host.datagrams((port, port)),
        "a live flow": host.datagrams((port, port), (server, 7)),
        "SYN to NAT's ports": host.connections(NAT_PORTS),
        "SYN to closed ports": host.connections(CLOSED_PORTS),
        "SYN to a server": host.connections((LISTENER, LISTENER)),
        "fragments": host.fragments(),
        "ICMP errors": host.errors(),
        "ICMP errors about a live flow": host.errors((port, server, 7)),
        "too big, a live flow": host.errors((port, server, 7), mtu=1300),
        "ARP": host.arp(),
    }
    return {
        ELSEWHERE: ("inet0", elsewhere.datagrams(NAT_PORTS)),
        **{name: ("lan0", made) for name, made in frames.items()},
    }


async def flood(lab: Lab, floods: list[tuple[str, list[bytes]]], rate: int, seconds: float) -> list[float]:
    """Send frames from the router's devices, by turns; packets of each that went out a second."""
    words = []
    for number, (device, frames) in enumerate(floods):
        file = lab.directory / f"frames-{number}"
        file.write_bytes(b"".join(struct.pack("!H", len(frame)) + frame for frame in frames))
        words += [str(file), device]
    numbers = [str(number) for number in (rate, seconds, SLICE_S)]
    done = await lab.router.run([sys.executable, "-I", "-S", "-c", SENDER, *numbers, *words])
    return [float(line) for line in done.stdout.splitlines()]


def sample(pairs: int) -> list[float]:
    """Gbit/s that leave by the tunnel in each slice; in a thread of the host's namespace."""
    speeds = []
    first = 2 * (int(time.monotonic() / SLICE_S / 2) + 1)  # of the first flood
    for number in range(first, first + 2 * pairs):
        time.sleep(max(0, number * SLICE_S + SETTLES_S - time.monotonic()))
        before, began = sent(), time.monotonic()
        time.sleep(max(0, (number + 1) * SLICE_S - time.monotonic()))
        speeds.append((sent() - before) * 8e-9 / (time.monotonic() - began))
    return speeds


def sent() -> int:
    """Octets that the tunnel's device has sent."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith(f"{addresses.TUNNEL_DEVICE}:")]
    return int(line.split()[9])


async def measure(
    lab: Lab, port: int, control: tuple[str, list[bytes]], other: tuple[str, list[bytes]], rate: int, pairs: int
) -> tuple[list[tuple[float, float]], list[float]]:
    """Gbit/s beside the control and beside the other flood, by pairs; and packets a second of both."""
    found: dict[str, list[float]] = {}
    lasts = 2 * (pairs + 2) * SLICE_S

    async def send() -> None:
        found["sent"] = await flood(lab, [control, other], rate, lasts)

    # A server of its own: one that has missed the last client's end takes no other.
    words = ["iperf3", "-c", str(lab.server(4)), "-p", str(port), "-t", str(lasts)]
    async with trio.open_nursery() as nursery, lab.iperf_server(port=port):
        nursery.start_soon(send)
        async with lab.host.start(words):
            await trio.sleep(LEAD_S)
            speeds = await lab.host.call(partial(sample, pairs))
    return list(zip(speeds[::2], speeds[1::2], strict=True)), found["sent"]


async def run(pairs: int, rate: int) -> None:
    """Measure and print."""
    async with AsyncExitStack() as stack:
        lab = await stack.enter_async_context(open_lab(tunnel_kind="veth", observe=False))
        program = lab.copy_program("python", "excluded")
        daemon = await stack.enter_async_context(lab.tunsplit(lab.config([program], log={"level": "warning"})))
        await stack.enter_async_context(start_app(lab, program))
        kinds = await forge(lab, await find_port(daemon))
        print(f"| flood of | packets/s | beside the control, Gbit/s | beside it, Gbit/s | ratio (goal {GOAL:.2f}) |")
        for port, (name, other) in enumerate(kinds.items(), addresses.IPERF_PORT):
            speeds, rates = await measure(lab, port, kinds[ELSEWHERE], other, rate, pairs)
            beside = [statistics.median(values) for values in zip(*speeds, strict=True)]
            ratio = statistics.median(flooded / control for control, flooded in speeds if control)
            print(f"| {name} | {rates[1]:,.0f} | {beside[0]:.2f} | {beside[1]:.2f} | {ratio:.2f} |", flush=True)
        print({name: number for name, number in (await daemon.status())["counters"].items() if number})
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")


def main() -> None:
    """Measure and print."""
    trio.run(partial(run, *whole_numbers(12, RATE)))


if __name__ == "__main__":
    main()
