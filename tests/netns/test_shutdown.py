"""Whenever it is told to stop, it ends with 0 and without a word, and leaves nothing but the host as it was."""

import random
import re
import signal
from pathlib import Path

import pytest
import trio

from tests.netns.stage import start_app
from tests.netns.test_life import look_at
from tests.netns.test_stop import PERSIST, has_tried
from tunsplit.lab import Lab
from tunsplit.lab.daemon import COMMAND, make_environment

pytestmark = pytest.mark.netns

STATE = Path("/run/tunsplit")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SO_NETNS_COOKIE = 71
ASK = """
import threading

def ask_names():
    while not stopping:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.connect((SERVER4, 53))
            own.send(bytes.fromhex('abcd01000001000000000000') + b'\\3www\\7example\\3com\\0\\0\\1\\0\\1')
            own.recv(512)
        time.sleep(0.02)
asker = threading.Thread(target=ask_names, daemon=True)
asker.start()
"""


def left_in_run(cookie: int) -> set[str]:
    """What this network namespace has in /run, but for the process tree, which survives on purpose."""
    return {file.name for file in STATE.glob(f"*{cookie}*")} - {f"processes-{cookie}.json"}


def words(log: str) -> list[str]:
    """What it says beyond what it tells whoever wants to know: warnings, errors, and whatever is no line of a log."""
    return [line for line in log.splitlines() if line and not re.match(r"\S+Z (info|debug) ", line)]


@pytest.fixture
def warned(monkeypatch):
    """Have Python tell of what is never awaited or closed; apps hear of it too, and have nothing to tell."""
    monkeypatch.setenv("PYTHONWARNINGS", "always::RuntimeWarning,always::ResourceWarning")


async def test_it_ends_without_a_word_whenever_it_is_stopped(lab, warned):
    """Both apps try all that an app can, names too; a client of the control socket is there, who does not listen."""
    before = await look_at(lab.host)
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    config = lab.config(programs[:1])
    chance = random.Random(1)
    async with start_app(lab.host, programs[0]) as one, start_app(lab.host, programs[1]) as other:
        cookie = int.from_bytes(await one(f"socket.socket().getsockopt(1, {SO_NETNS_COOKIE}, 8)"), "little")
        for number in SIGNALS:
            async with lab.tunsplit(config) as daemon:
                for app in (one, other):
                    await app(PERSIST)
                    await app(ASK)
                await one("client = socket.socket(socket.AF_UNIX); client.connect(path)", path=str(control(lab)))
                await one('client.send(b\'{"verb": "flows"}\\n\' * 50)')
                await has_tried(chance.choice((one, other)))
                await trio.sleep(chance.uniform(0, 0.2))
                daemon._program.process.send_signal(number)  # noqa: SLF001  # whichever it is
                assert 0 == await daemon.wait()
                for app in (one, other):
                    await app("stopping = True; thread.join(); asker.join(); socket.setdefaulttimeout(3)")
            assert [] == words(daemon.log)
            assert set() == left_in_run(cookie)
            assert not control(lab).exists()
    assert before == await look_at(lab.host)


async def test_it_may_be_stopped_before_it_is_ready(lab, warned):
    """At any step of its start; the first signals may find no Python that could heed them."""
    before = await look_at(lab.host)
    file, socket = lab.write_config(lab.config())
    chance, codes = random.Random(2), []
    for _ in range(3):
        command = [*COMMAND, "run", "-c", file]
        async with lab.host.start(command, env=make_environment(file, socket)) as program:
            await trio.sleep(chance.uniform(0.05, 1.0))
            program.process.terminate()
            codes.append(await program.process.wait())
        assert codes[-1] in (0, -signal.SIGTERM), program.log
        assert [] == words(program.log)
        assert not socket.exists()
        assert before == await look_at(lab.host)


def control(lab: Lab) -> Path:
    return lab.directory / "tunsplit.sock"
