"""Our nftables tables in nft's words, and what goes wrong."""

import re
import subprocess
from ipaddress import ip_address

import pytest

from tests.hosts import run
from tests.kernel.smalltables import BODIES, SETS, WITH_SETS, elements
from tunsplit.errors import KernelError
from tunsplit.kernel import nft
from tunsplit.kernel.liveports import LivePorts

pytestmark = pytest.mark.netns


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
    with LivePorts() as live:
        live.add("nat_tcp", range(50000, 50100))  # they are the running NAT's
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


def test_a_body_that_nft_refuses_changes_nothing_and_says_why(namespace):
    nft.apply(BODIES, anew=True)
    before = nft.listing()
    with pytest.raises(KernelError, match=r"nft: .*syntax error"):
        nft.apply({"inet": "chain c {\n nonsense\n}\n"}, anew=True)

    assert before == nft.listing()


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


def held(family: str, name: str) -> set[str]:
    listed = run("nft", "list", "set", family, "tunsplit", name)
    return (
        set(re.findall(r"[\da-f.:]+", listed.split("elements = {")[1].split("}")[0])) if "elements" in listed else set()
    )


def test_sets_hold_what_they_are_said_to_and_nothing_else(namespace):
    nft.apply(WITH_SETS, anew=True, sets=SETS)
    assert ({"10.64.0.2"}, {"fd64::2"}) == (held("arp", "near4"), held("inet", "near6"))

    nft.apply(WITH_SETS, anew=False, sets={"arp": {"near4": ()}, "inet": {"near6": (ip_address("fd64::3"),)}})
    assert (set(), {"fd64::3"}) == (held("arp", "near4"), held("inet", "near6"))
    assert "fd64::3" in (nft.listing() or "")
