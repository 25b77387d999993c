"""Routes and rules in ip's words: ip makes of them what they were."""

import subprocess
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.hosts import batch, own_namespace, run
from tunsplit.engine.hostwords import route_words, rule_words
from tunsplit.host import SCOPE_HOST, SCOPE_LINK, Action, Route, RouteType, Rule
from tunsplit.kernel.rtnetlink import Rtnetlink

EVERYWHERE = ip_network("0.0.0.0/0")
ROUTE = Route(ip_network("10.9.0.0/16"), 7501, 2, scope=SCOPE_LINK, protocol=117)
ROUTE6 = Route(ip_network("2001:db8:9::/48"), 7501, 2, metric=7, protocol=117)
ROUTES = [
    ROUTE,
    replace(ROUTE, scope=SCOPE_HOST, metric=3),
    replace(ROUTE, destination=EVERYWHERE, scope=0, prefsrc=ip_address("192.168.9.1"), mtu=1300, advmss=1260),
    replace(ROUTE, scope=0, gateway=ip_address("192.168.9.7")),
    replace(ROUTE, scope=0, gateway=ip_address("192.168.77.7"), onlink=True),
    replace(ROUTE, scope=0, gateway=ip_address("fe80::7")),
    Route(EVERYWHERE, 7500, type=RouteType.UNREACHABLE, metric=9, protocol=117),
    ROUTE6,
    replace(ROUTE6, destination=ip_network("::/0"), gateway=ip_address("fe80::7")),
    Route(ip_network("::/0"), 7500, type=RouteType.UNREACHABLE, metric=9, protocol=117),
]
RULE = Rule(4, 75, table=7501, protocol=117)
RULES = [
    RULE,
    replace(RULE, family=6, iif="lo", fwmark=0x7501),
    replace(RULE, fwmark=0, iif="lo", oif="lo"),
    replace(RULE, source=ip_network("10.0.0.0/8"), to=ip_network("192.168.0.0/16")),
    replace(RULE, ipproto=17, sport=(68, 68), dport=(67, 70), uidrange=(0, 99)),
    replace(RULE, family=6, table=0, action=Action.UNREACHABLE),
]


@pytest.mark.netns
def test_ip_makes_the_routes_of_them():
    with own_namespace():
        run("ip", "link", "set", "lo", "up")
        batch("link add br9 type bridge\nlink set br9 up\naddress add 192.168.9.1/24 dev br9")
        found: list[Route] = []
        for route in ROUTES:
            made(route_words(route, {2: "br9"}))
            with Rtnetlink() as rtnetlink:
                found += rtnetlink.snapshot().routes_of(route.table)
            run("ip", f"-{route.family}", "route", "flush", "table", str(route.table))

        assert found == ROUTES


@pytest.mark.netns
def test_ip_makes_the_rules_of_them():
    with own_namespace():
        found: list[Rule] = []
        for rule in RULES:
            made(rule_words(rule))
            with Rtnetlink() as rtnetlink:
                found += [one for one in rtnetlink.snapshot().rules if one.protocol == 117]
            run("ip", f"-{rule.family}", "rule", "delete", "priority", "75")

        assert found == RULES


def made(words: str) -> None:
    done = subprocess.run(words.split(), capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr), words


def test_a_device_without_a_name_is_its_number():
    assert " dev 9 " in route_words(replace(ROUTE, oif=9), {})


def test_the_words_are_those_of_the_manual():
    assert "ip -4 rule add priority 75 from all lookup 7501 protocol 117" == rule_words(RULE)
    assert "ip -4 route add 10.9.0.0/16 dev br9 table 7501 protocol 117 scope link" == route_words(ROUTE, {2: "br9"})
