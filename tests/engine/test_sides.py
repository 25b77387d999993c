"""Which device a side is, family by family, and the tun's addresses."""

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from tests.snapshots import (
    ETH0,
    HOST,
    LO,
    ROUTES4,
    ROUTES6,
    TUN,
    TUNNEL4,
    UPLINK4,
    UPLINK6,
    WG0,
    WLAN0,
    on_link,
    via,
)
from tunsplit.engine.sides import Sides, beside, choose_tun_addresses, find_sides, of_others
from tunsplit.host import TABLE_MAIN, Address, Link, Route, RouteType, Rule, Snapshot
from tunsplit.names import TABLE_TUN


def sides(snapshot: Snapshot, uplink: str = "auto") -> Sides:
    return find_sides(snapshot, tunnel="wg0", uplink=uplink, tun="tunsplit0")


def names(found: Sides) -> tuple[str | None, str | None, str | None]:
    return tuple(facts.link.name if facts else None for facts in (found.uplink4, found.uplink6, found.tunnel))  # type: ignore[return-value]  # three of them


def test_both_sides_with_their_addresses_and_gateways():
    found = sides(HOST)

    assert ("eth0", "eth0", "wg0") == names(found)
    assert found.uplink4 is not None
    assert (ip_address("192.168.50.1"), ip_address("2001:db8:50::1")) == (
        found.uplink4.gateway(4),
        found.uplink4.gateway(6),
    )
    assert found.tunnel is not None
    assert (None, None) == (found.tunnel.gateway(4), found.tunnel.gateway(6))
    assert (4, 6) == found.families
    assert 1 == len(found.uplinks)


def test_what_is_ours_is_left_out_but_for_which_devices_our_tuns_are():
    ours = replace(
        HOST,
        links=tuple(replace(link, up=not link.up) if link == TUN else link for link in HOST.links),
        addresses=(*HOST.addresses, Address(TUN.index, ip_interface("10.128.0.1/32"))),
        routes=(*HOST.routes, Route(ip_network("0.0.0.0/0"), TABLE_TUN, TUN.index)),
        rules=(Rule(4, 81),),
    )
    anew = replace(HOST, links=tuple(replace(link, index=99) if link == TUN else link for link in HOST.links))
    theirs = replace(HOST, addresses=HOST.addresses[1:])

    before = of_others(HOST, [TUN.name])
    assert [True, False, False] == [before == of_others(one, [TUN.name]) for one in (ours, anew, theirs)]
    assert names(sides(HOST)) == names(sides(before))


def test_each_family_has_its_own_uplink():
    host = replace(
        HOST,
        links=(*HOST.links, WLAN0),
        addresses=(*HOST.addresses, Address(5, ip_interface("2001:db8:60::2/64"))),
        routes=(*ROUTES4, on_link("2001:db8:60::/64", 5), via("::/0", "fe80::1", 5, 600)),
    )
    found = sides(host)

    assert ("eth0", "wlan0", "wg0") == names(found)
    assert ["eth0", "wlan0"] == [facts.link.name for facts in found.uplinks]


def test_the_lowest_metric_is_the_uplink_unless_its_cable_is_out():
    second = via("0.0.0.0/0", "172.20.0.1", 5, 50)
    host = replace(HOST, links=(*HOST.links, WLAN0), routes=(via("0.0.0.0/0", "192.168.50.1", 2, 100), second))
    pulled = replace(host, links=(*HOST.links, replace(WLAN0, carrier=False)))

    assert "wlan0" == names(sides(host))[0]
    assert "eth0" == names(sides(pulled))[0]


@pytest.mark.parametrize(
    "link",
    [
        replace(WG0, index=9, name="wg1"),
        Link(9, "tun1", 1500, kind="tun", is_layer2=False),
        Link(9, "tap0", 1500, kind="tun"),
        Link(9, "ppp0", 1500, kind="ppp", is_layer2=False),
        Link(9, "gre1", 1500, kind="gretap"),
        Link(9, "odd", 1500, kind="unheard-of", is_layer2=False),
        Link(9, "down", 1500, up=False),
        replace(TUN, index=9, up=True),
        replace(LO, index=9),
    ],
    ids=lambda link: link.name,
)
def test_other_tunnels_and_what_is_no_network_are_never_the_uplink(link):
    host = replace(HOST, links=(link, *HOST.links), routes=(via("0.0.0.0/0", "10.9.9.9", 9), *HOST.routes))

    assert "eth0" == names(sides(host))[0]


