"""What is planned for a host, and words for it."""

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_interface

from tests.snapshots import (
    FORWARDED,
    HOST,
    TUN,
)
from tunsplit.engine.sides import beside, find_sides
from tunsplit.engine.steering import LAST_METRIC, Endpoint, SteeringSettings, plan
from tunsplit.host import Address, HostPlan, IPAddress, Link, Route, RouteType, Rule, Snapshot, TunFacts

RELAY = Endpoint(ip_address("203.0.113.10"), 51820, 17)
RELAY6 = Endpoint(ip_address("2001:db8:113::10"), 443, 6)
SETTINGS = SteeringSettings(tunnel="wg0", fwmark=51820, endpoints=(RELAY,))
LAN = replace(SETTINGS, lan_allow=True)
DOCKER = Link(7, "docker0", 1500, kind="bridge")
WITH_GUESTS = replace(
    HOST, links=(*HOST.links, DOCKER), addresses=(*HOST.addresses, Address(7, ip_interface("172.17.0.1/16")))
)
ADDRESSES = (ip_interface("10.128.0.1/32"), ip_interface("2001:2:0:5::1/128"))


def planned(
    snapshot: Snapshot = HOST, settings: SteeringSettings = SETTINGS, *, tunnel_addresses: Iterable[IPAddress] = ()
) -> HostPlan:
    sides = find_sides(snapshot, tunnel=settings.tunnel, uplink=settings.uplink, tun=TUN.name)
    tuns = TunFacts(TUN, ADDRESSES), TunFacts(FORWARDED, beside(ADDRESSES))
    return plan(settings, snapshot, sides, *tuns, tunnel_addresses=tunnel_addresses)


def table(wanted: HostPlan, number: int) -> list[str]:
    """The routes of a table as words, without those that close."""
    return [words(route) for route in wanted.routes if route.table == number and route.metric != LAST_METRIC]


def words(route: Route) -> str:
    text = str(route.destination) if route.destination.prefixlen else f"default{route.family}"
    if route.type != RouteType.UNICAST:
        text = f"{route.type.name.lower()} {text}"
    if route.gateway:
        text += f" via {route.gateway}"
    return text + (f" dev {route.oif}" if route.oif else "") + (" onlink" if route.onlink else "")


def rules(wanted: HostPlan, priority: int, family: int = 4) -> list[Rule]:
    return [rule for rule in wanted.rules if rule.priority == priority and rule.family == family]
