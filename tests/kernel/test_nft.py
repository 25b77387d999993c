"""Our nftables tables, the live ports in them, and what goes wrong."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.hosts import own_namespace, run
from tunsplit.errors import KernelError
from tunsplit.kernel import nft
from tunsplit.kernel.nft import LivePorts, TableMissing

pytestmark = pytest.mark.netns

SET = "set nat_tcp {\n type inet_service\n flags dynamic\n}\n"
BODIES = {
    "inet": SET + 'counter seen {\n}\nchain c {\n return comment "a b"\n}\n',
    "arp": "chain c {\n}\n",
}


@pytest.fixture
def namespace() -> Iterator[None]:
    with own_namespace():
        yield


@pytest.fixture
def live(namespace) -> Iterator[LivePorts]:
    nft.apply(BODIES, anew=True)
    with LivePorts() as live:
        yield live


def elements() -> list[int]:
    listed = run("nft", "list", "set", *nft.MAIN.split(), "nat_tcp")
    if "elements" not in listed:
        return []
    inside = listed.split("elements = {")[1].split("}")[0]
    return sorted(int(port) for port in inside.split(","))


def test_tables_come_and_go(namespace):
    assert nft.listing() is None
    nft.apply(BODIES, anew=True)
    listed = nft.listing()

    assert listed is not None
    assert ["a b"] == nft.comments(listed)
    assert ["inet tunsplit", "arp tunsplit"] == nft.delete()
    assert [] == nft.delete()


def test_the_normal_form_is_found_elsewhere(namespace):
    found = nft.normal_form(BODIES)
    assert nft.listing() is None

    nft.apply(BODIES, anew=True)
    assert found == {family: nft.listing(family) for family in BODIES}


def test_what_nft_refuses_has_no_normal_form(namespace):
    with pytest.raises(KernelError, match="syntax error"):
        nft.normal_form({"inet": "nonsense\n"})


def test_a_table_that_is_not_ours_stays(namespace):
    run("nft", "add", "table", "inet", "other")
    nft.apply(BODIES, anew=True)
    nft.delete()

    assert "table inet other" in run("nft", "list", "ruleset")


def test_elements_come_with_the_table_and_outlive_its_rules(namespace):
    nft.apply(BODIES, anew=True, elements={"nat_tcp": [50000, 50001], "none": []})
    nft.apply(BODIES, anew=False, elements={"nat_tcp": [50002]})
    assert [50000, 50001, 50002] == elements()

    nft.apply(BODIES, anew=True)
    assert [] == elements()


def test_a_body_that_nft_refuses_changes_nothing_and_says_why(live):
    before = nft.listing()
    with pytest.raises(KernelError, match=r"nft -f -: .*syntax error"):
        nft.apply({"inet": "chain c {\n nonsense\n}\n"}, anew=True)

    assert before == nft.listing()


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


def test_without_the_program_it_is_said_which_package_has_it(namespace, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(KernelError, match="install the package nftables"):
        nft.run("list", "ruleset")


def test_a_program_that_hangs_is_given_up(namespace, monkeypatch):
    def hang(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nft", 30)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(KernelError, match=r"nft: .*timed out"):
        nft.run("list", "ruleset")
