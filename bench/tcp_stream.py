"""How fast is one TCP stream of an excluded app, beside the kernel's direct path in the same run?

Prints Gbit/s and the ratio for IPv4 and IPv6, up and down; the median of the rounds' ratios decides. The nearest peer
shows beside them. Needs root, iperf3, and for the peer a package index: python -m bench.tcp_stream [ROUNDS] [SECONDS]
"""

import statistics
from contextlib import ExitStack

from bench.arguments import whole_numbers
from bench.link import Link, iperf, open_link, serve_iperf
from bench.peer import install_peer, run_peer

GOAL = 0.40
WAYS = [(version, direction) for version in (4, 6) for direction in ("up", "down")]


def measure(link: Link, client: str, version: int, direction: str, seconds: int) -> float:
    """Gbit/s of one stream, as received."""
    end = iperf(link, client, version, "-t", str(seconds), *(["-R"] if direction == "down" else []))
    return float(end["sum_received"]["bits_per_second"]) / 1e9


def main() -> None:
    """Measure and print."""
    rounds, seconds = whole_numbers(3, 3)
    ratios: dict[tuple[int, str], list[float]] = {way: [] for way in WAYS}
    with open_link() as link, ExitStack() as stack:
        client = link.copy("iperf3")
        serve_iperf(link, stack)
        peer = install_peer(link)
        for _ in range(rounds):
            direct = {way: measure(link, client, *way, seconds) for way in WAYS}
            with link.tunsplit():
                through = {way: measure(link, client, *way, seconds) for way in WAYS}
            theirs: dict[tuple[int, str], float] = {}
            if peer is not None:
                with run_peer(link, peer, client):
                    theirs = {way: measure(link, client, *way, seconds) for way in WAYS}
            for way in WAYS:
                ratios[way].append(through[way] / direct[way])
                version, direction = way
                print(
                    f"IPv{version} {direction:4}  direct {direct[way]:5.1f}  tunsplit {through[way]:5.1f} Gbit/s  "
                    f"ratio {ratios[way][-1]:.2f}" + (f"  mihomo {theirs[way]:5.1f}" if theirs else ""),
                    flush=True,
                )
    for (version, direction), values in ratios.items():
        print(f"IPv{version} {direction:4}  median ratio {statistics.median(values):.2f} (goal {GOAL:.2f})")


if __name__ == "__main__":
    main()
