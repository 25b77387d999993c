"""The sets of our nftables tables: what changes too often for the text.

Live ports and echo identifiers of NAT come and go with flows. The tunnel's addresses change when it comes back with
others, which apps wait for.
"""

from collections.abc import Iterable

from tunsplit.host import IPAddress

# Live ports and echo identifiers, by protocol.
SET_TCP, SET_UDP, SET_ECHO4, SET_ECHO6 = "nat_tcp", "nat_udp", "nat_echo4", "nat_echo6"
LIVE = {
    SET_TCP: "type inet_service",
    SET_UDP: "type inet_service",
    SET_ECHO4: "typeof icmp id",
    SET_ECHO6: "typeof icmpv6 id",
}

# The tunnel's addresses, by table and IP version.
SETS_TUNNEL = {"inet": {4: "tunnel4", 6: "tunnel6"}, "arp": {4: "tunnel4"}}


def live_sets() -> str:
    """Define those of live ports.

    A set of 16-bit keys would be a bitmap, whose insertion walks all its elements (nft_set_bitmap.c): 1.6 ms for 64
    ports beside 6,000. A dynamic one is a hash: 0.14 ms.
    """
    return "".join(f"set {name} {{\n\t{key}\n\tflags dynamic\n}}\n" for name, key in LIVE.items())


def tunnel_sets(family: str) -> str:
    """Define those of the tunnel's addresses in our table of a family, `inet` or `arp`."""
    names = SETS_TUNNEL[family].items()
    return "".join(f"set {name} {{\n\ttype ipv{version}_addr\n}}\n" for version, name in names)


def address_sets(tunnel: Iterable[IPAddress]) -> dict[str, dict[str, tuple[IPAddress, ...]]]:
    """What the sets of addresses hold, by table, where these are the tunnel's."""
    addresses = tuple(tunnel)
    return {
        family: {name: tuple(one for one in addresses if one.version == version) for version, name in names.items()}
        for family, names in SETS_TUNNEL.items()
    }
