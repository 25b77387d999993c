"""What the guard relies on from nftables: one assertion each (net/netfilter/nf_tables_api.c)."""

import errno
import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.hosts import own_namespace, run
from tunsplit.kernel.netlink import NLM_F_CREATE
from tunsplit.kernel.nftguard import TABLE, claim_of
from tunsplit.kernel.nftsocket import NFT_MSG_NEWTABLE, NftSocket

pytestmark = pytest.mark.netns

OWNER, PERSIST = 0x2, 0x4


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with own_namespace():
        run("ip", "link", "set", "lo", "up")
        yield


def claim(owner: NftSocket, flags: int) -> int:
    """Make or take the table with these flags; 0, or the errno."""
    return owner.change([(NFT_MSG_NEWTABLE, NLM_F_CREATE, claim_of(flags))])


def orphan() -> None:
    """Leave the table without an owner, and closed."""
    with NftSocket() as first:
        assert 0 == claim(first, OWNER | PERSIST)
    run("nft", f"add chain {TABLE} outgoing {{ type filter hook output priority 0; policy drop; }}")


def stands() -> bool:
    return TABLE in run("nft", "list", "tables")


def leaves() -> bool:
    """Whether a datagram leaves."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        try:
            own.sendto(b"?", ("127.0.0.1", 9))
        except PermissionError:
            return False
    return True


def refused(words: str) -> bool:
    return 0 != subprocess.run(["nft", *words.split()], capture_output=True, check=False).returncode


def test_a_flushed_ruleset_and_a_foreign_delete_leave_an_owned_table_alone():
    with NftSocket() as owner:
        claim(owner, OWNER)
        run("nft", "flush", "ruleset")
        assert refused(f"delete table {TABLE}")
        assert stands()


def test_an_owned_table_goes_with_its_owner_unless_it_is_to_persist():
    for flags, outlives in ((OWNER, False), (OWNER | PERSIST, True)):
        with NftSocket() as owner:
            assert 0 == claim(owner, flags)
        assert outlives is stands()


def test_an_orphans_rules_stay_in_force():
    assert leaves()
    orphan()
    assert not leaves()


@pytest.mark.parametrize("words", ["flush ruleset", f"delete table {TABLE}"])
def test_an_orphan_is_everybodys(words):
    """So it is no more than any other table against who flushes the ruleset once its owner has died."""
    orphan()
    assert not refused(words)
    assert leaves()


def test_an_orphan_is_adopted_with_what_it_holds_and_is_its_owners_again():
    orphan()
    with NftSocket() as heir:
        assert 0 == claim(heir, OWNER | PERSIST)
        run("nft", "flush", "ruleset")
        assert not leaves()


def test_who_adopts_names_both_flags_and_no_one_adopts_what_has_an_owner():
    orphan()
    with NftSocket() as heir, NftSocket() as other:
        assert errno.EOPNOTSUPP == claim(heir, OWNER)
        assert 0 == claim(heir, OWNER | PERSIST)
        assert errno.EPERM == claim(other, OWNER | PERSIST)


@pytest.mark.parametrize("flags", [0, OWNER, PERSIST])
def test_its_owner_may_claim_it_again_and_take_neither_flag_away(flags):
    """A block `table … { }` of nft is a claim with the flags that nft knows of, and that are written there."""
    with NftSocket() as owner:
        assert [0, 0] == [claim(owner, OWNER | PERSIST) for _ in range(2)]
        assert errno.EOPNOTSUPP == claim(owner, flags)
