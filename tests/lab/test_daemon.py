"""tunsplit in the lab, from outside: started, asked, ended, killed."""

import os
import signal
from dataclasses import replace

import pytest

from tunsplit.errors import KernelError
from tunsplit.lab import demo
from tunsplit.lab.trials import get_exit_code

pytestmark = pytest.mark.netns


async def test_a_running_tunsplit_can_be_asked(lab):
    curl = lab.copy_program("curl", "excluded-curl")
    async with lab.tunsplit(excluded=[curl]) as daemon:
        assert "ready\n" == daemon.output
        assert "wg0" == (await daemon.status())["tunnel"]["interface"]
        await lab.host.run([curl, "-sS", lab.url(4)])
        (flow,) = [flow for flow in await daemon.flows() if flow["protocol"] == "tcp"]

    assert (str(curl), "uplink") == (flow["app"]["exe"], flow["verdict"])


async def test_its_process_is_tunsplits_own(lab):
    async with lab.tunsplit() as daemon:
        os.kill(daemon.pid, signal.SIGTERM)
        assert 0 == await daemon.wait()


async def test_a_killed_one_is_cleared_away_at_the_end_of_the_block(lab):
    async def table():
        return (await lab.host.run(["nft", "list", "tables"])).stdout

    async with lab.tunsplit() as daemon:
        await daemon.kill()
        assert "tunsplit" in await table()
    assert "" == await table()


async def test_one_that_cannot_start_says_why(lab):
    with pytest.raises(KernelError, match=r"(?s)exit code 2 before it wrote 'ready.*nonsense"):
        async with lab.tunsplit(lab.config(tunnel={"nonsense": 1})):
            pass


async def test_one_that_dies_by_itself_is_noticed(lab):
    async def kill_it():
        async with lab.tunsplit() as daemon:
            os.kill(daemon.pid, signal.SIGKILL)
            await daemon.wait()

    with pytest.raises(KernelError, match="ended with exit code -9"):
        await kill_it()


async def test_a_failure_beside_it_comes_with_its_log(lab):
    with pytest.raises(ZeroDivisionError) as failure:
        async with lab.tunsplit():
            _ = 1 / 0
    assert any(note.startswith("tunsplit's log:") for note in failure.value.__notes__)


# The demo's own negative control: without tunsplit, nothing is as it expects.


async def test_the_demo_sees_that_an_app_took_the_wrong_side(lab):
    program = lab.copy_program("python", "included-client")
    async with lab.observe(lab.internet, "eth0") as internet:
        trials = demo.plan(lab, program, excluded=False)
        outcomes = [await demo.try_out(lab, internet, program, trial) for trial in trials]

        assert [False] * 6 == [outcome.ok for outcome in outcomes]
        assert 1 == get_exit_code(outcomes)
        # It is the side that was wrong, and nothing else.
        trials = demo.plan(lab, program, excluded=True)
        assert [True] * 6 == [replace(outcome, trial=trial).ok for outcome, trial in zip(outcomes, trials, strict=True)]
