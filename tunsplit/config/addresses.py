"""How names and numbers of networks are read: interfaces, addresses, prefixes, endpoints, protocols."""

import re
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)

import msgspec

from tunsplit.config.values import Reader, integer_of, shown, text_of

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network


class Endpoint(msgspec.Struct, frozen=True):
    """Where the VPN's transport goes: address, port, and "tcp" or "udp"."""

    address: Address
    port: int
    protocol: str


class Listener(msgspec.Struct, frozen=True):
    """An address and port of this host that our own resolver listens on."""

    address: Address
    port: int


# At most IFNAMSIZ without its NUL (linux/if.h), of the characters that nftables can name in quotes.
INTERFACE = re.compile(r"[A-Za-z0-9_.@+=#,-]{1,15}")
INTERFACES = re.compile(r"[A-Za-z0-9_.@+=#,*?-]{1,15}")


def interface(example: str) -> Reader:
    """The name of a network interface; never the loopback."""

    def convert(value: object) -> str:
        name = text_of(value)
        if not INTERFACE.fullmatch(name) or name in (".", "..", "lo", "auto"):
            raise ValueError(value)
        return name

    return Reader(f'the name of an interface, such as "{example}" (at most 15 characters, not "lo")', convert)


def interfaces(*examples: str) -> Reader:
    """The name of an interface, or a glob for several."""

    def convert(value: object) -> str:
        pattern = text_of(value)
        if not INTERFACES.fullmatch(pattern):
            raise ValueError(value)
        return pattern

    return Reader(f"the name of an interface or a glob, such as {' or '.join(map(shown, examples))}", convert)


def unicast(address: Address) -> Address:
    """Return the address if a host could have it and everybody means the same by it, or raise ValueError."""
    if address.is_multicast or address.is_unspecified or "%" in str(address):
        raise ValueError(address)
    return address


def address_of(value: object) -> Address:
    """Return an address that a host could have, without scope, or raise ValueError."""
    return unicast(ip_address(text_of(value)))


def address() -> Reader:
    """A unicast address of either family."""
    return Reader('an address, such as "10.64.0.1" or "fd64::1"', address_of)


def own_address() -> Reader:
    """An address for our tun, with or without a prefix length."""

    def convert(value: object) -> Interface:
        mine = ip_interface(text_of(value))
        unicast(mine.ip)
        if mine.ip.is_loopback or mine.ip.is_link_local:
            raise ValueError(value)
        return mine

    return Reader('an address for the tun, such as "10.128.0.1/32"', convert)


# SPEC.md's "private", without what no gateway forwards (169.254/16, fe80::/10, loopback).
GATEWAYED = tuple(ip_network(prefix) for prefix in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))


def lan_prefix() -> Reader:
    """A prefix within the private ranges: no list of LAN routes may carry included apps' traffic to the internet."""

    def convert(value: object) -> Network:
        network = ip_network(text_of(value))
        if not any(_within(network, private) for private in GATEWAYED):
            raise ValueError(value)
        return network

    ranges = ", ".join(map(str, GATEWAYED))
    return Reader(f'a prefix without host bits, such as "192.168.60.0/24", within {ranges}', convert)


def _within(network: Network, outer: Network) -> bool:
    same_family = network.version == outer.version
    return same_family and outer.prefixlen <= network.prefixlen and network.network_address in outer


def _address_and_port(value: str) -> tuple[Address, int]:
    host, colon, port = value.rpartition(":")
    if not colon or not re.fullmatch(r"[1-9][0-9]{0,4}", port):
        raise ValueError(value)
    bracketed = host.startswith("[") and host.endswith("]")
    found = address_of(host[1:-1] if bracketed else host)
    if bracketed != (found.version == 6):
        raise ValueError(value)
    return found, integer_of(int(port), 1, 65535)


def endpoint() -> Reader:
    """Address, port and protocol of the VPN's server."""

    def convert(value: object) -> Endpoint:
        where, _, protocol = text_of(value).rpartition("/")
        if protocol not in ("tcp", "udp"):
            raise ValueError(value)
        server, port = _address_and_port(where)
        if server.is_loopback:
            raise ValueError(value)
        return Endpoint(server, port, protocol)

    expected = 'a literal address, port and protocol, such as "203.0.113.10:51820/udp" or "[2001:db8::1]:1194/tcp"'
    return Reader(expected, convert)


def loopback_listener() -> Reader:
    """Address and port of the loopback: a resolver of ours that others could reach would answer the network."""

    def convert(value: object) -> Listener:
        own, port = _address_and_port(text_of(value))
        if not own.is_loopback:
            raise ValueError(value)
        return Listener(own, port)

    return Reader('a loopback address with a port, such as "127.0.0.54:53" or "[::1]:53"', convert)


# Protocols that have a name worth writing (IANA protocol numbers).
PROTOCOLS = {
    "igmp": 2, "ipip": 4, "egp": 8, "igp": 9, "dccp": 33, "ipv6": 41, "rsvp": 46, "gre": 47, "esp": 50, "ah": 51,
    "eigrp": 88, "ospf": 89, "etherip": 97, "pim": 103, "vrrp": 112, "l2tp": 115, "sctp": 132, "udplite": 136,
}  # fmt: skip
# Always split (ICMP, TCP, UDP, ICMPv6), or no protocol of their own: IPv6's extension headers (RFC 7045), "none" (59).
NO_EXTRA_PROTOCOL = {0, 1, 6, 17, 43, 44, 58, 59, 60, 135, 139, 140, 255}


def protocol() -> Reader:
    """A protocol beside TCP, UDP and ICMP, by name or number: its number."""

    def convert(value: object) -> int:
        number = PROTOCOLS.get(value) if isinstance(value, str) else integer_of(value, 0, 255)
        if number is None or number in NO_EXTRA_PROTOCOL:
            raise ValueError(value)
        return number

    return Reader('a protocol besides TCP, UDP and ICMP, by name or number, such as "gre" or 47', convert)