def test_a_modem_without_ethernet_may_be_the_uplink():
    modem = Link(9, "wwan0", 1500, kind="wwan", is_layer2=False)
    host = Snapshot(links=(modem,), addresses=(Address(9, ip_interface("10.9.9.1/32")),), routes=(
        Route(ip_network("0.0.0.0/0"), oif=9),))  # fmt: skip

    assert "wwan0" == names(sides(host))[0]


def test_without_a_default_route_the_uplink_is_the_hardware_there_is():
    found = sides(replace(HOST, routes=(on_link("192.168.50.0/24"),)))

    assert ("eth0", "eth0", "wg0") == names(found)
    assert found.uplink4 is not None
    assert found.uplink4.gateway(4) is None


def offline(*links: Link, addresses: tuple[Address, ...] = ()) -> Snapshot:
    return replace(HOST, links=(*HOST.links, *links), addresses=(*HOST.addresses, *addresses), routes=())


WLAN_ADDRESS = Address(5, ip_interface("172.20.0.2/16"))


def test_of_several_it_is_the_one_that_it_was():
    before = sides(replace(HOST, links=(*HOST.links, WLAN0), routes=(via("0.0.0.0/0", "172.20.0.1", 5), *ROUTES6)))
    found = find_sides(
        offline(WLAN0, addresses=(WLAN_ADDRESS,)), tunnel="wg0", uplink="auto", tun="tunsplit0", before=before
    )

    assert ("wlan0", "eth0", "wg0") == names(found)


def test_or_one_that_has_an_address():
    assert ("wlan0", "eth0", "wg0") == names(sides(replace(offline(WLAN0), addresses=(WLAN_ADDRESS, *UPLINK6))))


def test_but_not_if_it_has_lost_its_address():
    before = sides(replace(HOST, links=(*HOST.links, WLAN0), routes=(via("0.0.0.0/0", "172.20.0.1", 5), *ROUTES6)))

    assert "eth0" == names(find_sides(offline(WLAN0), tunnel="wg0", uplink="auto", tun="tunsplit0", before=before))[0]


def test_or_the_other_familys():
    host = replace(offline(WLAN0, addresses=(WLAN_ADDRESS,)), routes=(via("::/0", "fe80::1", 5),))

    assert ("wlan0", "wlan0", "wg0") == names(sides(host))


def test_of_two_default_routes_with_one_metric_the_old_one_stays():
    routes = (via("0.0.0.0/0", "192.168.50.1", 2, 100), via("0.0.0.0/0", "172.20.0.1", 5, 100))
    host = replace(HOST, links=(*HOST.links, WLAN0), routes=routes)
    before = sides(replace(host, routes=routes[1:]))

    assert "eth0" == names(sides(host))[0]
    assert "wlan0" == names(find_sides(host, tunnel="wg0", uplink="auto", tun="tunsplit0", before=before))[0]


def test_a_router_that_calls_itself_the_better_one_is_taken_first():
    """RFC 4191 §2.1."""
    routes = [
        replace(via("::/0", f"fe80::{name}", 2, 1024), preference=preference)
        for name, preference in (("a", -1), ("b", 1), ("c", 0))
    ]
    found = sides(replace(HOST, routes=tuple(routes)))

    assert found.uplink6 is not None
    assert ip_address("fe80::b") == found.uplink6.gateway6


# What leads out of the host

CARD = replace(ETH0, is_on_bus=True)
PORT = replace(CARD, master=9)


