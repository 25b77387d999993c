"""Hosts as plain values, for tests of what is decided about them."""

from ipaddress import ip_address, ip_interface, ip_network

from tunsplit.host import SCOPE_LINK, Address, Link, Route, Snapshot

LO = Link(1, "lo", 65536, is_layer2=False, is_loopback=True)
ETH0 = Link(2, "eth0", 1500, mac=b"\x02\x00\x00\x00\x00\x02")
WG0 = Link(3, "wg0", 1420, kind="wireguard", is_layer2=False)
FORWARDED = Link(6, "tunsplit1", 1500, kind="tun", is_layer2=False)
TUN = Link(4, "tunsplit0", 1500, up=False, kind="tun", is_layer2=False)
WLAN0 = Link(5, "wlan0", 1500, mac=b"\x02\x00\x00\x00\x00\x05")

UPLINK4 = (Address(2, ip_interface("192.168.50.2/24")),)
UPLINK6 = (Address(2, ip_interface("2001:db8:50::2/64")),)
TUNNEL4 = (Address(3, ip_interface("10.64.0.2/32")),)
TUNNEL6 = (Address(3, ip_interface("fd64::2/128")),)


def on_link(prefix: str, oif: int = 2, **others: object) -> Route:
    """A kernel's route of an address."""
    scope = 0 if ":" in prefix else SCOPE_LINK
    return Route(ip_network(prefix), oif=oif, scope=scope, protocol=2, metric=256 if ":" in prefix else 0, **others)  # type: ignore[arg-type]  # as given


def via(prefix: str, gateway: str, oif: int = 2, metric: int = 0) -> Route:
    """A route by a gateway."""
    return Route(ip_network(prefix), oif=oif, gateway=ip_address(gateway), metric=metric, protocol=16)


ROUTES4 = (via("0.0.0.0/0", "192.168.50.1"), on_link("192.168.50.0/24"))
ROUTES6 = (on_link("2001:db8:50::/64"), via("::/0", "2001:db8:50::1", metric=1024))

HOST = Snapshot(
    links=(LO, ETH0, WG0, TUN),
    addresses=(*UPLINK4, *UPLINK6, *TUNNEL4, *TUNNEL6),
    routes=(*ROUTES4, *ROUTES6),
)
