"""The netdev table of one process: put in force by itself, put anew, taken away; and what it does to frames."""

import errno
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.hosts import batch, own_namespace, run
from tunsplit.host import EgressTable
from tunsplit.kernel import nft, nftegress
from tunsplit.kernel.nft import Nftables
from tunsplit.kernel.nftegress import Egress
from tunsplit.kernel.nftsocket import NftSocket
from tunsplit.names import FRAME_PRIORITY

pytestmark = pytest.mark.netns

BODY = """counter rejected {{
}}
chain leaving {{
type filter hook egress devices = {{ {} }} priority filter; policy accept;
meta priority 7500:0 accept
meta rtclassid >= 0 accept
meta skuid >= 0 goto unrouted
}}
chain {} {{
counter name rejected drop
}}
"""


def table(*devices: str, chain: str = "unrouted") -> EgressTable:
    body = BODY.format(", ".join(devices), chain)
    return EgressTable(body, body, devices)


ONE, TWO, NONE = table("eth0"), table("eth0", "eth1"), EgressTable()
WRONG = EgressTable("no such words\n", "no such words either\n", ("eth0",))


def make(name: str) -> None:
    """A device, with a neighbour."""
    batch(f"link add {name} type veth peer name of-{name}\nlink set {name} up\nlink set of-{name} up")


@pytest.fixture
def egress() -> Iterator[Egress]:
    with own_namespace(), Nftables() as nftables:
        for name in ("eth0", "eth1"):
            make(name)
        yield Egress(nftables)


def sent(device: str, priority: int = 0) -> int:
    """What a packet socket hears of its frame: 0, or an errno."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
        own.bind((device, 0))
        try:
            own.send(bytes(12) + b"\x08\x00" + bytes(46))
        except OSError as error:
            return error.errno or 0
    return 0


def counted() -> str:
    return run("nft", "list", "counter", *nftegress.TABLE.split(), "rejected").split("packets ")[1].split()[0]


def test_a_packet_sockets_frame_is_refused_and_ours_is_not(egress):
    assert 0 == sent("eth0")
    assert egress.apply(ONE)
    assert not egress.apply(ONE)
    assert [errno.ENOBUFS, 0, 0] == [sent("eth0"), sent("eth0", FRAME_PRIORITY), sent("eth1")]


def test_counters_go_on_when_devices_come_and_go(egress):
    egress.apply(ONE)
    sent("eth0")
    assert egress.apply(TWO)
    assert [errno.ENOBUFS, errno.ENOBUFS] == [sent("eth0"), sent("eth1")]
    assert "3" == counted()
    assert egress.apply(ONE)
    assert 0 == sent("eth1")
    assert "3" == counted()


def test_a_device_that_is_made_anew_is_closed_again(egress):
    egress.apply(TWO)
    batch("link delete eth0")
    egress.apply(table("eth1"))
    make("eth0")
    assert 0 == sent("eth0")

    assert egress.apply(TWO)
    assert [errno.ENOBUFS, errno.ENOBUFS] == [sent("eth0"), sent("eth1")]


def test_what_fails_says_why_leaves_what_stands_and_is_tried_again(egress):
    egress.apply(ONE)
    for _ in range(2):
        assert not egress.apply(WRONG)
        assert "syntax error" in (egress.complaint or "")
        assert egress.generation is None
        assert errno.ENOBUFS == sent("eth0")
    assert egress.apply(ONE)
    assert egress.complaint is None


def test_where_a_device_that_is_to_come_is_refused_those_that_are_there_are_closed(egress):
    to_come = replace(ONE, body="no such words\n")

    assert [True, False] == [egress.apply(to_come), egress.apply(to_come)]
    assert egress.complaint is None
    assert [errno.ENOBUFS, 0] == [sent("eth0"), sent("eth1")]
    assert egress.apply(TWO)
    assert egress.apply(replace(NONE, body="no such words\n"))
    assert nft.listing("netdev") is None


def test_what_others_take_away_or_change_comes_back(egress):
    egress.apply(ONE)
    for words in ("flush ruleset", f"add rule {nftegress.TABLE} unrouted accept"):
        run("nft", words)
        assert egress.apply(ONE)
        assert errno.ENOBUFS == sent("eth0")
    assert not egress.apply(ONE)
    egress.distrust()
    assert egress.apply(ONE)


def test_the_leftovers_of_another_release_are_replaced(egress):
    older = table("eth0", chain="older")
    egress.apply(replace(older, body=older.body.replace("goto unrouted", "goto older")))
    heir = Egress(None)

    assert heir.apply(ONE)
    assert "older" not in (nft.listing("netdev") or "")
    assert errno.ENOBUFS == sent("eth0")


def test_no_table_is_wanted_and_none_stands(egress):
    assert not egress.apply(NONE)
    egress.apply(ONE)
    assert egress.apply(NONE)
    assert nft.listing("netdev") is None
    assert not egress.apply(NONE)
    egress.apply(ONE)
    assert [nftegress.TABLE] == nft.delete()


def test_what_somebody_does_at_the_very_moment_is_not_taken_for_ours(egress, monkeypatch):
    real = nftegress._commands  # noqa: SLF001 - the words, between which somebody is at work

    def disturbed(*arguments):
        run("nft", "add", "table", "inet", "foreign")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(nftegress, "_commands", disturbed)
        assert egress.apply(ONE)
    assert egress.generation is None
    assert egress.apply(ONE)
    with NftSocket() as socket:
        assert socket.generation() == egress.generation


def test_its_normal_form_is_found_elsewhere_and_a_refused_one_has_none(egress):
    normal = nftegress.normal_form(TWO)
    assert nft.listing("netdev") is None
    egress.apply(TWO)

    assert normal == nft.listing("netdev")
    assert "" == nftegress.normal_form(WRONG)
