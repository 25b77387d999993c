"""What others put into the host's routing changes nobody's side, nor whom an included app reaches (L25).

By DHCP (option 121, a mask), router advertisements, redirects, and the VPN's server, which a client obeys. Each time
main has taken it: that is the control.
"""

import json
import socket
import struct
from ipaddress import ip_address

import dpkt
import pytest

from tests.netns import attacker
from tests.netns.stage import HOST, REFUSED, ROUTER, SERVER, open_stage, start_app, until
from tests.netns.talk import mixed, open_talk
from tests.netns.test_uplink_life import GATEWAY_MAC, add_gateway
from tunsplit.lab import addresses

pytestmark = [pytest.mark.netns, pytest.mark.lab(tunnel_kind="veth")]


async def shown(lab, *words):
    """What `ip` shows of the host."""
    return (await lab.host.run(["ip", *words])).stdout


async def test_routes_of_dhcp_and_of_the_vpn_change_nobodys_side(lab, stage):
    """Option 121, a mask that takes a quarter of the world for the link, and what a VPN's client is told to put in."""
    before = await shown(lab, "route", "show", "table", "main")
    async with open_talk(stage) as (excluded, included):
        lab.host.ip(
            f"route add 0.0.0.0/1 via {ROUTER[4]} dev eth0\nroute add 128.0.0.0/1 via {ROUTER[4]} dev eth0\n"
            f"route add {SERVER[4]} via {ROUTER[4]} dev eth0\nroute add 10.64.0.0/16 via {ROUTER[4]} dev eth0\n"
            f"route add 2000::/3 via {ROUTER[6]} dev eth0\nroute add {SERVER[6]} via {ROUTER[6]} dev eth0\n"
        )
        assert ({}, {}) == (await excluded.lost(), await included.lost())
        lab.host.ip(
            "route replace 0.0.0.0/1 dev wg0\nroute replace 128.0.0.0/1 dev wg0\nroute replace 2000::/3 dev wg0\n"
            f"route replace {SERVER[4]} dev wg0\nroute replace {SERVER[6]} dev wg0\n"
            "route add 192.168.50.0/25 dev wg0\nroute add 2001:db8:50::/65 dev wg0\n"
        )
        assert ({}, {}) == (await excluded.lost(), await included.lost())
        assert [] == await mixed(stage)
    assert before != await shown(lab, "route", "show", "table", "main")


@pytest.mark.attack(
    "DHCP: a mask of /2, the LAN shared (TunnelCrack)", "the link says who is local", "local is what is private"
)
async def test_a_mask_makes_no_stranger_a_neighbour(lab):
    """L25: local is what is private: with its sharing, too, an included app talks to the server in the tunnel."""
    async with open_stage(lab, lan={"allow": True}) as stage, open_talk(stage) as (_, included):
        lab.host.ip(
            "address add 192.168.50.3/2 dev eth0 noprefixroute\nroute add 192.0.0.0/2 dev eth0 src 192.168.50.3"
        )
        assert {} == await included.lost()
        async with stage.app(stage.excluded) as one:
            stage.clear()
            # The uplink's own routes are an excluded app's, longest prefix first.
            with pytest.raises(OSError, match=f"{REFUSED}|timed out"):
                await one("own = tcp(SERVER4)")
        await lab.uplink.settle()
        assert lab.uplink.seen("arp", destination=SERVER[4])
        assert [] == await mixed(stage)


async def test_router_advertisements_change_nobodys_side(lab, stage):
    """An address, which is renewed; then a prefix that takes all of IPv6 for the link, which kernels allow."""
    own = attacker.prefix("2001:db8:50::/64", attacker.ON_LINK | attacker.AUTONOMOUS)

    async def addresses():
        return (await shown(lab, "-6", "address", "show", "dev", "eth0", "dynamic")).count("inet6")

    async def all_on_link():
        return "2000::/3" in await shown(lab, "-6", "route", "show", "dev", "eth0")

    async with open_talk(stage) as (excluded, included):
        attacker.advertise(lab.router, "lan0", own, lifetime_s=1800)
        assert 1 == await until(addresses, "the host has taken an address")
        attacker.advertise(lab.router, "lan0", own, lifetime_s=1800)
        assert ({}, {}) == (await excluded.lost(), await included.lost())
        assert 1 == await addresses()

        attacker.advertise(lab.router, "lan0", own, attacker.prefix("2000::/3", attacker.ON_LINK), lifetime_s=1800)
        await until(all_on_link, "all of IPv6 is on-link")
        assert {} == await included.lost()
        # Who is cut off hears of it, and goes on when the link's word is taken back.
        attacker.advertise(
            lab.router, "lan0", own, attacker.prefix("2000::/3", attacker.ON_LINK, lifetime_s=0), lifetime_s=1800
        )
        assert await excluded.is_heard()
        assert {} == await included.lost()
        assert [] == await mixed(stage)


