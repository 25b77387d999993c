"""Which resolvers are the host's own, and on which network each may be asked."""

from ipaddress import ip_address, ip_network

import pytest

from tunsplit.engine.systemdns import Memory, Place, Surroundings, choose, is_usable, without_scope
from tunsplit.host import Link, NamedServers

ETH0, WLAN0 = Link(2, "eth0", 1500), Link(3, "wlan0", 1500)
WG0 = Link(7, "wg0", 1420)
LAN, PUBLIC, VPN, V6 = map(ip_address, ("192.168.50.53", "9.9.9.9", "10.64.0.1", "2620:fe::9"))
AROUND = Surroundings(
    (ETH0,), WG0, "wg0", (VPN,), (ip_network("10.64.0.0/24"), ip_network("fd64::/64")),
    frozenset({ip_address("192.168.50.2")}),
)  # fmt: skip
ROUTER, OTHER_ROUTER = ip_address("192.168.50.1"), ip_address("192.168.7.1")
HOME = Place("eth0", ROUTER, b"\1" * 6)


def named(source, *addresses, **more):
    return NamedServers(source, tuple(map(ip_address, addresses)), **more)


def addresses(*named, around=AROUND):
    return [str(address) for address, _ in choose(named, around)]


def test_the_first_source_that_names_any_is_believed_alone():
    chosen = choose([named("resolv.conf", "192.168.50.53", "2620:fe::9"), named("lease", "9.9.9.9")], AROUND)
    assert ((LAN, "resolv.conf"), (V6, "resolv.conf")) == chosen
    assert () == choose([], AROUND)


def test_behind_a_stub_the_next_source_looks():
    assert ["192.168.50.53"] == addresses(
        named("resolv.conf", "127.0.0.53"), named("lease", "192.168.50.53", link="eth0")
    )


@pytest.mark.parametrize(
    "address", ["127.0.0.53", "::1", "0.0.0.0", "224.0.0.251", "192.168.50.2", "10.64.0.1", "10.64.0.99", "fd64::1"]
)
def test_neither_this_host_nor_the_vpn_s_resolver_is_one(address):
    assert not is_usable(ip_address(address), AROUND)
    assert [] == addresses(named("resolv.conf", address))


def test_what_any_source_names_for_the_tunnel_s_link_is_the_vpn_s():
    """The client has written a public resolver into resolv.conf, and told resolvconf for which link."""
    merged = named("resolv.conf", "9.9.9.9", "192.168.50.53")
    for vpn in ({"link": "wg0"}, {"link": 7}, {"link": "ppp0", "is_vpn": True}):
        assert ["192.168.50.53"] == addresses(merged, named("resolvconf", "9.9.9.9", **vpn))
    gone = Surroundings((ETH0,), None, "wg0")
    assert ["192.168.50.53"] == addresses(merged, named("resolvconf", "9.9.9.9", link="wg0"), around=gone)


def test_of_links_only_the_uplink_s_count_and_what_is_named_for_it_is_not_the_vpn_s():
    assert ["9.9.9.9"] == addresses(
        named("resolved", "9.9.9.9", link=2), named("resolved", "9.9.9.9", link=7), named("resolved", "1.1.1.1", link=9)
    )


def test_a_list_is_bounded():
    assert 8 == len(addresses(named("resolv.conf", *[f"9.9.9.{number}" for number in range(20)])))


def test_a_link_local_one_counts_on_the_uplink():
    scoped = [ip_address("fe80::1%eth0"), ip_address("fe80::2%wg0"), LAN]
    assert (ip_address("fe80::1"), LAN) == without_scope(scoped, {"eth0"})


def learn(memory, places, stamp=1, address=LAN):
    return memory.place([(address, "lease")], lambda _: stamp, places)


def test_a_private_resolver_is_asked_where_it_was_learned_and_nowhere_else():
    memory = Memory()
    found = learn(memory, {4: HOME, 6: None})
    assert (LAN,) == found.addresses == found.valid_on({4: HOME})
    for other in (Place("wlan0", ROUTER, HOME.mac), Place("eth0", OTHER_ROUTER, HOME.mac),
                  Place("eth0", ROUTER, b"\2" * 6), Place("eth0", ROUTER), Place("eth0"), None):  # fmt: skip
        assert () == found.valid_on({4: other})
        assert () == learn(memory, {4: other}).valid_on({4: other})
    assert (LAN,) == learn(memory, {4: HOME}).valid_on({4: HOME})


def test_written_anew_it_is_learned_anew():
    memory = Memory()
    learn(memory, {4: HOME})
    elsewhere = {4: Place("eth0", OTHER_ROUTER, b"\2" * 6)}
    assert (LAN,) == learn(memory, elsewhere, stamp=2).valid_on(elsewhere)


def test_a_network_that_was_not_known_whole_is_the_first_whole_one_that_fits():
    memory = Memory()
    for place in (None, Place("eth0"), Place("eth0", ROUTER), HOME):
        assert (() if place is None else (LAN,)) == learn(memory, {4: place}).valid_on({4: place})
    assert () == learn(memory, {4: Place("eth0", ROUTER, b"\2" * 6)}).valid_on({4: Place("eth0", ROUTER, b"\2" * 6)})
    assert (LAN,) == learn(memory, {4: HOME}).valid_on({4: HOME})


def test_where_it_was_learned_before_the_gateway_was_heard_of_it_may_be_asked_once_it_is():
    found = learn(Memory(), {4: Place("eth0", ROUTER)})
    assert (LAN,) == found.valid_on({4: HOME})
    assert () == found.valid_on({4: Place("eth0", OTHER_ROUTER, HOME.mac)}) == found.valid_on({4: None})


def test_a_public_one_may_be_asked_everywhere():
    found = learn(Memory(), {4: HOME}, address=PUBLIC)
    assert (PUBLIC,) == found.valid_on({}) == found.valid_on({4: Place("wlan0")})


def test_each_ip_version_has_its_own_network():
    unique = ip_address("fd00::53")
    six = Place("wlan0", ip_address("fe80::1"), b"\3" * 6)
    found = learn(Memory(), {4: HOME, 6: six}, address=unique)
    assert (unique,) == found.valid_on({4: None, 6: six})
    assert () == found.valid_on({4: HOME, 6: None})
