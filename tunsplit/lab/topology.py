"""Wires, addresses and routes: host – router – internet, and the relay behind the router.

The router does no NAT, the relay does: so a server sees on which side a packet came.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tunsplit.lab import addresses, netns
from tunsplit.lab.addresses import Address, Interface
from tunsplit.lab.leases import ROLES
from tunsplit.lab.netns import Namespace


@dataclass(frozen=True)
class Network:
    """The four namespaces."""

    host: Namespace
    router: Namespace
    relay: Namespace
    internet: Namespace


def build(name: str, *, uplink: Iterable[int], ipv6: bool, rp_filter: int) -> Network:
    """Make the namespaces and all between them but the tunnel.

    Args:
        name: prefix of the namespaces' names.
        uplink: IP versions that the host has on its uplink.
        ipv6: False switches IPv6 off in the host.
        rp_filter: the host's reverse path filter: 0 off, 1 strict, 2 loose.
    """
    netns.create(f"{name}-{role}" for role in ROLES)
    network = Network(*(Namespace(f"{name}-{role}") for role in ROLES))
    for namespace in (network.router, network.relay, network.internet):
        # A forged source must arrive where it was sent, to be seen there.
        namespace.sysctl(_settings(rp_filter=0, ipv6=True))
    network.host.sysctl(_settings(rp_filter=rp_filter, ipv6=ipv6))
    for namespace in (network.router, network.relay):
        namespace.sysctl({"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1})

    network.router.ip(
        f"""
        link set lo up
        link add lan0 type veth peer name eth0 netns {network.host.name}
        link add relay0 type veth peer name eth0 netns {network.relay.name}
        link add inet0 type veth peer name eth0 netns {network.internet.name}
        {_device("lan0", addresses.ROUTER_LAN.values())}
        {_own(addresses.LAN_RESOLVER.values(), "lan0")}
        {_own(addresses.SYSTEM_RESOLVER.values(), "lan0")}
        {_device("relay0", addresses.ROUTER_RELAY.values())}
        {_device("inet0", addresses.ROUTER_INTERNET.values())}
        {_routes(addresses.PUBLIC_RESOLVER.values(), via=addresses.SERVER)}
        """
    )
    _end(network.host, [addresses.HOST[version] for version in uplink], addresses.ROUTER_LAN)
    _end(network.relay, addresses.RELAY.values(), addresses.ROUTER_RELAY)
    _end(network.internet, addresses.SERVER.values(), addresses.ROUTER_INTERNET)
    # Resolvers listen on these, the relay's also while there is no tunnel.
    for namespace, own in ((network.internet, addresses.PUBLIC_RESOLVER), (network.relay, addresses.RELAY_RESOLVER)):
        namespace.ip(_own(own.values(), "lo"))
    return network


def _settings(*, rp_filter: int, ipv6: bool) -> Mapping[str, int | str]:
    settings: dict[str, int | str] = {"net/ipv4/ping_group_range": "0 2147483647"}
    for scope in ("all", "default"):
        settings[f"net/ipv4/conf/{scope}/rp_filter"] = rp_filter
        # Nobody else is on these wires: an address may be used at once.
        settings[f"net/ipv6/conf/{scope}/accept_dad"] = 0
        settings[f"net/ipv6/conf/{scope}/disable_ipv6"] = 0 if ipv6 else 1
    return settings


def _end(namespace: Namespace, own: Iterable[Interface], router: Mapping[int, Interface]) -> None:
    """A machine with one wire and one router."""
    own = list(own)
    namespace.ip(
        f"""
        link set lo up
        {_device("eth0", own)}
        {"".join(f"route add default via {router[interface.version].ip}{chr(10)}" for interface in own)}
        """
    )


def _device(name: str, own: Iterable[Interface]) -> str:
    # Settled at once: duplicate address detection, though switched off, leaves that to a worker of the kernel.
    settled = {4: "", 6: " nodad"}
    added = (f"address add {interface} dev {name}{settled[interface.version]}\n" for interface in own)
    return f"link set {name} up\n" + "".join(added)


def _own(own: Iterable[Address], device: str) -> str:
    """More addresses of a machine, without a network around them; it calls itself by none (RFC 6724 §5, rule 3)."""
    lifetime = {4: "", 6: " preferred_lft 0 nodad"}
    return "".join(f"address add {address} dev {device}{lifetime[address.version]}\n" for address in own)


def _routes(destinations: Iterable[Address], *, via: Mapping[int, Interface]) -> str:
    return "".join(f"route add {address} via {via[address.version].ip}\n" for address in destinations)
