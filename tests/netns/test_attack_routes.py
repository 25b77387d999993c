"""Whoever may put routes into the host takes apps to another side, but not where tunsplit runs (L25).

Each attack is carried out three times: on a host whose VPN has led everything into the tunnel by routes in main, as
OpenVPN's clients do (the control), and beside tunsplit on an included and on an excluded app. What they say is told by
nonces and by addresses that nobody else was told, on every wire, the questions of ARP and neighbour discovery included.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import pytest

from tests.netns import attacker
from tests.netns.attacker import AUTONOMOUS, ON_LINK, Wires, lines
from tests.netns.stage import ROUTER, open_stage, start_app, until
from tests.netns.third import DEVICE, NEIGHBOUR, OWN, open_third
from tunsplit.lab import Lab, addresses

pytestmark = [pytest.mark.netns, pytest.mark.lab(tunnel_kind="veth")]

# Where apps talk to, and what more is on the uplink's network.
INTERNET = {4: "198.51.100.0/24", 6: "2001:db8:100::/48"}
LAN = {4: "192.168.50.0/25", 6: "2001:db8:50::/65"}
ON_LAN = {4: "192.168.50.", 6: "2001:db8:50::"}
BEHIND_RELAY = {4: "10.64.0."}
# OpenVPN's redirect-gateway, for both families.
VPN_DEFAULT = lines(f"route add {half} dev wg0" for half in ("0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"))
# wg-quick's AllowedIPs of those who leave private addresses out; OpenVPN's redirect-gateway ipv6; a company's net.
VPN_PUSHED = (
    "0.0.0.0/5", "8.0.0.0/7", "11.0.0.0/8", "12.0.0.0/6", "16.0.0.0/4", "32.0.0.0/3", "64.0.0.0/2", "128.0.0.0/3",
    "160.0.0.0/5", "168.0.0.0/6", "172.0.0.0/12", "172.32.0.0/11", "172.64.0.0/10", "173.0.0.0/8", "174.0.0.0/7",
    "176.0.0.0/4", "192.0.0.0/9", "192.128.0.0/11", "192.160.0.0/13", "192.169.0.0/16", "192.170.0.0/15",
    "192.172.0.0/14", "192.176.0.0/12", "192.192.0.0/10", "193.0.0.0/8", "194.0.0.0/7", "196.0.0.0/6", "200.0.0.0/5",
    "208.0.0.0/4", "::/3", "2000::/4", "3000::/4", "fc00::/7", "10.0.0.0/8", *LAN.values(),
)  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """`carry_out` does it, for as long as its block lasts; `shows` in main, by IP version, when it has taken effect.

    Without tunsplit it takes an app to another wire, of `victim`'s kind, on its way to addresses that begin like
    `near`, else to anybody.
    """

    name: str
    without: str
    against: str
    carry_out: Callable[[Lab], AbstractContextManager[None]]
    shows: dict[int, str]
    takes_to: str = "uplink"
    victim: str = "included"
    near: dict[int, str] = field(default_factory=dict)
    excluded_on: str = "uplink"

    def whom(self, version: int, number: int) -> str:
        """Whom an app talks to that is to be taken elsewhere; empty: anybody."""
        return f"{self.near[version]}{70 + number}" if self.near else ""


@contextmanager
def by_dhcp(lab: Lab) -> Iterator[None]:
    """Option 121 as a client carries it out, and the same by IPv6."""
    routes = [
        f"{INTERNET[4]} via {ROUTER[4]} dev eth0 proto dhcp",
        f"{INTERNET[6]} via {ROUTER[6]} dev eth0 proto ra",
    ]
    lab.host.ip(lines(f"route add {one}" for one in routes))
    yield
    lab.host.ip(lines(f"route delete {one}" for one in routes))


@contextmanager
def by_mask(lab: Lab) -> Iterator[None]:
    """An address with a mask of two bits: a quarter of the world is on the link."""
    lab.host.ip("address add 192.168.50.3/2 dev eth0")
    yield
    lab.host.ip("address delete 192.168.50.3/2 dev eth0")


@contextmanager
def by_address(lab: Lab) -> Iterator[None]:
    """The address that the host has in the tunnel, and a network around it."""
    address = f"{addresses.HOST_TUNNEL[4].ip}/24"
    lab.host.ip(f"address add {address} dev eth0")
    yield
    lab.host.ip(f"address delete {address} dev eth0")


@contextmanager
def by_prefix(lab: Lab) -> Iterator[None]:
    """A router's word that all of IPv6 is on the link."""
    attacker.advertise(lab.router, "lan0", attacker.prefix("2000::/3", ON_LINK))
    yield
    attacker.advertise(lab.router, "lan0", attacker.prefix("2000::/3", ON_LINK, lifetime_s=0))


@contextmanager
def by_route_information(lab: Lab) -> Iterator[None]:
    """A router's word for a route; kernels take it where they are told to, network managers always."""
    lab.host.sysctl({"net/ipv6/conf/eth0/accept_ra_rt_info_max_plen": 64})
    attacker.advertise(lab.router, "lan0", attacker.route(INTERNET[6]))
    yield
    attacker.advertise(lab.router, "lan0", attacker.route(INTERNET[6], lifetime_s=0))


@contextmanager
def by_second_card(lab: Lab) -> Iterator[None]:
    """A card that is plugged in, with the best default and with routes of its own."""
    lab.host.ip(
        f"link set {DEVICE} up\naddress add {OWN[4]}/24 dev {DEVICE}\naddress add {OWN[6]}/64 dev {DEVICE} nodad\n"
        + lines(f"route add {to} via {NEIGHBOUR[version]} dev {DEVICE}" for version, to in INTERNET.items())
        + f"route add default via {NEIGHBOUR[4]} dev {DEVICE} metric 5\n"
        f"route add ::/0 via {NEIGHBOUR[6]} dev {DEVICE} metric 5\n"
    )
    yield
    lab.host.ip(f"address flush dev {DEVICE}\nlink set {DEVICE} down")


