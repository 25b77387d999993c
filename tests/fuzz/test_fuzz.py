"""Whatever bytes come from outside, they are read, or refused in one way; nothing is raised, nothing gets stuck.

Each target is bent by Hypothesis, which finds the shortest input, and all of them by libFuzzer, which finds branches.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.guided import SEEDS
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent.parent
SECONDS = 8  # of the guided search
PATIENCE_S = 240  # for it to begin and to end, beside other work
EXAMPLES = 100

named = pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)


@st.composite
def bent(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid input before some bytes of it were changed, taken out or put in; or any bytes at all."""
    data = bytearray(draw(st.one_of(st.sampled_from(seeds), st.binary(max_size=200))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@named
def test_any_bytes_are_read_or_refused(target: Target):
    seeds = target.seeds()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=bent(seeds))
    def feed(data: bytes) -> None:
        target.run(data)

    feed()
    for seed in seeds:
        target.run(seed)


def readers() -> set[str]:
    """Every function of bytes from outside, by its name and its module's."""
    found = set()
    for path in (ROOT / "tunsplit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_untrusted"):
                found.add(f"{path.relative_to(ROOT)}: {node.name}")
    return found


# It hands on to the resolver's, and would need a socket of the kernel's.
HANDED_ON = {"tunsplit/tasks/upstream.py: _take_untrusted"}


def test_every_reader_of_bytes_from_outside_is_a_fuzzer_s_target():
    reached = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name.endswith("_untrusted"):
            reached.add(f"{Path(code.co_filename).relative_to(ROOT)}: {code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        for target in TARGETS.values():
            for seed in target.some_seeds(SEEDS):
                target.run(seed)
    finally:
        sys.setprofile(before)

    assert set() == readers() - reached - HANDED_ON


def search(*words: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a search in a process of its own: libFuzzer ends it."""
    # Coverage is measured by the tests; here it would only be in the way of the search's own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *words],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_a_guided_search_finds_nothing(tmp_path):
    done = search("-m", "tests.fuzz.guided", "--seconds", str(SECONDS), directory=tmp_path)

    assert 0 == done.returncode, done.stdout[-2000:] + done.stderr[-4000:]
    assert [] == list(tmp_path.iterdir())


PLANTED = """
from tests.fuzz import guided

def run(data):
    if b"?" in data:
        raise KeyError("planted")

guided.fuzz(run, [b"valid"], 100, 1)
"""


def test_it_would_find_a_planted_mistake_and_keep_its_input(tmp_path):
    """The control."""
    done = search("-c", PLANTED, directory=tmp_path)

    assert done.returncode
    assert "KeyError: 'planted'" in done.stdout + done.stderr
    (kept,) = tmp_path.glob("crash-*")
    assert b"?" in kept.read_bytes()
