"""The live ports in our nftables table, and what goes wrong with them."""

from collections.abc import Iterator

import pytest

from tests.hosts import run
from tests.kernel.smalltables import BODIES, elements
from tunsplit.errors import KernelError
from tunsplit.kernel import nft
from tunsplit.kernel.liveports import LivePorts, TableMissing

pytestmark = pytest.mark.netns


@pytest.fixture
def live(namespace) -> Iterator[LivePorts]:
    nft.apply(BODIES, anew=True)
    with LivePorts() as live:
        yield live


def test_ports_are_added_and_deleted(live):
    live.add("nat_tcp", [50000, 50001, 65535])
    live.add("nat_tcp", [50001, 49152])
    assert [49152, 50000, 50001, 65535] == elements()

    live.delete("nat_tcp", [50001, 65535])
    assert [49152, 50000] == elements()
    live.add("nat_tcp", [])
    live.delete("nat_tcp", [])
    assert [49152, 50000] == elements()


def test_a_port_that_is_not_there_does_not_stop_the_others_from_going(live):
    live.add("nat_tcp", [50000, 50002])
    live.delete("nat_tcp", [50000, 50001, 50002])

    assert [] == elements()


def test_the_whole_range_fits(live):
    live.add("nat_tcp", range(49152, 65536))
    assert 16384 == len(elements())

    live.delete("nat_tcp", range(49152, 65536))
    assert [] == elements()


def test_a_table_that_someone_flushed_is_told_apart(live):
    live.add("nat_tcp", [50000])
    run("nft", "flush", "ruleset")

    with pytest.raises(TableMissing):
        live.add("nat_tcp", [50001])
    with pytest.raises(TableMissing):
        live.delete("nat_tcp", [50000])


def test_a_set_that_is_of_another_kind_is_an_error(namespace):
    nft.apply({"inet": "set nat_tcp {\n type ipv4_addr\n}\n"}, anew=True)
    with LivePorts() as live, pytest.raises(KernelError, match="set nat_tcp"):
        live.add("nat_tcp", [50000])
