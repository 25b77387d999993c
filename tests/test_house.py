"""What keeps the house in order and no linter looks at."""

import ast
import os
import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {
    ".ci", ".git", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "LICENSE",
    "README.md", "bench", "config", "pyproject.toml", "scripts", "tests", "tunsplit",
}  # fmt: skip
LONGEST_MODULE = 400  # lines; what outgrows it is split
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|\bplaceholder\b")
UNTESTED = re.compile(r"pytest\.(skip|xfail|importorskip)|mark\.(skip|skipif|xfail)|unittest\.skip")
SILENCED = re.compile(r"# (noqa|type: ignore|pragma)(?P<rest>.*)")


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_top_level_holds_what_everybody_expects_there():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    found = {path.name for path in ROOT.iterdir() if not any(fnmatch(path.name, pattern) for pattern in ignored)}

    assert set() == found - TOP_LEVEL
    assert set() == TOP_LEVEL - found - {".git"}  # a tarball has none


@pytest.mark.parametrize("path", files("tunsplit", "bench"), ids=name)
def test_a_module_says_its_one_idea(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", files("tunsplit"), ids=name)
def test_a_module_can_be_read_in_one_go(path):
    assert LONGEST_MODULE >= len(path.read_text().splitlines())


@pytest.mark.parametrize("path", files("tunsplit", "tests", "bench"), ids=name)
def test_nothing_is_left_for_later_skipped_or_silenced_without_a_reason(path):
    if path == Path(__file__):
        return
    lines = list(enumerate(path.read_text().splitlines(), 1))

    assert [] == [line for line in lines if UNFINISHED.search(line[1])]
    assert [] == [line for line in lines if UNTESTED.search(line[1])]
    assert [] == [line for line in lines if (found := SILENCED.search(line[1])) and not has_reason(found["rest"])]


def has_reason(rest: str) -> bool:
    """A silencing comment names its rules, and after them why."""
    reason = re.sub(r"^(: ?[A-Z0-9, ]+(?![a-z])|\[[a-z, -]+\]|: no \w+)", "", rest)
    return reason != rest and len(re.findall(r"\w+", reason)) > 1


def imported(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"tunsplit"}


def declared(project: dict[str, Any], extra: str | None = None) -> set[str]:
    """The modules of a list of dependencies; a distribution of another name is translated."""
    wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {re.split(r"[\[<>=]", line)[0].removeprefix("python-").replace("-", "_") for line in wanted}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lab = set[str]().union(*map(imported, files("tunsplit/lab")))
    daemon = set[str]().union(*map(imported, set(files("tunsplit")) - set(files("tunsplit/lab"))))

    assert declared(project) == (daemon | lab) - declared(project, "lab")
    assert set() == daemon & declared(project, "lab")


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/demo", "scripts/test", "scripts/check", ".ci/run"])
def test_a_script_says_what_it_is_for_and_stops_at_the_first_failure(script):
    lines = (ROOT / script).read_text().splitlines()

    assert os.access(ROOT / script, os.X_OK)
    assert lines[1].startswith("# ")
    assert "set -euo pipefail" in lines


def test_the_readme_shows_the_two_commands_at_once():
    start = "\n".join((ROOT / "README.md").read_text().splitlines()[:12])

    assert "sudo scripts/demo" in start
    assert "sudo scripts/test" in start


@pytest.mark.parametrize("document", ["README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_a_document_points_at_exists(document):
    text = (ROOT / document).read_text()
    paths = re.findall(r"(?:^|[\s(`])((?:tunsplit|tests|bench|config|scripts|\.ci)/[\w./-]*\w/?)", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]

    assert [] == [path for path in [*paths, *links] if not (ROOT / path).exists()]