@contextmanager
def by_the_vpn(lab: Lab) -> Iterator[None]:
    """What a VPN's server, or who has configured its client, can have put into main."""
    lab.host.ip(lines(f"route add {to} dev wg0 metric 3" for to in VPN_PUSHED))
    yield
    lab.host.ip(lines(f"route delete {to} dev wg0 metric 3" for to in VPN_PUSHED))


IN_CLEAR = "apps of the VPN send in clear by the uplink"
STAYS = "included apps in the tunnel, excluded ones on the uplink"
ATTACKS = [
    Attack("DHCP: routes of option 121, and IPv6's like", IN_CLEAR, STAYS, by_dhcp, INTERNET),
    Attack("DHCP: a mask of /2", "apps of the VPN ask for servers by ARP", STAYS, by_mask, {4: "192.0.0.0/2"}),
    Attack(
        "DHCP: the tunnel's own address", "apps of the VPN ask for its hosts by ARP", STAYS, by_address,
        {4: "10.64.0.0/24 dev eth0"}, near=BEHIND_RELAY,
    ),
    Attack(
        "router advertisement: prefix 2000::/3", "apps of the VPN ask for servers by neighbour discovery", STAYS,
        by_prefix, {6: "2000::/3"},
    ),
    Attack(
        "router advertisement: route information", IN_CLEAR, STAYS, by_route_information, {6: INTERNET[6]},
    ),
    Attack(
        "a second card with a better default and routes", "apps of the VPN send in clear by it",
        "included apps in the tunnel; it is the uplink", by_second_card, INTERNET,
        takes_to="other 1", excluded_on="other 1",
    ),
    Attack(
        "the VPN pushes all there is, the LAN too", "the LAN is in the tunnel", STAYS, by_the_vpn,
        {4: "172.64.0.0/10", 6: "2000::/4"}, takes_to="tunnel", victim="excluded", near=ON_LAN,
    ),
]  # fmt: skip


async def takes_effect(lab: Lab, attack: Attack) -> None:
    """Wait until main has it."""

    async def shows() -> bool:
        for version, words in attack.shows.items():
            if words not in (await lab.host.run(["ip", f"-{version}", "route", "show"])).stdout:
                return False
        return True

    await until(shows, f"main has {attack.shows}")


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(one, marks=pytest.mark.attack(one.name, one.without, one.against), id=one.carry_out.__name__)
        for one in ATTACKS
    ],
)
async def test_routes_of_others_move_nobody(lab, attack):
    lab.host.ip(
        f"{VPN_DEFAULT}route add default via {ROUTER[4]} dev eth0 metric 100\nroute delete default metric 0\n"
        f"route add ::/0 via {ROUTER[6]} dev eth0 metric 2000\nroute delete ::/0 metric 1024\n"
    )
    async with open_third(lab, plugged=False) as third, start_app(lab.host, lab.copy_program("python", "app")) as app:
        lab.router.ip(f"link set {DEVICE} netns {lab.host.name}")
        wires = Wires(lab, third)
        for version in attack.shows:
            expected = {"tunnel" if attack.victim == "included" else "uplink"}
            assert expected == await wires.said(app, version, to=attack.whom(version, 0))
        with attack.carry_out(lab):
            await takes_effect(lab, attack)
            for version in attack.shows:
                assert {attack.takes_to} == await wires.said(app, version, to=attack.whom(version, 1)), "the control"

        async with (
            open_stage(lab) as stage,
            stage.app(stage.included) as included,
            stage.app(stage.excluded) as excluded,
        ):
            with attack.carry_out(lab):
                await takes_effect(lab, attack)
                for version in attack.shows:
                    to = attack.whom(version, 2) if attack.victim == "included" else ""
                    assert {"tunnel"} == await wires.said(included, version, to=to)
                    await wires.said_on(attack.excluded_on, excluded, version, to=attack.whom(version, 3))
                    assert {"tunnel"} == await wires.said(included, version)


@pytest.mark.attack(
    "a router advertisement in the tunnel", "the host takes an address and routes", "not heard: excluded apps stay"
)
async def test_nobody_advertises_in_the_tunnel(lab):
    """L25: the VPN's server, or whoever gets a packet into the tunnel's device."""
    more = "2001:db8:77::/64"

    def advertise():
        own = attacker.prefix(more, ON_LINK | AUTONOMOUS)
        attacker.advertise(lab.relay, "wg0", own, attacker.prefix("2001:db8:100::/64", ON_LINK), lifetime_s=1800)

    async def is_taken():
        return "2001:db8:77:" in (await lab.host.run(["ip", "-6", "address", "show", "dev", "wg0"])).stdout

    wires = Wires(lab)
    async with open_stage(lab) as stage, stage.app(stage.excluded) as excluded, stage.app(stage.included) as included:
        for _ in range(3):
            advertise()
            await wires.said_on("uplink", excluded, 6)
            assert {"tunnel"} == await wires.said(included, 6)
        assert 3 <= len([seen for seen in lab.tunnel.seen("ndp") if seen.kind == 134 and seen.direction == "in"])
        assert not await is_taken()
    advertise()
    assert await until(is_taken, "the control: the host takes an address")
    async with start_app(lab.host, stage.excluded) as app:
        assert {"tunnel"} == await wires.said(app, 6)
