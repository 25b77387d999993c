"""A lab leaves nothing behind, however it ends, and touches nobody else's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from tunsplit.lab import leases, netns, open_lab

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parents[2]

# A runner that opens a lab with a long-lived program of its own in it, tells its name, and waits.
RUNNER = """
import trio
from tunsplit.lab import open_lab

async def main():
    async with open_lab() as lab:
        async with lab.host.start(["sleep", "1000"]):
            print(lab.name, lab.directory, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


def traces(name, directory):
    """What there is of a lab."""
    found = [path for path in (directory, leases.LEASES / name) if path.exists()]
    found += netns.DIRECTORY.glob(f"{name}-*")
    return found + [pid for path in netns.DIRECTORY.glob(f"{name}-*") for pid in netns.list_pids(path)]


class Runner:
    """Another process that has a lab open."""

    def __init__(self, runner):
        self.process = subprocess.Popen(
            [sys.executable, "-c", runner],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        name, directory = self.stdout.readline().split()
        self.name, self.directory = name, Path(directory)

    @property
    def stdout(self):
        assert self.process.stdout is not None
        return self.process.stdout

    def end(self, number):
        """End it by a signal; its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.stdout.close()
        return code


@pytest.fixture
def runner():
    running = Runner(RUNNER)
    yield running
    if running.process.poll() is None:
        running.end(signal.SIGTERM)


async def test_nothing_is_left_after_the_block():
    async with open_lab() as lab:
        lab.copy_program("true", "copy")
        assert 4 == sum(isinstance(trace, Path) and trace.parent == netns.DIRECTORY for trace in everything(lab))
        # A process that nobody waits for is ended too.
        await lab.host.run(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"])
        await lab.host.run(["sh", "-c", "trap '' TERM; setsid sleep 1001 >/dev/null 2>&1 &"])

    assert [] == everything(lab)


def everything(lab):
    return traces(lab.name, lab.directory)


async def test_nothing_is_left_after_an_exception_which_comes_out_as_it_is():
    with pytest.raises(ZeroDivisionError):
        async with open_lab() as lab:
            _ = 1 / 0
    assert [] == everything(lab)


async def test_nothing_is_left_after_a_cancellation():
    with trio.CancelScope() as scope:
        async with open_lab() as lab, lab.host.start(["sleep", "1000"]):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert [] == everything(lab)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_after_a_signal_which_then_ends_the_runner(runner, number):
    assert traces(runner.name, runner.directory)

    assert -number == runner.end(number)
    assert [] == traces(runner.name, runner.directory)


async def test_the_next_lab_sweeps_what_a_killed_runner_left(runner):
    runner.end(signal.SIGKILL)
    left = traces(runner.name, runner.directory)
    assert runner.directory in left
    assert any(isinstance(trace, int) for trace in left)  # processes that outlive their runner

    async with open_lab():
        assert [] == traces(runner.name, runner.directory)


def test_a_living_lab_is_not_swept(runner):
    before = traces(runner.name, runner.directory)

    assert runner.name not in leases.sweep()

    assert before == traces(runner.name, runner.directory)


async def test_two_labs_at_once_know_nothing_of_each_other():
    async with open_lab() as one, open_lab() as other:
        assert one.name != other.name
        for lab in (one, other):
            lab.host.ip(f"route add {lab.server(4)} dev wg0")
            assert f"{lab.seen_from_tunnel(4)}\n" == (await lab.host.run(["curl", "-sS", lab.url(4)])).stdout
            await lab.tunnel.settle()
            assert lab.tunnel.seen("tcp", address=lab.server(4))
            lab.tunnel.clear()
        await one.host.run(["curl", "-sS", one.url(4)])
        await one.tunnel.settle()
        await other.tunnel.settle()
        assert [] == other.tunnel.seen(address=other.server(4))


def test_a_lease_of_a_runner_that_died_at_once_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "LEASES", tmp_path)
    (tmp_path / "ts1-1").touch()

    assert ["ts1-1"] == leases.sweep()
    assert [] == list(tmp_path.iterdir())


def test_only_the_namespaces_own_processes_are_ended():
    name = f"ts{os.getpid()}-only"
    netns.create([name])
    inside = subprocess.Popen(netns.Namespace(name).command(["sleep", "1000"]))
    outside = subprocess.Popen(["sleep", "1000"])
    try:
        while [inside.pid] != netns.list_pids(netns.DIRECTORY / name):  # until nsenter has entered
            time.sleep(0.001)
        netns.delete([name])

        assert -signal.SIGKILL == inside.wait(5)
        assert None is outside.poll()
    finally:
        for process in (inside, outside):
            process.kill()
            process.wait()


def test_a_function_called_in_a_namespace_leaves_the_caller_where_it_is():
    name = f"ts{os.getpid()}-call"
    netns.create([name])
    try:
        here = Path("/proc/thread-self/ns/net").readlink()
        there = netns.Namespace(name).call_sync(lambda: Path("/proc/thread-self/ns/net").readlink())
        assert here != there
        assert here == Path("/proc/thread-self/ns/net").readlink()
    finally:
        netns.delete([name])
