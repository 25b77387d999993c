"""What holds around every test: root where it is needed, and nothing left behind.

A test may open descriptors, start processes and build namespaces; when it is over, they are gone, and the network
namespace that the tests were started in is as it was.
"""

import gc
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import attacktable

pytest_plugins = ["tunsplit.lab.fixtures", "tests.fixtures"]

# No test is judged by its time: another worker may have the processor.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

NAMESPACES = Path("/run/netns")

# Lifetimes count down by themselves.
LIFETIMES = re.compile(r"(valid_lft|preferred_lft|expires) \S+ ?")


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line("markers", "attack(name, without, against): a row of the attacker's table")


def pytest_runtest_setup(item: pytest.Item) -> None:
    attacktable.note_marks(item)
    if item.get_closest_marker("netns") and os.geteuid() != 0:
        pytest.fail("builds network namespaces, which only root may: sudo scripts/test", pytrace=False)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Number packets and messages: some carry an identifier by chance, and each worker has to find the same tests."""
    return argname if isinstance(val, bytes) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have to tell, their property `summary`, and the attacks; workers' come as well."""
    reports = [report for group in ("passed", "failed") for report in terminalreporter.stats.get(group, ())]
    if rows := attacktable.rows_of(report for report in reports if hasattr(report, "user_properties")):
        terminalreporter.section("The attacker's table")
        terminalreporter.write_line("\n".join(attacktable.table(rows)))
    for report in reports:
        for name, text in getattr(report, "user_properties", ()):
            if name == "summary" and report.when == "call":
                title, _, lines = text.partition("\n")
                terminalreporter.section(title)
                terminalreporter.write_line(lines)


def descriptors() -> dict[str, str]:
    """Return this process's open descriptors, and what each is."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            found[path.name] = str(path.readlink())
        except FileNotFoundError:  # the listing's own
            continue
    return found


def children() -> dict[str, str]:
    """Return the processes that this one started and that have not been waited for."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            for pid in (task / "children").read_text().split():
                found[pid] = Path("/proc", pid, "stat").read_text().split(")")[0]
        except (FileNotFoundError, ProcessLookupError):  # the thread or the process has just ended
            continue
    return found


def namespaces() -> dict[str, str]:
    """Return the network namespaces that bear this process's name, `ts` and its pid, as all of a test's do."""
    mine = re.compile(rf"ts{os.getpid()}(?!\d)")
    return {path.name: path.name for path in NAMESPACES.glob("ts*") if mine.match(path.name)}


def host_state() -> dict[str, list[str]]:
    """Return what the network namespace of the tests looks like, as lines."""
    objects = "link show\naddress show\nroute show table all\nrule show\n"
    commands = (["ip", "-4", "-batch", "-"], ["ip", "-6", "-batch", "-"], ["nft", "--stateless", "list", "ruleset"])
    state = {}
    for command in commands:
        shown = subprocess.run(command, input=objects, capture_output=True, text=True, check=True).stdout
        state[" ".join(command)] = LIFETIMES.sub("", shown).splitlines()
    return state


def left(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [what for key, what in after.items() if before.get(key) != what]


@pytest.fixture(scope="session", autouse=True)
def untouched_host() -> Iterator[None]:
    """The tests' own network namespace is the same after the last test as before the first."""
    if os.geteuid() != 0:  # nothing that could change it runs
        yield
        return
    before = host_state()
    yield
    assert before == host_state()
    assert {} == namespaces()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Descriptors, processes and namespaces of a test end with it, and it leaves the host alone."""
    netns = request.node.get_closest_marker("netns") is not None
    host = host_state() if netns else None
    before = descriptors(), children(), namespaces()
    yield
    after = descriptors(), children(), namespaces()
    if before != after:
        gc.collect()  # what a kept traceback holds is not left behind
        after = descriptors(), children(), namespaces()
    assert [[], [], []] == [left(*pair) for pair in zip(before, after, strict=True)]
    assert host is None or host == host_state()
