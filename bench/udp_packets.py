"""How many UDP datagrams of 64 bytes a second does an excluded app get through, beside the direct path in the same run?

Counts what the server received. Prints packets a second and the ratio for IPv4 and IPv6, and the nearest peer beside
them. Needs root, iperf3, and for the peer a package index: python -m bench.udp_packets [ROUNDS] [SECONDS]
"""

import statistics
from contextlib import ExitStack

from bench.arguments import whole_numbers
from bench.link import Link, iperf, open_link, serve_iperf
from bench.peer import install_peer, run_peer

GOAL = 0.17
SIZE = 64  # bytes of payload


def measure(link: Link, client: str, version: int, seconds: int) -> float:
    """Datagrams a second that arrived."""
    end = iperf(link, client, version, "-u", "-b", "0", "-l", str(SIZE), "-t", str(seconds))
    got = end["sum"]["packets"] - end["sum"]["lost_packets"]
    return float(got / end["sum"]["seconds"])


def main() -> None:
    """Measure and print."""
    rounds, seconds = whole_numbers(3, 3)
    ratios: dict[int, list[float]] = {4: [], 6: []}
    with open_link() as link, ExitStack() as stack:
        client = link.copy("iperf3")
        serve_iperf(link, stack)
        peer = install_peer(link)
        for _ in range(rounds):
            direct = {version: measure(link, client, version, seconds) for version in ratios}
            with link.tunsplit():
                through = {version: measure(link, client, version, seconds) for version in ratios}
            theirs: dict[int, float] = {}
            if peer is not None:
                with run_peer(link, peer, client):
                    theirs = {version: measure(link, client, version, seconds) for version in ratios}
            for version, values in ratios.items():
                values.append(through[version] / direct[version])
                print(
                    f"IPv{version}  direct {direct[version]:9,.0f}  tunsplit {through[version]:9,.0f} packets/s  "
                    f"ratio {values[-1]:.2f}" + (f"  mihomo {theirs[version]:9,.0f}" if theirs else ""),
                    flush=True,
                )
    for version, values in ratios.items():
        print(f"IPv{version}  median ratio {statistics.median(values):.2f} (goal {GOAL:.2f})")


if __name__ == "__main__":
    main()
