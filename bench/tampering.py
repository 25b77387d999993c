"""If somebody takes away or changes what is ours on the host, how long until it is back, and what leaks meanwhile?

Beside the traffic of `bench.persist`: each way to tamper several times in a row. Prints the time from the end of the
tampering, as its script says, to the last change that brought the host to look as before, and the leaks. Who looks does
so all the time, from a thread that asks the kernel; on a busy machine he comes late himself.
Needs root: python -m bench.tampering [ROUNDS]
"""

import statistics
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

import trio

from bench.arguments import whole_numbers
from bench.persist import Watch, excluded_program, open_watch
from tunsplit.kernel import nft, sysctl
from tunsplit.kernel.nftsocket import NftSocket
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.lab import Lab, open_lab
from tunsplit.lab.daemon import Daemon
from tunsplit.names import PRIORITY_MARKED, PRIORITY_UNREACHABLE

REST_S = 0.02
LOOK_S = 0.001
PATIENCE_S = 20.0
SWITCHES = ("rp_filter", "src_valid_mark", "arp_ignore", "arp_announce")
PORTS = "net/ipv4/ip_local_reserved_ports"
OURS = " ".join(map(str, range(PRIORITY_MARKED, PRIORITY_UNREACHABLE + 1)))

# For a shell on the host. Unless it says otherwise, each is what a careless script or another daemon may well do.
TAMPERINGS = {
    "all of nftables flushed": "nft flush ruleset",
    "our tables deleted": "for family in netdev arp inet; do nft delete table $family tunsplit; done",
    "the firewall's chain flushed": "nft flush chain inet tunsplit outgoing",
    "the firewall let through": "nft insert rule inet tunsplit outgoing accept",
    "the live ports forgotten": "nft flush set inet tunsplit nat_tcp",
    "our rules deleted": f"""
        for priority in {OURS}; do for family in -4 -6; do
            while ip $family rule delete priority $priority 2>/dev/null; do :; done
        done; done""",
    "one rule deleted": "ip -4 rule delete priority 81; ip -6 rule delete priority 81",
    "our tables of routes flushed": """
        for table in 7500 7501 7502 7504 7505; do for family in -4 -6; do
            ip $family route flush table $table 2>/dev/null
        done; done""",
    "a route into the tun replaced": "ip route replace default dev eth0 metric 1 table 7500",
    "the tun's addresses flushed": "ip address flush dev tunsplit0",
    "sysctls of others": """
        cd /proc/sys/net/ipv4; echo 1 >conf/tunsplit0/rp_filter; echo 0 >conf/eth0/arp_ignore
        echo 0 >conf/eth0/src_valid_mark; echo 0 >conf/wg0/src_valid_mark; echo >ip_local_reserved_ports""",
    "everything at once": f"""
        nft flush ruleset
        for priority in {OURS}; do for family in -4 -6; do
            while ip $family rule delete priority $priority 2>/dev/null; do :; done
        done; done""",
}


class Tampering:
    """A lab with tunsplit running in it, and apps that persist."""

    def __init__(self, lab: Lab, watch: Watch, daemon: Daemon) -> None:
        self.lab = lab
        self.watch = watch
        self.daemon = daemon

    async def tamper(self, script: str) -> float:
        """Have it done; seconds until the host looks as before.

        Raises:
            TimeoutError: it never does.
        """
        host, over = self.lab.host, threading.Event()
        before = await host.call(lambda: (look(), listed()))
        changed = 0.0

        async def watch() -> None:
            nonlocal changed
            changed = await host.call(partial(watch_change, *before, over))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            ended = await host.run(["sh", "-c", f"{script}\ndate +%s%N"], check=False)
            over.set()
        await self.watch.look()
        return max(0.0, changed - int(ended.stdout.split()[-1]) / 1e9)


def look() -> object:
    """What the host has of routes, rules, addresses and sysctls, in the namespace of the calling thread."""
    with Rtnetlink() as rtnetlink:
        now = rtnetlink.snapshot()
    switches = [sysctl.read(f"net/ipv4/conf/{link.name}/{name}") for link in now.links for name in SWITCHES]
    found = frozenset(now.routes), frozenset(now.rules), frozenset(now.addresses)
    return [(link.name, link.up, link.mtu) for link in now.links], found, switches, sysctl.read(PORTS)


def listed() -> str:
    """What our tables hold, without counters, and without live ports, which come and go."""
    return "".join(nft.listing(family) or "" for family in nft.ALL_FAMILIES)


def watch_change(looks: object, tables: str, over: threading.Event) -> float:
    """Watch the host until all is `over` and it looks so; when it last changed, in seconds since the epoch.

    Raises:
        TimeoutError: it never does.
    """
    changed, last, give_up = 0.0, object(), float("inf")
    with NftSocket() as socket:
        while True:
            now = look(), [socket.fingerprint(family) for family in nft.ALL_FAMILIES]
            if now != last:
                changed, last = time.time(), now
            elif over.is_set() and now[0] == looks and listed() == tables:
                return changed
            if over.is_set():
                give_up = min(give_up, time.time() + PATIENCE_S)
            if time.time() > give_up:
                raise TimeoutError("the host is not as it was")
            time.sleep(LOOK_S)


@asynccontextmanager
async def open_tampering(rest_s: float = REST_S) -> AsyncGenerator[Tampering]:
    """Build all of it."""
    async with (
        open_lab() as lab,
        open_watch(lab, rest_s) as watch,
        lab.tunsplit(excluded=[excluded_program(lab)]) as daemon,
    ):
        await watch.close()
        yield Tampering(lab, watch, daemon)
        await watch.reopen()


async def run(rounds: int) -> None:
    """Tamper, and print."""
    async with open_tampering() as tampering:
        watch = tampering.watch
        for name, script in TAMPERINGS.items():
            before = len(watch.leaks)
            took = [await tampering.tamper(script) for _ in range(rounds)]
            median, longest = statistics.median(took), max(took)
            print(f"{name:32} {median * 1000:5.0f} ms, longest {longest * 1000:5.0f} ms", end="")
            print(f", {len(watch.leaks) - before} leaks", flush=True)
    print(*watch.words(), sep="\n")


def main() -> None:
    """Measure and print."""
    trio.run(partial(run, *whole_numbers(10)))


if __name__ == "__main__":
    main()
