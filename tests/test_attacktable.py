"""The attacker's table, and that what DESIGN.md's threat model names as proof is there."""

import re
from pathlib import Path

import pytest

from tests.attacktable import FAILED, PROPERTY, Row, rows_of, table

ROOT = Path(__file__).parent.parent
SPOOF, FLOOD = ("spoof", "believed", "dropped"), ("flood", "all is lost", "nothing is")


def report(name, *attacks, passed=True):
    properties = [(PROPERTY, list(attack)) for attack in attacks] + [("summary", "something else")]
    return pytest.TestReport(
        name, ("", 0, ""), {}, "passed" if passed else "failed", None, "call", user_properties=properties
    )


def test_an_attack_is_one_row_whichever_tests_carry_it_out():
    assert [Row(*FLOOD), Row(*SPOOF)] == rows_of([report("b", SPOOF), report("a", FLOOD), report("c", SPOOF)])


@pytest.mark.parametrize("failed", ["a", "b"])
def test_one_test_that_fails_is_enough(failed):
    (row,) = rows_of(report(name, SPOOF, passed=name != failed) for name in ("a", "b"))

    assert not row.passed
    assert FAILED in table([row])[-1]
    assert "dropped" not in "".join(table([row]))


def test_long_cells_are_wrapped():
    lines = table([Row("an attack with a name that is too long for its column", "a", "b")])

    assert 2 + 2 == len(lines)
    assert all(len(line) <= 120 for line in lines)


def test_the_threat_model_names_tests_that_are_there():
    design = (ROOT / "DESIGN.md").read_text()
    model = design.partition("## Threat model\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"\btest_\w+", model))

    assert len(named) > 10
    assert set() == {name for name in named if not (ROOT / "tests" / "netns" / f"{name}.py").exists()}
    for row in re.findall(r"^\|(.*)\|$", model.partition("\n\n| who | can, still")[0], re.MULTILINE)[2:]:
        assert "test_" in row.split("|")[-1], row
