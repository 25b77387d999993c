"""The guard: a table that nobody but its owner can take away, and that outlives him."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.hosts import own_namespace, run
from tunsplit.errors import KernelError
from tunsplit.kernel import libnftables, nft, nftguard
from tunsplit.kernel.nftguard import TABLE, Guard

pytestmark = pytest.mark.netns

COMMANDS = (
    f"add chain {TABLE} outgoing {{ type filter hook output priority filter + 1; policy drop; }}\n"
    f'add rule {TABLE} outgoing oifname "lo" accept\n'
)
OTHER = COMMANDS.replace('"lo"', '"tunsplit0"')


@pytest.fixture
def guard() -> Iterator[Guard]:
    with own_namespace(), Guard() as guard:
        yield guard


def standing() -> str:
    return run("nft", "list", "ruleset")


def devices() -> list[str]:
    """Those that it lets pass."""
    return [line.split('"')[1] for line in standing().splitlines() if "oifname" in line]


def test_it_outlives_a_flushed_ruleset_and_is_nobody_elses_to_delete(guard):
    guard.apply(COMMANDS)
    run("nft", "add", "table", "inet", "foreign")
    run("nft", "flush", "ruleset")

    assert "foreign" not in standing()
    assert 'oifname "lo" accept' in standing()
    for words in (f"delete table {TABLE}", f"flush chain {TABLE} outgoing", f"add rule {TABLE} outgoing accept"):
        assert 0 != subprocess.run(["nft", *words.split()], capture_output=True, check=False).returncode
    assert 1 == standing().count("accept")


def test_it_outlives_its_owner_and_the_next_one_takes_it_over():
    with own_namespace():
        with Guard() as guard:
            guard.apply(COMMANDS)
        assert guard.persists
        assert 'oifname "lo" accept' in standing()
        run("nft", f"add chain {TABLE} older {{ type filter hook input priority filter; policy drop; }}")
        with Guard() as heir:
            assert [True, False] == [heir.apply(OTHER), heir.apply(OTHER)]
            run("nft", "flush", "ruleset")
            assert (["tunsplit0"], False) == (devices(), "older" in standing())


def delete() -> bool:
    with Guard() as guard:
        return guard.apply("")


@pytest.mark.parametrize("take_away", [delete, nftguard.delete])
def test_what_a_dead_owner_has_left_is_taken_away_and_that_is_said(take_away):
    with own_namespace():
        with Guard() as guard:
            guard.apply(COMMANDS)
        assert [True, False] == [take_away(), take_away()]
        assert "" == standing()


def test_it_goes_with_its_owner_where_the_kernel_knows_no_better(monkeypatch):
    monkeypatch.setattr(nftguard, "NFT_TABLE_F_PERSIST", 0x80)  # which no kernel knows
    with own_namespace():
        with Guard() as guard:
            assert guard.apply(COMMANDS)
            run("nft", "flush", "ruleset")
            assert (["lo"], False) == (devices(), guard.persists)
            assert guard.apply(OTHER)
        assert "" == standing()


def test_what_has_a_living_owner_is_an_error(guard):
    guard.apply(COMMANDS)
    with Guard() as other:
        for attempt in (lambda: other.apply(OTHER), lambda: other.apply(""), nftguard.delete):
            with pytest.raises(KernelError, match=f"table {TABLE}: Operation not permitted"):
                attempt()
    assert ["lo"] == devices()


@pytest.mark.parametrize("number", [0, 2])
def test_a_context_whose_socket_is_not_known_is_an_error(monkeypatch, number):
    with own_namespace(), ExitStack() as stack:
        new = [stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)) for _ in range(number)]
        seen = iter([set(), {(one.fileno(), 0) for one in new}])
        monkeypatch.setattr(libnftables, "_sockets", lambda: next(seen))
        with pytest.raises(KernelError, match=f"has opened {number} sockets of nftables"):
            Guard()


def test_another_text_takes_the_place_of_the_one_before(guard):
    assert [True, False] == [guard.apply(COMMANDS), guard.apply(COMMANDS)]
    assert guard.apply(OTHER)

    assert ["tunsplit0"] == devices()
    assert guard.apply("")
    assert "" == standing()


def test_what_it_looks_like_is_known_before_and_shown_while_it_stands(guard):
    foretold = nftguard.normal_form(COMMANDS)
    assert "" == nftguard.listing()
    guard.apply(COMMANDS)

    assert foretold == nftguard.listing()
    assert "" == nftguard.normal_form("")


def test_what_nft_refuses_is_an_error_and_no_change(guard):
    guard.apply(COMMANDS)
    with pytest.raises(KernelError, match=r"nft: .*syntax error"):
        guard.apply("add chain {\n")
    assert "outgoing" in standing()


def test_without_the_library_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(libnftables, "LIBRARY", "libnowhere.so.1")
    with pytest.raises(KernelError, match=r"libnowhere.so.1: .*; install the package nftables"):
        nft.apply({}, anew=True)
