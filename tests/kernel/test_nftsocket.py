"""Our nftables tables by netlink: what stands there, and elements that move."""

import errno
import re
from ipaddress import ip_address

import pytest

from tests.hosts import run
from tests.kernel.smalltables import BODIES, SETS, WITH_SETS
from tunsplit.kernel import nft
from tunsplit.kernel.nftsocket import Move, NftSocket

pytestmark = pytest.mark.netns


def test_a_fingerprint_is_of_our_chains_and_rules_alone(namespace):
    with NftSocket() as socket:
        assert socket.fingerprint() is None
        nft.apply(BODIES, anew=True)
        before = socket.fingerprint()
        run("nft", "add", "table", "inet", "other")
        run("nft", "add", "chain", "inet", "other", "theirs")
        run("nft", "add", "element", *nft.MAIN.split(), "nat_tcp", "{ 50000 }")
        assert before == socket.fingerprint()
        assert socket.fingerprint("arp") not in (None, before)

        run("nft", "add", "chain", *nft.MAIN.split(), "theirs")
        assert before != (chained := socket.fingerprint())
        run("nft", "add", "rule", *nft.MAIN.split(), "theirs", "accept")
        assert chained != socket.fingerprint()


def held(family: str, name: str) -> set[str]:
    listed = run("nft", "list", "set", family, "tunsplit", name)
    return (
        set(re.findall(r"[\da-f.:]+", listed.split("elements = {")[1].split("}")[0])) if "elements" in listed else set()
    )


def test_elements_move_in_all_sets_at_once_or_in_none(namespace):
    nft.apply(WITH_SETS, anew=True, sets=SETS)
    first, second = ip_address("10.64.0.2"), ip_address("10.64.0.3")
    six = ip_address("fd64::3")
    with NftSocket() as socket:
        before = socket.generation()
        assert not socket.move_elements([Move("arp", "near4", (second,), (first,)), Move("inet", "near6", (six,), ())])
        assert ({str(second)}, {"fd64::2", str(six)}) == (held("arp", "near4"), held("inet", "near6"))
        assert before + 1 == socket.generation()

        wrong = [Move("inet", "near6", (), (six,)), Move("arp", "near4", (), (first,))]
        assert errno.ENOENT == socket.move_elements(wrong)
        assert ({str(second)}, {"fd64::2", str(six)}) == (held("arp", "near4"), held("inet", "near6"))
