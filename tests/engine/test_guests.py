"""Who is a guest, and where guests are."""

from dataclasses import replace
from ipaddress import ip_interface, ip_network

import pytest

from tests.snapshots import HOST, on_link, via
from tunsplit.engine.guests import Guests, find_guests
from tunsplit.host import Action, Address, Link
from tunsplit.names import TABLE_FORWARDED, TABLE_GUESTS

DOCKER = Link(7, "docker0", 1500, kind="bridge")
NEVER = ("eth0", "wg0", "tunsplit0", "tunsplit1")
OWN4, OWN6 = Address(7, ip_interface("172.17.0.1/16")), Address(7, ip_interface("fd17::1/64"))


def found(*links: Link, named: tuple[str, ...] | None = None, addresses: tuple[Address, ...] = ()) -> Guests:
    host = replace(HOST, links=(*HOST.links, *links), addresses=(*HOST.addresses, *addresses))
    return find_guests(host, named=named, never=NEVER, not_theirs=[ip_network("10.128.0.1/32")])


def port(kind: str, name: str = "port", index: int = 8) -> Link:
    return Link(index, name, 1500, kind=kind, master=7)


@pytest.mark.parametrize("kind", ["veth", "tun", "netkit", "dummy"])
def test_a_bridge_of_virtual_ports_is_guests(kind):
    assert ("docker0",) == found(DOCKER).devices
    assert ("docker0",) == found(DOCKER, port(kind), port("veth", "other", 9)).devices


@pytest.mark.parametrize("kind", ["", "vlan", "vxlan", "bond", "wireguard"])
def test_a_bridge_with_neighbours_behind_it_is_no_guests(kind):
    assert () == found(DOCKER, port(kind), port("veth", "other", 9)).devices


def test_behind_a_name_that_no_rule_can_hold_there_are_no_guests():
    """Else one such device would close everybody's way; bridges are told to the firewall for their own frames' sake."""
    for odd in ("br\udcff", 'br"', "br;flush", "br\u2028"):
        assert ("docker0",) == found(DOCKER, Link(9, odd, 1500, kind="bridge")).devices
        assert () == found(Link(9, odd, 1500, kind="bridge"), named=("br*",)).devices


def test_a_side_is_never_guests_nor_is_a_bridge_around_it():
    side = Link(9, "eth0", 1500, kind="veth", master=7)

    assert () == found(replace(DOCKER, name="eth0")).devices
    assert () == found(DOCKER, side).devices
    assert () == found(named=("*",)).devices


def test_without_a_bridge_there_are_none_unless_they_are_named():
    machine = Link(7, "ve-one", 1500, kind="veth")

    assert () == found(machine).devices
    assert () == found(DOCKER, named=()).devices
    assert ("ve-one",) == found(machine, named=("docker0", "ve-*")).devices


def test_guests_are_where_the_bridges_own_addresses_are_and_no_route_is_believed():
    host = found(DOCKER, addresses=(OWN4, OWN6, Address(7, ip_interface("fe80::1/64"), scope=253)))

    assert ["172.17.0.0/16", "fd17::/64"] == [str(route.destination) for route in host.routes()]
    assert {(TABLE_GUESTS, 7)} == {(route.table, route.oif) for route in host.routes()}
    believed = replace(
        HOST, links=(*HOST.links, DOCKER), routes=(on_link("2000::/3", 7), via("172.20.0.0/16", "172.17.0.9", 7))
    )
    assert () == find_guests(believed, named=None, never=NEVER, not_theirs=()).prefixes


@pytest.mark.parametrize("prefix", ["10.0.0.0/8", "10.128.0.0/24", "10.128.0.1/32"])
def test_guests_cannot_be_where_the_tun_is(prefix):
    assert () == found(DOCKER, addresses=(Address(7, ip_interface(prefix)),)).prefixes
    assert ("docker0",) == found(DOCKER, addresses=(Address(7, ip_interface(prefix)),)).devices


def test_from_guests_into_the_tun_from_the_tun_to_guests_and_from_a_side_nowhere():
    rules = list(found(DOCKER).forwarding_rules(4, tun="tunsplit1", sides=("eth0", "wg0")))

    assert [
        ("eth0", Action.BLACKHOLE, 0),
        ("wg0", Action.BLACKHOLE, 0),
        ("docker0", Action.TABLE, TABLE_FORWARDED),
        ("tunsplit1", Action.TABLE, TABLE_GUESTS),
    ] == [(rule.iif, rule.action, rule.table) for rule in rules]


def test_without_guests_nothing_leads_anywhere():
    nobody = found()

    assert [] == [*nobody.routes(), *nobody.near_rules(4)]
    assert [Action.BLACKHOLE] == [rule.action for rule in nobody.forwarding_rules(6, tun="tunsplit1", sides=("eth0",))]
