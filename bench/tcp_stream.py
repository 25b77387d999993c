"""How fast is one TCP stream of an excluded app, beside the kernel's direct path in the same run?

Prints Gbit/s and the ratio for IPv4 and IPv6, up and down; the median of the rounds' ratios decides.
Needs root and iperf3: python -m bench.tcp_stream [ROUNDS] [SECONDS]
"""

import json
import statistics
import subprocess
import sys
import time

from bench.link import SERVER, Link, open_link

GOAL = 0.40
WAYS = [(version, direction) for version in (4, 6) for direction in ("up", "down")]


def measure(link: Link, client: str, version: int, direction: str, seconds: int) -> float:
    """Gbit/s of one stream."""
    argv = [client, "-c", SERVER[version], "-t", str(seconds), "-J", *(["-R"] if direction == "down" else [])]
    for _ in range(10):
        done = subprocess.run(link.host.command(argv), capture_output=True, text=True, check=False)
        answer = json.loads(done.stdout)
        if "error" not in answer:
            return float(answer["end"]["sum_received"]["bits_per_second"]) / 1e9
        time.sleep(0.2)  # the server is still busy with the last test
    sys.exit(f"iperf3: {answer['error']}")


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    ratios: dict[tuple[int, str], list[float]] = {way: [] for way in WAYS}
    with open_link() as link:
        client = link.copy("iperf3")
        with link.background(link.net, ["iperf3", "-s"], stdout=subprocess.DEVNULL):
            time.sleep(0.5)
            for _ in range(rounds):
                direct = {way: measure(link, client, *way, seconds) for way in WAYS}
                with link.tunsplit():
                    through = {way: measure(link, client, *way, seconds) for way in WAYS}
                for way in WAYS:
                    ratios[way].append(through[way] / direct[way])
                    version, direction = way
                    print(
                        f"IPv{version} {direction:4}  direct {direct[way]:5.1f}  tunsplit {through[way]:5.1f} Gbit/s  "
                        f"ratio {ratios[way][-1]:.2f}",
                        flush=True,
                    )
    for (version, direction), values in ratios.items():
        print(f"IPv{version} {direction:4}  median ratio {statistics.median(values):.2f} (goal {GOAL:.2f})")


if __name__ == "__main__":
    main()
