"""The netdev table's text: for which devices it is, and what of packet sockets it lets pass."""

from dataclasses import replace

import pytest

from tests.engine.test_ruleset import TYPICAL
from tests.hosts import own_namespace
from tunsplit.engine.egress import COUNTERS, egress
from tunsplit.errors import KernelError
from tunsplit.host import EgressTable, Link
from tunsplit.kernel import nft, nftegress
from tunsplit.kernel.nftegress import Egress
from tunsplit.kernel.tun import Tun

ETH, WLAN, WG = Link(2, "eth0", 1500), Link(3, "wlan0", 1500), Link(4, "wg0", 1420, is_layer2=False)
MAC = bytes.fromhex("525400000001")
GUEST = Link(5, "macvtap0", 1500, kind="macvtap", mac=MAC, below=2)


def chain(name: str, table: EgressTable) -> list[str]:
    body = table.body.split(f"chain {name} {{\n", 1)[1].split("}\n", 1)[0]
    return body.replace("\t", "").splitlines()


def test_it_is_for_the_sides_and_for_those_alone_that_are_there():
    two = replace(TYPICAL, uplinks=("eth0", "wlan0", "eth0"))
    table = egress(two, [WG, WLAN, Link(9, "docker0", 1500, kind="bridge")])

    assert ("wlan0", "wg0") == table.devices
    assert 'devices = { "eth0", "wlan0", "wg0" }' in chain("leaving", table)[0]
    assert table.body.replace('"eth0", ', "") == table.body_now
    assert "" == egress(two, []).body_now


def test_without_the_firewall_there_is_none():
    assert EgressTable() == egress(replace(TYPICAL, firewall=False), [ETH, WG])


def test_our_own_are_known_by_priority_and_owner_then_what_has_a_route_then_what_has_no_owner():
    assert [
        "meta priority 7500:0 meta skuid 99 accept",
        "meta rtclassid >= 0 accept",
        "meta skuid >= 0 goto unrouted",
    ] == chain("leaving", egress(replace(TYPICAL, uid=99), [ETH]))[1:]


def test_of_packet_sockets_all_is_counted_and_what_nobody_thought_of_is_dropped():
    rules = chain("unrouted", egress(TYPICAL, [ETH, GUEST]))

    assert all(" accept" in rule for rule in rules[:-1])
    assert "counter name rejected drop" == rules[-1]
    assert set(COUNTERS) == {rule.split("counter name ")[1].split()[0] for rule in rules}


@pytest.mark.parametrize(
    "other", [{"below": 7}, {"below": 0}, {"kind": "macvlan"}, {"mac": None}], ids=["elsewhere", "loose", "kind", "mac"]
)
def test_a_virtual_machine_with_a_device_of_its_own_on_the_wire_is_known_by_its_address(other):
    assert (
        "ether saddr { 52:54:00:00:00:01 } counter name accepted_guests accept"
        == chain("unrouted", egress(TYPICAL, [ETH, GUEST]))[0]
    )
    assert "saddr" not in egress(TYPICAL, [ETH, replace(GUEST, **other)]).body


def test_a_name_that_nft_cannot_hold_is_an_error_and_no_rule():
    with pytest.raises(KernelError, match="rename the device"):
        egress(replace(TYPICAL, uplinks=('a"b',)), [Link(2, 'a"b', 1500)])


@pytest.mark.netns
def test_nft_takes_it_and_shows_it_as_its_normal_form():
    odd = replace(TYPICAL, uplinks=("br-lan.7@x", "a+b#c"), tunnel="tun=0")
    names = (*odd.uplinks, odd.tunnel)
    table = egress(odd, [*(Link(number, name, 1500) for number, name in enumerate(names, 2)), GUEST])
    normal = nftegress.normal_form(table)
    with own_namespace(), Tun(names[0]), Tun(names[1]), Tun(names[2]):
        kept = Egress(None)
        assert kept.apply(table)
        assert kept.complaint is None
        assert normal == nft.listing("netdev")
        assert "ether saddr 52:54:00:00:00:01" in normal
