"""The attacker's table: what was tried in this run, what comes of it without tunsplit, and with it.

A test names the attacks that it carries out by marks, `@pytest.mark.attack(name, without, against)`; both outcomes are
what it asserts. The marks travel with the report, so a worker's tests are in the table too.
"""

import itertools
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import pytest

PROPERTY = "attack"
HEADS = ("attack", "without tunsplit", "with tunsplit")
WIDTHS = (42, 36, 36)
FAILED = "FAILED, see above"


class Row(NamedTuple):
    """One attack, and whether every test that carried it out has passed."""

    name: str
    without: str
    against: str
    passed: bool = True


def note_marks(item: pytest.Item) -> None:
    """Put a test's attacks into its report."""
    for mark in reversed(list(item.iter_markers(PROPERTY))):  # it begins with the nearest, the last
        name, without, against = mark.args
        item.user_properties.append((PROPERTY, [name, without, against]))


def rows_of(reports: Iterable[pytest.TestReport]) -> list[Row]:
    """The attacks of a run, in the order of their tests' names; one that several tests carry out is one row."""
    rows: dict[str, Row] = {}
    for report in sorted(reports, key=lambda one: one.nodeid):
        for name, told in report.user_properties:
            if name == PROPERTY and isinstance(told, list | tuple):
                row = Row(*told)
                passed = report.passed and rows.get(row.name, row).passed
                rows[row.name] = row._replace(passed=passed)
    return list(rows.values())


def table(rows: Iterable[Row]) -> list[str]:
    """The rows as lines, cells wrapped."""
    lines = [_line(HEADS), _line(tuple("─" * width for width in WIDTHS))]
    for row in rows:
        cells = (row.name, row.without, row.against if row.passed else FAILED)
        wrapped = [textwrap.wrap(cell, width) for cell, width in zip(cells, WIDTHS, strict=True)]
        lines += [_line(cells) for cells in itertools.zip_longest(*wrapped, fillvalue="")]
    return lines


def _line(cells: tuple[str, ...]) -> str:
    return " │ ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()