@pytest.mark.parametrize(
    "link",
    [
        Link(9, "veth7", 1500, kind="veth"),
        Link(9, "docker0", 1500, kind="bridge"),
        Link(9, "macvlan0", 1500, kind="macvlan", below=2),
        Link(9, "ipvlan0", 1500, kind="ipvlan", below=2),
        Link(9, "vboxnet0", 1500),
        Link(9, "vlan-of-veth", 1500, kind="vlan", below=7),
    ],
    ids=lambda link: link.name,
)
def test_what_leads_to_guests_is_never_the_uplink_where_there_is_a_card(link):
    """Whatever route somebody puts there, and also when there is none to the card."""
    host = replace(HOST, links=(LO, link, CARD, WG0, TUN), routes=(via("0.0.0.0/0", "10.9.9.9", 9), *HOST.routes))
    lost = replace(host, routes=host.routes[:1], addresses=(Address(9, ip_interface("10.9.9.1/24")),))

    assert ("eth0", "eth0") == (names(sides(host))[0], names(sides(lost))[0])


@pytest.mark.parametrize(
    "link",
    [
        Link(9, "br0", 1500, kind="bridge"),
        Link(9, "bond0", 1500, kind="bond"),
        Link(9, "wlan9", 1500, is_on_bus=True),
    ],
    ids=lambda link: link.name,
)
def test_what_is_made_of_cards_is_one(link):
    host = replace(HOST, links=(LO, PORT, link, WG0, TUN), routes=(via("0.0.0.0/0", "10.9.9.9", 9),))

    assert link.name == names(sides(host))[0]


def test_a_vlan_of_a_card_is_one_too():
    vlan = Link(9, "eth0.7", 1500, kind="vlan", below=2)
    host = replace(HOST, links=(CARD, vlan, WG0), routes=(via("0.0.0.0/0", "10.9.9.9", 9, 7), *HOST.routes[1:]))

    assert "eth0.7" == names(sides(host))[0]


def test_a_port_of_something_is_no_uplink_by_itself():
    bridge = Link(9, "br0", 1500, kind="bridge")
    host = replace(HOST, links=(LO, PORT, bridge, WG0, TUN), addresses=())

    assert ("br0", "br0", "wg0") == names(sides(host))


def test_without_any_card_a_bridge_is_none():
    """As in a container, or a test network: what its ports lead to nobody can tell."""
    bridge, port = Link(9, "br0", 1500, kind="bridge"), Link(10, "veth7", 1500, kind="veth", master=9)
    host = replace(
        HOST, links=(LO, bridge, port, ETH0, WG0, TUN), routes=(via("0.0.0.0/0", "10.9.9.9", 9), *HOST.routes)
    )

    assert "eth0" == names(sides(host))[0]


def test_a_picture_that_makes_no_sense_is_no_endless_one():
    one, other = Link(9, "br0", 1500, kind="bridge", master=10), Link(10, "br1", 1500, kind="bridge", master=9)

    assert "eth0" == names(sides(replace(HOST, links=(one, other, *HOST.links))))[0]


def test_a_default_route_of_another_kind_leads_nowhere():
    closed = Route(ip_network("0.0.0.0/0"), type=RouteType.UNREACHABLE)

    assert "eth0" == names(sides(replace(HOST, routes=(closed, *HOST.routes))))[0]


def test_a_named_uplink_is_that_device_and_no_other():
    host = replace(HOST, links=(*HOST.links, WLAN0))

    assert ("wlan0", "wlan0", "wg0") == names(sides(host, "wlan0"))
    assert (None, None, "wg0") == names(sides(host, "eth7"))


def test_no_device_at_all_is_no_error():
    found = sides(Snapshot())

    assert (None, None, None) == names(found)
    assert () == found.families
    assert 1500 == found.mtu


@pytest.mark.parametrize(
    ("address", "up"),
    [
        (Address(3, ip_interface("fe80::1/64"), scope=253), False),
        (Address(3, ip_interface("169.254.3.4/16")), False),
        (Address(3, ip_interface("10.64.0.2/32"), scope=254), False),
        (Address(3, ip_interface("fd64::2/128"), tentative=True), False),
        (Address(3, ip_interface("fd64::2/128"), deprecated=True), True),
        (Address(3, ip_interface("10.64.0.2/32")), True),
    ],
)
def test_a_tunnel_is_up_for_a_family_with_a_global_settled_address_of_it(address, up):
    found = sides(replace(HOST, addresses=(*UPLINK4, address)))

    assert up == (found.tunnel_of(address.family) is not None)


def test_a_device_that_is_down_is_no_side():
    found = sides(replace(HOST, links=(LO, ETH0, replace(WG0, up=False))))

    assert (None, None) == (found.tunnel, found.tunnel_of(4))


