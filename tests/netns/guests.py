"""Guests of the lab's host: containers behind a bridge, with the rules that Docker makes for them.

guest: eth0 ── docker0 :host
172.17.0.2/16  172.17.0.1/16
fd17::2/64     fd17::1/64
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from tests.netns.stage import App, start_app
from tunsplit.lab import Lab, netns
from tunsplit.lab.netns import Namespace

BRIDGE = "docker0"
GUEST = {4: "172.17.0.2", 6: "fd17::2"}
GATEWAY = {4: "172.17.0.1", 6: "fd17::1"}
LENGTH = {4: 16, 6: 64}
FORWARDING = {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1}

# As `iptables-save` shows them on a host with one network: forwarding is dropped but for the bridge's own, and what
# leaves by another device than the bridge is masqueraded.
DOCKER = """
table {family} docker {{
    chain FORWARD {{
        type filter hook forward priority filter; policy drop;
        oifname "docker0" ct state related,established accept
        iifname "docker0" oifname != "docker0" accept
        iifname "docker0" oifname "docker0" accept
    }}
    chain POSTROUTING {{
        type nat hook postrouting priority srcnat;
        {family} saddr {prefix} oifname != "docker0" masquerade
    }}
}}
"""
PREFIX = {4: "172.17.0.0/16", 6: "fd17::/64"}


@contextmanager
def open_guest(lab: Lab, *, masquerade: bool = True) -> Iterator[Namespace]:
    """Put a guest behind a bridge; without `masquerade` there are no rules of Docker's, and it is routed as it is."""
    netns.create([name := f"{lab.name}-guest"])
    guest = Namespace(name)
    try:
        guest.sysctl({"net/ipv4/ping_group_range": "0 2147483647", "net/ipv6/conf/default/accept_dad": 0})
        lab.host.sysctl(FORWARDING)
        lab.host.ip(
            f"link add {BRIDGE} type bridge\nlink add veth0 type veth peer name eth0 netns {name}\n"
            f"link set veth0 master {BRIDGE}\nlink set veth0 up\nlink set {BRIDGE} up\n"
            f"address add {GATEWAY[4]}/16 dev {BRIDGE}\naddress add {GATEWAY[6]}/64 dev {BRIDGE} nodad"
        )
        guest.ip(
            f"link set lo up\nlink set eth0 up\naddress add {GUEST[4]}/16 dev eth0\n"
            f"address add {GUEST[6]}/64 dev eth0 nodad\n"
            f"route add default via {GATEWAY[4]}\nroute add default via {GATEWAY[6]}"
        )
        if masquerade:
            for version, family in ((4, "ip"), (6, "ip6")):
                lab.host.nft(DOCKER.format(family=family, prefix=PREFIX[version]))
        yield guest
    finally:
        netns.delete([name])


@asynccontextmanager
async def open_guest_app(lab: Lab, **options: bool) -> AsyncIterator[App]:
    """Run an app in a guest."""
    with open_guest(lab, **options) as guest:
        async with start_app(guest, lab.copy_program("python", "guest")) as app:
            yield app
