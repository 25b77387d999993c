"""Who changes sides with another's exec is told of it, whoever heard of that exec first (L1, L5)."""

import sys
from contextlib import asynccontextmanager

import pytest

from tests.netns.family import agent, bear
from tests.netns.stage import RELAY, SERVER, Stage, complaints, until
from tunsplit.lab.daemon import Daemon, make_environment

pytestmark = pytest.mark.netns

# The daemon, whose watch over process events never wakes: as when each event is taken in by a judgement before.
DEAF = """
import trio
from tunsplit.cli import main
from tunsplit.tasks.judge import Judge

async def watch(self):
    await trio.sleep_forever()

Judge.watch = watch
main()
"""
# Talks without end on one connection, and on the next if that ends; until its parent does.
TALK = """
import os, socket, sys, time
parent = os.getppid()
while os.getppid() == parent:
    try:
        with socket.create_connection((sys.argv[1], 7), 3) as own:
            while os.getppid() == parent:
                own.sendall(b"the child's")
                own.recv(4096)
                time.sleep(0.02)
    except OSError:
        time.sleep(0.02)
"""


@pytest.fixture
async def stage(lab):
    """Run tunsplit so."""
    async with deaf(lab) as opened:
        yield opened


@asynccontextmanager
async def deaf(lab):
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    environment = make_environment(*lab.write_config(lab.config(programs[:1])))
    async with lab.host.start([sys.executable, "-c", DEAF, "run"], env=environment) as program:
        await program.wait_written("ready\n")
        daemon = Daemon(lab.host, program, environment)
        yield Stage(lab, daemon, *programs)
        assert 0 == await daemon.terminate()
    assert not complaints(daemon.log), daemon.log


async def test_a_child_follows_when_its_parents_exec_was_heard_by_a_judgement(stage):
    """Its connection in the tunnel ends, though no packet of it is judged, and the next one is beside the tunnel."""
    async with stage.app(stage.included) as app, stage.app(stage.included) as stranger:
        parent = await bear(app, agent(stage.included))
        words = [str(stage.lab.copy_program("python", "child")), "-I", "-S", "-c", TALK, str(SERVER[4])]
        await parent("child = subprocess.Popen(words, stdin=subprocess.DEVNULL)", words=words)

        async def talks(observer):
            await observer.settle()
            return observer.seen("tcp", destination=SERVER[4], payload=b"the child's")

        await until(lambda: talks(stage.lab.tunnel), "the child talks in the tunnel")
        await parent.become(stage.excluded)
        assert str(RELAY[4]) == await stranger("ask('tcp', SERVER4)")  # whose first packet is judged
        await until(lambda: talks(stage.lab.uplink), "the child talks beside the tunnel")
        stage.clear()
        await until(lambda: talks(stage.lab.uplink), "it goes on there")
        assert not await talks(stage.lab.tunnel)