# Redirects

NEARER = {4: "192.168.50.9", 6: "fe80::ff:fe00:99"}  # the second gateway


async def link_local(lab):
    """The router's own address on the host's link."""
    words = ["ip", "-json", "-6", "address", "show", "lan0", "scope", "link"]
    shown = json.loads((await lab.router.run(words)).stdout)
    (address,) = [own["local"] for one in shown for own in one.get("addr_info", ()) if "local" in own]
    return address


def redirect(lab, version, gateway, quoted):
    """Tell the host as its gateway that another one is nearer to where this packet went (RFC 792, RFC 4861 §4.5)."""
    nearer = ip_address(NEARER[version]).packed
    if version == 4:
        message = bytes(dpkt.icmp.ICMP(type=5, code=1, data=nearer + quoted[:28]))
        family, protocol = socket.AF_INET, socket.IPPROTO_ICMP
    else:
        message = struct.pack("!BB6x16s16s", 137, 0, nearer, quoted[24:40])
        # The packet itself may be left out; with it the kernel hears of it by the socket, if that is bound to a device.
        message += struct.pack("!BB6s", 2, 1, GATEWAY_MAC)
        family, protocol = socket.AF_INET6, socket.IPPROTO_ICMPV6
    with lab.router.socket(family, socket.SOCK_RAW, protocol) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lan0")
        if version == 6:
            own.bind((gateway, 0))
            own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 255)
        own.sendto(message, (str(HOST[version]), 0))


async def next_hops(lab, app, payload):
    """The neighbours that an app's datagram goes to."""
    lab.uplink.clear()
    await app("own.send(text.encode())", text=payload.decode())

    async def seen():
        await lab.uplink.settle()
        return {frame.frame[:6] for frame in lab.uplink.seen("udp", payload=payload) if frame.direction == "out"}

    return await until(seen, "the datagram has left")


async def is_redirected(lab, app, version, gateway):
    """Whether another redirect makes an app's datagrams go to the second gateway."""
    await next_hops(lab, app, b"to be quoted")
    redirect(lab, version, gateway, lab.uplink.seen(payload=b"to be quoted")[0].frame[14:])
    return GATEWAY_MAC in await next_hops(lab, app, b"redirected?")


@pytest.mark.attack("redirects, ICMP and ICMPv6", "apps and the VPN's transport go by another gateway", "not heard")
@pytest.mark.parametrize("version", [4, 6])
async def test_redirects_are_not_heard(lab, version):
    """Neither for an excluded app nor for the VPN's transport, which all included ones need."""
    add_gateway(lab)
    gateway = str(ROUTER[4]) if version == 4 else await link_local(lab)
    lab.host.ip(f"route replace {'::/0' if version == 6 else 'default'} via {gateway} dev eth0 metric 1")
    async with (
        open_stage(lab, tunnel={"endpoint": "none"}) as stage,
        stage.app(stage.excluded) as excluded,
        stage.app(stage.included) as transport,
    ):
        await excluded(f"own = udp(SERVER{version})")
        await transport(f"own = udp(SERVER{version})\nown.setsockopt(1, 36, mark)", mark=addresses.TUNNEL_MARK)
        for app in (excluded, transport):
            for _ in range(5):
                assert not await is_redirected(lab, app, version, gateway)
    async with start_app(lab.host, stage.excluded) as anybody:
        await anybody(f"own = udp(SERVER{version})")

        async def redirected():
            return await is_redirected(lab, anybody, version, gateway)

        assert await until(redirected, "the control: the host hears of it")
