"""The kernel's features, tried for real, and what is said where one is not there."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel import features, nftguard
from tunsplit.kernel.features import Probe, probe

REPOSITORY = Path(__file__).parent.parent.parent


def works() -> None:
    return


def raises(error: Exception) -> Probe:
    def attempt() -> None:
        raise error

    return Probe("x", True, "do this", attempt)


def found(monkeypatch, *probes: Probe) -> list[features.Feature]:
    monkeypatch.setattr(features, "PROBES", (Probe("first", False, "", works), *probes))
    return probe()[1:]


@pytest.mark.netns
def test_a_kernel_that_runs_the_other_tests_has_all_that_is_required():
    assert [] == [feature for feature in probe() if feature.required and feature.complaint]


@pytest.mark.netns
def test_features_are_tried_in_a_network_of_their_own(monkeypatch):
    here = Path("/proc/self/ns/net").stat().st_ino

    def elsewhere() -> None:
        raise OSError(0, str(Path("/proc/self/ns/net").stat().st_ino))

    (feature,) = found(monkeypatch, Probe("x", True, "", elsewhere))

    assert feature.complaint is not None
    assert here not in (0, int(feature.complaint))
    assert here == Path("/proc/self/ns/net").stat().st_ino


@pytest.mark.netns
@pytest.mark.parametrize(
    ("error", "complaint", "denied"),
    [
        (OSError(errno.EOPNOTSUPP, "Operation not supported"), "Operation not supported", False),
        (KernelError("no such thing"), "no such thing", False),
        (PermissionError(errno.EPERM, "not you"), "[Errno 1] not you", True),
        (PermissionMissing("not you"), "not you", True),
        (TimeoutError("timed out"), "timed out", False),
    ],
)
def test_what_the_kernel_said_is_kept(monkeypatch, error, complaint, denied):
    (feature,) = found(monkeypatch, raises(error))

    assert (complaint, denied) == (feature.complaint, feature.denied)


@pytest.mark.netns
def test_one_missing_feature_hides_no_other(monkeypatch):
    complaints = [
        feature.complaint for feature in found(monkeypatch, raises(KernelError("no")), Probe("y", True, "", works))
    ]

    assert ["no", None] == complaints


@pytest.mark.netns
def test_a_probe_that_kills_its_process_is_reported_as_such(monkeypatch):
    with pytest.raises(KernelError, match=r"could not be tried .*: the probing process ended with status 9"):
        found(monkeypatch, Probe("x", True, "", lambda: os.kill(os.getpid(), signal.SIGKILL)))


@pytest.mark.netns
def test_a_network_namespace_that_cannot_be_had_is_named(monkeypatch):
    def refuse() -> None:
        raise OSError(errno.ENOSPC, "unshare: No space left on device")

    monkeypatch.setattr(features, "_enter_own_network", refuse)

    with pytest.raises(KernelError, match=r"could not be tried in a network namespace of their own: .*No space left"):
        found(monkeypatch, Probe("x", True, "", works))


@pytest.mark.netns
def test_a_kernel_without_a_kind_of_expression_is_noticed(monkeypatch):
    monkeypatch.setattr(features, "RULESET", "table inet t {\n chain c {\n no such expression\n }\n}\n")
    (nftables,) = (feature for feature in probe() if feature.name.startswith("nftables"))

    assert nftables.complaint
    assert nftables.required


@pytest.mark.netns
def test_a_missing_nft_is_noticed(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    (nftables,) = (feature for feature in probe() if feature.name.startswith("nftables"))

    assert "the program nft is missing" == nftables.complaint


@pytest.mark.netns
def test_an_unknown_offload_is_noticed(monkeypatch):
    device = Probe("x", False, "", features.offload(0x8000))

    assert "Invalid argument" == found(monkeypatch, device)[0].complaint


def test_the_initial_network_is_found_by_kthreadd_where_init_is_closed(monkeypatch):
    opened = []

    def open_or_refuse(path: str, _: int) -> int:
        opened.append(path)
        if path == "/proc/1/ns/net":
            raise PermissionError(errno.EACCES, "closed")
        return 99

    monkeypatch.setattr(os, "open", open_or_refuse)
    monkeypatch.setattr(Path, "read_text", lambda _: "kthreadd\n")

    assert 99 == features.initial_network()
    assert ["/proc/1/ns/net", "/proc/2/ns/net"] == opened


def test_a_container_has_no_kthreadd(monkeypatch):
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "closed")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "read_text", lambda _: "bash\n")

    with pytest.raises(PermissionError):
        features.initial_network()


UNPRIVILEGED = """
import ctypes, os
from tunsplit.errors import KernelError
from tunsplit.kernel import features, nftguard
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: as a process is that was never root
try:
    found = features.probe()
except KernelError as error:
    print(error)
else:
    print([feature.name for feature in found if feature.required and feature.complaint and not feature.denied])
"""


@pytest.mark.netns
def test_without_root_a_user_namespace_is_tried():
    tried = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout

    assert "[]\n" == tried or "could not be tried in a network namespace of their own" in tried


@pytest.mark.netns
def test_a_kernel_whose_tables_go_with_their_owner_lacks_nothing_required(monkeypatch):
    monkeypatch.setattr(nftguard, "NFT_TABLE_F_PERSIST", 0x80)  # which no kernel knows
    assert {"tables that outlive their owner": (False, "Operation not supported")} == {
        feature.name: (feature.required, feature.complaint)
        for feature in probe()
        if "owner" in feature.name and feature.complaint
    }
