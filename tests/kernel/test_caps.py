"""Which capabilities are there, and what is said about those that are not."""

import ctypes
import re
import subprocess
import sys

import pytest

from tunsplit.errors import KernelError
from tunsplit.kernel import caps

ALL = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\nCapBnd:\t0000000000000000\n"


def test_the_effective_set_counts():
    assert frozenset(caps.NEEDED) == caps.effective(ALL)
    assert frozenset() == caps.effective(ALL.replace("000001ffffffffff", "0000000000000000"))


@pytest.mark.parametrize("capability", caps.NEEDED, ids=lambda capability: capability.name)
def test_each_bit_is_its_own(capability):
    mask = f"{1 << capability.bit:016x}"

    assert {capability} == caps.effective(ALL.replace("000001ffffffffff", mask))


def test_what_is_missing_can_be_granted_by_the_line_that_is_shown(monkeypatch):
    monkeypatch.setattr(caps, "effective", lambda: frozenset(caps.NEEDED[1:]))

    assert [caps.NEEDED[0]] == caps.missing()
    assert "run as root, or let systemd grant it: AmbientCapabilities=CAP_NET_ADMIN" == caps.how_to_grant(
        caps.missing()
    )


def test_what_is_not_needed_yet_is_not_missing(monkeypatch):
    monkeypatch.setattr(caps, "effective", lambda: frozenset(needed for needed in caps.NEEDED if needed.required))

    assert [] == caps.missing()


@pytest.mark.netns
def test_the_kernels_own_names_agree():
    for capability in caps.NEEDED:
        name = capability.name.removeprefix("CAP_").lower()
        shown = subprocess.run(
            ["setpriv", f"--bounding-set=-{name}", f"--inh-caps=-{name}", "cat", "/proc/self/status"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert capability not in caps.effective(shown)


GIVE_UP = """
import subprocess
from pathlib import Path
from tunsplit.kernel import caps
caps.keep_only([caps.named("CAP_NET_ADMIN"), caps.named("CAP_NET_RAW")])
print(Path("/proc/self/status").read_text())
print(subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.netns
def test_what_is_given_up_is_gone_for_good():
    shown = subprocess.run([sys.executable, "-c", GIVE_UP], capture_output=True, text=True, check=True).stdout

    assert ["0000000000003000"] * 4 == re.findall(r"^Cap(?:Eff|Prm):\s*(\S+)$", shown, re.MULTILINE)
    assert ["1"] * 2 == re.findall(r"^NoNewPrivs:\s*(\S+)$", shown, re.MULTILINE)


def test_a_kernel_that_refuses_is_believed(monkeypatch):
    class Libc:
        def prctl(self, *_: int) -> int:
            ctypes.set_errno(22)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc())
    with pytest.raises(KernelError, match="cannot be given up: Invalid argument"):
        caps.keep_only([])
