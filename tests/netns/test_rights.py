"""The daemon as a service: what it may still do once it runs, and that its manager hears of it."""

import socket
import sys
from collections import Counter
from pathlib import Path

import trio

from tests.netns.stage import PATIENCE_S, Stage
from tunsplit.lab import Lab

# NET_ADMIN, NET_RAW, SYS_PTRACE, DAC_READ_SEARCH, NET_BIND_SERVICE; and SYS_ADMIN, since the lab's host is not in the
# initial network namespace, so that the way back to process events leads through that.
KEPT = 1 << 12 | 1 << 13 | 1 << 19 | 1 << 2 | 1 << 10 | 1 << 21


def rights(pid: int) -> set[tuple[int, ...]]:
    """What each thread of a process may do: permitted, effective, ambient; whether it can get more."""
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        words = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines())
        sets = (int(words[name], 16) for name in ("CapPrm", "CapEff", "CapAmb"))
        found.add((*sets, int(words["NoNewPrivs"])))
    return found


async def test_every_thread_keeps_what_is_needed_and_nothing_else(stage: Stage) -> None:
    assert {(KEPT, KEPT, 0, 1)} == rights(stage.daemon.pid)
    async with stage.app(stage.included) as app:  # who has given up nothing
        assert (KEPT, KEPT, 0, 1) not in rights(app.pid)


async def test_a_service_manager_hears_that_it_is_ready_and_runs(lab: Lab, tmp_path: Path) -> None:
    file, address = tmp_path / "tunsplit.toml", tmp_path / "notify"
    file.write_text(lab.config())
    told = [f"NOTIFY_SOCKET={address}", "WATCHDOG_USEC=200000"]
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        await manager.bind(str(address))
        command = ["env", *told, sys.executable, "-m", "tunsplit", "run", "-c", str(file)]
        async with lab.host.start(command):
            with trio.fail_after(PATIENCE_S):
                heard = [await manager.recv(100) for _ in range(4)]

    assert {b"READY=1": 1, b"WATCHDOG=1": 3} == Counter(heard)
