"""Which device a side is, family by family, and the tun's addresses."""

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from tests.snapshots import ETH0, HOST, LO, ROUTES4, ROUTES6, TUN, TUNNEL4, UPLINK4, WG0, WLAN0, on_link, via
from tunsplit.engine.sides import Sides, choose_tun_addresses, find_sides
from tunsplit.host import TABLE_MAIN, Address, Link, Route, RouteType, Snapshot
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
    four, six = choose_tun_addresses(host, tun="tunsplit0")
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


def test_without_a_tun_yet():
    assert FIRST == tuple(map(str, choose_tun_addresses(replace(HOST, addresses=TUNNEL4, routes=ROUTES6))))
