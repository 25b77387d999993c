"""A task of ours that fails: what hangs on it is closed, and it is begun anew."""

from collections import Counter

import pytest
import trio

from tunsplit.tasks.organs import RETRY_S, Organ


class Failing:
    """A task that fails so and so often."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.begun = 0
        self.closed = []

    async def run(self):
        self.begun += 1
        await trio.lowlevel.checkpoint()
        if self.errors:
            raise self.errors.pop(0)
        await trio.sleep_forever()

    def close(self, why):
        self.closed.append((self.begun, why))


async def test_what_hangs_on_it_is_closed_and_it_is_begun_anew(nursery, autojump_clock, caplog):
    task = Failing(ZeroDivisionError("by zero"), ZeroDivisionError("by zero"), KeyError("x"))
    counters: Counter[str] = Counter()
    nursery.start_soon(Organ("judge", task.run, task.close).keep, counters)
    await trio.sleep(RETRY_S * 10)

    assert (4, 3) == (task.begun, counters["failed_judge"])
    assert (1, "judge failed: ZeroDivisionError: by zero") == task.closed[0]
    assert 2 == len(caplog.records)  # each kind once
    assert all(record.exc_info for record in caplog.records)


async def test_what_cannot_even_be_closed_ends_all(autojump_clock):
    """Then the daemon ends, with the way closed."""

    def close(_):
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 -- this very one
        await Organ("judge", Failing(ZeroDivisionError()).run, close).keep(Counter())


async def test_it_ends_when_it_is_cancelled(autojump_clock):
    task = Failing()
    with trio.move_on_after(1):
        await Organ("pump", task.run, task.close).keep(Counter())

    assert (1, []) == (task.begun, task.closed)
