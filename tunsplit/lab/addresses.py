"""The lab's network on paper: who has which address (RFC 5737, RFC 3849; private and unique local inside).

Dictionaries are keyed by IP version, 4 or 6.
"""

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface

PICTURE = """\
       host                          router                       internet
 ┌─────────────────┐  uplink  ┌───────────────────┐      ┌────────────────────────┐
 │ eth0 ───────────┼──────────┼─ 192.168.50.1     ├──────┤ 198.51.100.1           │
 │  192.168.50.2   │          │  2001:db8:50::1   │      │ 2001:db8:100::1        │
 │  2001:db8:50::2 │          │                   │      │                        │
 │                 │          │ LAN's resolver    │      │ public resolver        │
 │ wg0 ════════╗   │          │  192.168.50.53    │      │  8.8.8.8               │
 │  10.64.0.2  ║   │          │  fd50::53         │      │  2001:4860:4860::8888  │
 │  fd64::2    ║   │          │ system's resolver │      └────────────────────────┘
 │             ║   │          │  192.168.50.54    │
 │             ║   │          │  2001:db8:50::54  │
 │             ║   │          └─────────┬─────────┘
 │             ║   │          ┌─────────┴─────────┐
 └─────────────╫───┘          │ 203.0.113.10      │
               ║              │ 2001:db8:113::10  │
               ║    tunnel    │                   │
               ╚══════════════╪═ wg0, resolver    │
                              │  10.64.0.1        │
                              │  fd64::1          │
                              └───────────────────┘
                                      relay
"""


def format_host(address: Address) -> str:
    """An address as it stands before a port: IPv6 in brackets."""
    return f"[{address}]" if address.version == 6 else str(address)


def _interfaces(*texts: str) -> Mapping[int, Interface]:
    return {interface.version: interface for interface in map(ip_interface, texts)}


def _addresses(*texts: str) -> Mapping[int, Address]:
    return {address.version: address for address in map(ip_address, texts)}


HOST = _interfaces("192.168.50.2/24", "2001:db8:50::2/64")
ROUTER_LAN = _interfaces("192.168.50.1/24", "2001:db8:50::1/64")
PRIVATE_LAN = _interfaces("192.168.50.1/24", "fd50::1/64")  # where the LAN's private addresses are
ROUTER_RELAY = _interfaces("203.0.113.1/24", "2001:db8:113::1/64")
ROUTER_INTERNET = _interfaces("198.51.100.254/24", "2001:db8:100::254/64")
RELAY = _interfaces("203.0.113.10/24", "2001:db8:113::10/64")
SERVER = _interfaces("198.51.100.1/24", "2001:db8:100::1/64")

HOST_TUNNEL = _interfaces("10.64.0.2/32", "fd64::2/128")
RELAY_TUNNEL = _interfaces("10.64.0.1/24", "fd64::1/64")

RELAY_RESOLVER = _addresses("10.64.0.1", "fd64::1")
LAN_RESOLVER = _addresses("192.168.50.53", "fd50::53")
PUBLIC_RESOLVER = _addresses("8.8.8.8", "2001:4860:4860::8888")
SYSTEM_RESOLVER = _addresses("192.168.50.54", "2001:db8:50::54")  # what the host had before there was a VPN
RELAY_NAME = "relay.example"  # every resolver knows it
NOBODY = _addresses("192.0.2.53", "2001:db8:dead::53")  # there is no such host
RESOLVERS = {
    "relay": RELAY_RESOLVER,
    "lan": LAN_RESOLVER,
    "public": PUBLIC_RESOLVER,
    "system": SYSTEM_RESOLVER,
}

TUNNEL_DEVICE = "wg0"
TUNNEL_MTU = 1420  # wg-quick's: 1500 less WireGuard's 60 octets over IPv4 and 80 over IPv6
TUNNEL_PORT = 51820
TUNNEL_MARK = 51820
ECHO_PORT = 7
HTTP_PORT = 80
IPERF_PORT = 5201
