"""Who changes what is ours is noticed, counted and told."""

from collections import Counter

import pytest
import trio

from tests.fakes.judges import as_real
from tunsplit.errors import KernelError
from tunsplit.kernel.nftevents import TableChange
from tunsplit.tasks import upkeep as module
from tunsplit.tasks.upkeep import Upkeep


class Host:
    """A host's configuration: what was distrusted, and what the next looks at sysctls come to."""

    generations = (7,)

    def __init__(self):
        self.distrusted = 0
        self.looks = []

    def distrust_tables(self):
        self.distrusted += 1

    def is_settled(self):
        look = self.looks.pop(0) if self.looks else True
        if isinstance(look, Exception):
            raise look
        return look


class Tables:
    """A subscription: what `coming` holds, an error in its turn."""

    def __init__(self):
        self.coming = []

    def fileno(self):
        return 0

    def read(self):
        changes = self.coming.pop(0)
        if isinstance(changes, Exception):
            raise changes
        return changes


class World:
    def __init__(self):
        self.host, self.tables, self.restores = Host(), Tables(), 0
        self.counters: Counter[str] = Counter()
        self.upkeep = Upkeep(as_real(self.host), as_real(self.tables), self.restore, self.counters)

    def restore(self):
        self.restores += 1


@pytest.fixture
def world(monkeypatch):
    made = World()

    async def wait_readable(_):
        if not made.tables.coming:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    return made


async def test_what_somebody_does_to_our_tables_has_them_put_anew(world, nursery, autojump_clock):
    world.tables.coming = [[], [TableChange(7, "ours")], [TableChange(8, "nft (pid 99)")], [TableChange(None, None)]]
    nursery.start_soon(world.upkeep.watch_tables)
    await trio.sleep(1)

    assert (2, 2) == (world.restores, world.host.distrusted)


async def test_events_that_cannot_be_read_are_no_reason_to_trust(world, nursery, autojump_clock, caplog):
    """L21: nobody tells any more, so the tables are put anew again and again."""
    world.tables.coming = [KernelError("no memory")] * 3
    nursery.start_soon(world.upkeep.watch_tables)
    await trio.sleep(module.RETRY_S * 5)

    assert (3, 3, 3) == (world.restores, world.host.distrusted, world.counters["table_events_failed"])
    assert "nftables' events cannot be read" in caplog.text


async def test_sysctls_are_looked_at_and_restored(world, nursery, autojump_clock, caplog):
    world.host.looks = [True, False, KernelError("sysctl x: I/O error"), KernelError("sysctl x: I/O error"), False]
    nursery.start_soon(world.upkeep.watch_sysctls)
    await trio.sleep(module.LOOK_S * 10)

    assert (2, 2) == (world.restores, world.counters["sysctls_unreadable"])
    assert 1 == len(caplog.records)


async def test_it_is_told_what_was_restored_and_who_it_was(world, nursery, autojump_clock, caplog):
    world.tables.coming = [[TableChange(8, "nft (pid 99)")]]
    nursery.start_soon(world.upkeep.watch_tables)
    await trio.sleep(1)
    world.upkeep.restored([("rules", f"IPv4 rule {number}") for number in range(75, 83)])
    world.upkeep.restored([("tables", "nft tables")])
    await trio.sleep(module.QUIET_S)
    world.upkeep.restored([("tables", "nft tables")])

    assert {"restored_rules": 8, "restored_tables": 2} == world.counters
    first, second = caplog.records
    assert first.what.startswith("IPv4 rule 75, ")
    assert first.what.endswith("IPv4 rule 80, …")
    assert ("nft tables", "nft (pid 99)") == (second.what, second.by)
    assert not hasattr(first, "by")


def test_a_netdev_table_that_cannot_be_had_is_counted_each_time_and_told_once(world, caplog):
    for complaint in (None, "no such hook", "no such hook", None, "no such hook"):
        world.upkeep.egress(complaint)

    assert {"egress_failed": 3} == world.counters
    assert ["no such hook"] * 2 == [record.error for record in caplog.records]
