"""The process tree on disk."""

import os
import time

import pytest

from tunsplit.tasks.treefile import GAP_S, KEPT_S, sweep


@pytest.fixture
def directory(tmp_path):
    since_boot, of_day = time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
    for name, touched in {
        "processes-1.json": since_boot,
        "processes-2.json": since_boot - KEPT_S + GAP_S,
        "processes-3.json": since_boot - KEPT_S - GAP_S,
        "processes-4.new": of_day,
        "processes-5.json": of_day - KEPT_S - GAP_S,
        "tunsplit.sock": since_boot - KEPT_S - GAP_S,
    }.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (touched, touched))
    return tmp_path


def test_trees_that_nobody_has_kept_for_days_are_forgotten(directory):
    sweep(directory)

    left = ["processes-1.json", "processes-2.json", "processes-4.new", "tunsplit.sock"]
    assert left == sorted(file.name for file in directory.iterdir())


def test_what_cannot_be_removed_stays_and_is_told(directory, caplog):
    (directory / "processes-3.json").unlink()
    (directory / "processes-3.json").mkdir()
    os.utime(directory / "processes-3.json", (1, -KEPT_S))
    sweep(directory)

    assert (directory / "processes-3.json").is_dir()
    assert ["an old process tree cannot be removed"] == caplog.messages


def test_where_nothing_was_ever_kept_there_is_nothing_to_forget(tmp_path):
    sweep(tmp_path / "absent")