def test_preferred_addresses_come_first():
    addresses = [
        Address(2, ip_interface("2001:db8:50::a/64"), deprecated=True),
        Address(2, ip_interface("2001:db8:50::b/64"), secondary=True),
        Address(2, ip_interface("2001:db8:50::c/64")),
    ]
    found = sides(replace(HOST, addresses=tuple(addresses)))

    assert found.uplink6 is not None
    assert ["c", "b", "a"] == [str(address.ip)[-1] for address in found.uplink6.addresses]


@pytest.mark.parametrize(
    ("uplink", "tunnel", "mtu"), [(1500, 1420, 1420), (1400, 1420, 1400), (9000, 1000, 1280), (1200, 9000, 1280)]
)
def test_the_mtu_is_the_smaller_one_but_never_under_1280(uplink, tunnel, mtu):
    links = (replace(ETH0, mtu=uplink), replace(WG0, mtu=tunnel))

    found = sides(replace(HOST, links=links))
    assert mtu == found.mtu
    assert found.tunnel is not None
    assert tunnel == found.tunnel.mtu


# The tun's addresses.


def chosen(*used: Route | Address) -> tuple[str, str]:
    routes = tuple(one for one in used if isinstance(one, Route))
    addresses = tuple(one for one in used if isinstance(one, Address))
    host = replace(HOST, routes=(*HOST.routes, *routes), addresses=(*HOST.addresses, *addresses))
    four, six = choose_tun_addresses(host, tuns=("tunsplit0",))
    return str(four), str(six)


FIRST = ("10.128.0.1/32", "2001:2:0:5::1/128")


def test_the_addresses_are_always_the_same():
    assert FIRST == chosen()


def test_what_the_host_uses_is_avoided():
    assert ("10.129.0.1/32", "2001:2:0:6::1/128") == chosen(
        Address(2, ip_interface("10.128.0.2/30")), on_link("2001:2:0:5::/64")
    )
    assert "172.16.128.1/32" == chosen(via("10.0.0.0/8", "192.168.50.1"))[0]
    assert "192.168.255.1/32" == chosen(via("10.0.0.0/8", "192.168.50.1"), on_link("172.16.0.0/12"))[0]
    assert "3fff:0:0:5::1/128" == chosen(on_link("2001:2::/48"))[1]


def test_half_the_world_is_nobodys_own():
    assert FIRST == chosen(via("0.0.0.0/1", "192.168.50.1"), via("2000::/3", "fe80::1"), via("::/1", "fe80::1"))


def test_the_tuns_own_and_what_is_in_our_tables_does_not_count():
    own = Route(ip_network("10.128.0.0/9"), TABLE_TUN, oif=2)
    left = Route(ip_network("10.128.0.0/16"), TABLE_MAIN, oif=4)

    assert FIRST == chosen(Address(4, ip_interface("10.128.0.1/32")), own, left)


def test_when_everything_is_used_the_first_has_to_do():
    used = [on_link(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "2001:2::/48", "3fff::/20")]

    assert FIRST == chosen(*used)


def test_the_tun_of_forwarded_packets_has_addresses_beside_the_tuns():
    assert ["10.128.0.5/32", "2001:2:0:5::5/128"] == [str(one) for one in beside(map(ip_interface, FIRST))]
    assert [] == list(beside(()))


def test_without_a_tun_yet():
    assert FIRST == tuple(map(str, choose_tun_addresses(replace(HOST, addresses=TUNNEL4, routes=ROUTES6))))


def test_a_tunnel_without_a_carrier_is_down():
    away = replace(HOST, links=(LO, ETH0, replace(WG0, carrier=False), TUN))

    assert ("eth0", "eth0", None) == names(sides(away))


def test_the_latest_addresses_of_the_tunnel_are_kept_while_it_lacks_a_family():
    both = (ip_address("10.64.0.2"), ip_address("fd64::2"))
    found = sides(HOST)
    lacking = sides(replace(HOST, addresses=(*UPLINK4, *TUNNEL4)))

    assert both == found.latest_of_tunnel(())
    assert both == lacking.latest_of_tunnel((ip_address("10.64.0.9"), both[1]))
    assert both == Sides().latest_of_tunnel(both)
