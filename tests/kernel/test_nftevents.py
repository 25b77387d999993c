"""Who has touched our nft tables: each transaction is told once, and ours are told apart."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.hosts import own_namespace
from tunsplit.errors import KernelError
from tunsplit.kernel import nft, nftevents
from tunsplit.kernel.liveports import LivePorts
from tunsplit.kernel.nftevents import TableChange, TableEvents
from tunsplit.kernel.nftsocket import NftSocket

pytestmark = pytest.mark.netns

BODIES = {
    "inet": "set nat_tcp {\n type inet_service\n flags dynamic\n}\nchain c {\n return\n}\n",
    "arp": "chain c {\n}\n",
}


@pytest.fixture
def live() -> Iterator[LivePorts]:
    with own_namespace():
        nft.apply(BODIES, anew=True)
        with LivePorts() as live:
            yield live


@pytest.fixture
def events(live) -> Iterator[TableEvents]:
    with TableEvents(ignore_port=live.port) as events:
        yield events


def generation() -> int:
    with NftSocket() as socket:
        return socket.generation()


def touch(*words: str) -> TableChange:
    """Run nft; the change that it makes."""
    with subprocess.Popen(["nft", *words]) as program:
        pass
    assert 0 == program.returncode
    return TableChange(generation(), f"nft (pid {program.pid})")


@pytest.mark.parametrize(
    "words",
    [
        ("flush", "ruleset"),
        ("delete", "table", "arp", "tunsplit"),
        ("flush", "chain", "inet", "tunsplit", "c"),
        ("insert", "rule", "inet", "tunsplit", "c", "accept"),
        ("add", "element", "inet", "tunsplit", "nat_tcp", "{ 50000 }"),
        ("add", "chain", "inet", "tunsplit", "foreign"),
    ],
    ids=" ".join,
)
def test_whatever_others_do_to_them_is_told_with_who_it_was(events, words):
    assert [touch(*words)] == events.read()
    assert [] == events.read()


def test_what_they_do_to_other_tables_is_not(events):
    touch("add", "table", "inet", "tunsplit2")
    touch("add", "chain", "inet", "tunsplit2", "tunsplit")

    assert [] == events.read()


def test_our_own_ports_wake_nobody(events, live):
    live.add("nat_tcp", [50000, 50001])
    live.delete("nat_tcp", [50000])

    assert [] == events.read()
    with LivePorts() as other:
        other.add("nat_tcp", [50002])
    (change,) = events.read()
    assert f"(pid {os.getpid()})" in change.by


def test_our_own_ruleset_has_the_generation_that_was_foretold(events):
    before = generation()
    nft.apply(BODIES, anew=False)

    assert [before + 1] == [change.generation for change in events.read()]


def test_events_that_were_lost_may_have_been_of_ours(live, monkeypatch):
    monkeypatch.setattr(nftevents, "BUFFER", 1)  # the kernel makes it a little more
    with TableEvents() as events:
        nft.run("-f", "-", text="".join(f"table inet foreign{number} {{\n}}\n" for number in range(300)))

        assert events.read()


def test_a_socket_that_fails_says_so(live):
    events = TableEvents()
    events.close()
    with pytest.raises(KernelError, match="nftables' events: "):
        events.read()
