"""Whatever is done to tunsplit and its network, in whatever order, nothing leaks and nothing gets stuck (L16, L34).

`python -m bench.monkey` does it for as long as one likes.
"""

import pytest

from bench.ledger import Epoch, Ledger
from bench.monkey import play
from bench.traffic import traffic
from tests.netns.stage import HOST, HOST_TUNNEL, SERVER, until

pytestmark = pytest.mark.netns

SECONDS = 25
SEED = 7


async def test_a_monkey_finds_no_leak(record_property):
    """Random operations under traffic of four apps; what it did and saw is told at the end of the test run."""
    monkey = await play(SECONDS, SEED)

    record_property("summary", "\n".join((f"A monkey's {SECONDS} seconds, seed {SEED}", *monkey.words())))
    assert not monkey.failed, "\n".join(monkey.words())
    assert monkey.jungle.ledger.watched["uplink"]
    assert monkey.jungle.ledger.watched["tunnel"]


async def test_its_ledger_would_see_a_leak(lab, tmp_path):
    """The control: without tunsplit an app is beside the tunnel, by its addresses and by what it says."""
    sources = {"uplink": frozenset(HOST.values()), "tunnel": frozenset(HOST_TUNNEL.values())}
    targets = list(SERVER.values())
    ledger = Ledger(lab, tmp_path / "epoch", {"ape": targets}, Epoch({"ape": "tunnel"}, sources))
    program = lab.copy_program("python", "ape")
    async with lab.host.start(traffic(program, "ape", 5, targets, epochs=tmp_path / "epoch")):

        async def is_seen():
            await ledger.look()
            said = ("ape of epoch 0 in the uplink", "ape in the uplink")
            return all(any(words in leak for leak in ledger.leaks) for words in said)

        assert await until(is_seen, "it is seen, by both")
    ledger.close()
