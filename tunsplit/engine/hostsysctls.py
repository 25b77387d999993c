"""What the kernel must not do on our devices and the sides', as values under /proc/sys."""

from collections.abc import Iterator

from tunsplit.engine.sides import Sides
from tunsplit.host import Link, Snapshot, Sysctl
from tunsplit.names import NAT_FIRST, NAT_LAST


def sysctls(snapshot: Snapshot, sides: Sides, tunnel: str, both: tuple[Link, Link]) -> Iterator[Sysctl]:
    """Every value that is wanted.

    Args:
        snapshot: of the host.
        sides: as found in it.
        tunnel: the tunnel's device, which may be away.
        both: the tun, and that of what this host forwards.
    """
    tuns = [tun.name for tun in both]
    # What TCP remembers of a peer it remembers by the tun's address, for the apps of both sides: a server that is slow
    # on one side would know by the pace on the other whom it talks to (net/ipv4/tcp_metrics.c).
    yield Sysctl("net/ipv4/tcp_no_metrics_save", "1")
    yield Sysctl("net/ipv4/ip_local_reserved_ports", f"{NAT_FIRST}-{NAT_LAST}", is_list=True)
    # Answers of a local router's ICMP come out of the tun, and their reverse path is not the tun: strict would lose
    # path MTU discovery.
    for name in tuns:
        yield Sysctl(f"net/ipv4/conf/{name}/rp_filter", "2")
    # Also where forwarding was switched on device by device.
    yield Sysctl(f"net/ipv4/conf/{both[1].name}/forwarding", "1")
    uplinks = [uplink.link.name for uplink in sides.uplinks]
    for name in (*uplinks, tunnel):
        # What comes in is marked, and the mark takes part in the reverse look-up: strict rp_filter keeps working.
        yield Sysctl(f"net/ipv4/conf/{name}/src_valid_mark", "1")
    for name in uplinks:
        # Neither answers for the tunnel's and the tun's addresses, nor asks in their name (CVE-2019-14899).
        yield Sysctl(f"net/ipv4/conf/{name}/arp_ignore", "1", good=frozenset({"2", "8"}))
        yield Sysctl(f"net/ipv4/conf/{name}/arp_announce", "2")
    if snapshot.ipv6_enabled:
        for name in tuns:
            yield Sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "0")
            # No link-local address: router solicitations and multicast listener reports would come out of the tun.
            yield Sysctl(f"net/ipv6/conf/{name}/addr_gen_mode", "1")
        for name in (*tuns, tunnel):
            # What the VPN's server writes into the device could otherwise give the tunnel routes and addresses.
            yield Sysctl(f"net/ipv6/conf/{name}/accept_ra", "0")
            yield Sysctl(f"net/ipv6/conf/{name}/accept_redirects", "0")
    for name in (*tuns, tunnel):
        yield Sysctl(f"net/ipv4/conf/{name}/accept_redirects", "0")
