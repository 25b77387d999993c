"""The tables' text: what is in it, and that nft takes every variant of it."""

import re
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.hosts import own_namespace
from tunsplit.engine.nftsets import address_sets
from tunsplit.engine.ruleset import COUNTERS, RulesetFacts, guard, rulesets
from tunsplit.errors import KernelError
from tunsplit.kernel import nft
from tunsplit.kernel.nftguard import Guard
from tunsplit.names import MARK_TUNNEL, MARK_UPLINK

RELAY, RELAY6 = ip_address("203.0.113.10"), ip_address("2001:db8:113::10")
TYPICAL = RulesetFacts(
    uplinks=("eth0",),
    tunnel="wg0",
    tun="tunsplit0",
    forwarded="tunsplit1",
    tun_addresses=(ip_address("10.128.0.1"), ip_address("2001:2:0:5::1")),
    fwmark=51820,
    endpoints=((RELAY, 17, 51820),),
)
LAN = replace(
    TYPICAL,
    lan_allow=True,
    lan_networks=(ip_network("192.168.50.0/24"), ip_network("fd50::/64")),
    lan_holes=(ip_network("192.168.50.9/32"),),
)
GUESTS = replace(
    TYPICAL,
    forwarded_addresses=(ip_address("10.128.0.5"), ip_address("2001:2:0:5::5")),
    guests=("docker0", "virbr0"),
)
VARIANTS = {
    "typical": TYPICAL,
    "lan": LAN,
    "discovery": replace(LAN, lan_discovery=True),
    "lan without an uplink": replace(LAN, uplinks=(), lan_networks=(), lan_holes=()),
    "overlapping local networks": replace(LAN, lan_networks=(ip_network("10.0.0.0/8"), ip_network("10.1.0.0/16"))),
    "no uplink": replace(TYPICAL, uplinks=()),
    "guests": GUESTS,
    "guests without the firewall": replace(GUESTS, firewall=False),
    "bridges": replace(TYPICAL, uplinks=("br0",), bridges=("br0", "docker0")),
    "two uplinks": replace(TYPICAL, uplinks=("eth0", "wlan0")),
    "no firewall": replace(TYPICAL, firewall=False),
    "no addresses": replace(TYPICAL, tun_addresses=()),
    "mark alone": replace(TYPICAL, endpoints=()),
    "endpoints": replace(TYPICAL, fwmark=None, endpoints=((RELAY, 17, 1194), (RELAY6, 6, 443)), transport_uids=(0, 99)),
    "no transport": replace(TYPICAL, fwmark=None, endpoints=()),
    "odd names": replace(TYPICAL, uplinks=("br-lan.7@x", "a:b+c"), tunnel="tun=0"),
}


SETS = address_sets([ip_address("10.64.0.2"), ip_address("fd64::2")])


def chain(name: str, facts: RulesetFacts = TYPICAL) -> list[str]:
    """The rules of a chain."""
    body = rulesets(facts)["inet"]
    return body.split(f"chain {name} {{\n", 1)[1].split("}\n", 1)[0].replace("\t", "").splitlines()


@pytest.mark.netns
@pytest.mark.parametrize("facts", VARIANTS.values(), ids=VARIANTS)
def test_nft_takes_it_and_takes_it_again(facts):
    with own_namespace():
        nft.apply(rulesets(facts), anew=True, sets=SETS)
        first = nft.listing(), nft.listing("arp")
        nft.apply(rulesets(facts), anew=False, sets=SETS)

        assert first == (nft.listing(), nft.listing("arp"))
        with Guard() as guarding:
            assert facts.firewall == guarding.apply(guard(facts))


def test_nothing_of_the_text_changes_with_the_tunnels_addresses():
    assert {"inet": {"tunnel4": (), "tunnel6": ()}, "arp": {"tunnel4": ()}} == address_sets([])
    assert {"inet": {"tunnel4", "tunnel6"}, "arp": {"tunnel4"}} == {
        family: set(re.findall(r"@(tunnel\d)", body)) for family, body in rulesets(TYPICAL).items()
    }


def test_the_guard_is_the_firewall_once_more():
    twin = []
    for name in ("outgoing", "incoming", "forwarded"):
        hook, *rules = (re.sub(r"counter name \w+ ", "", line) for line in chain(name))
        twin.append(f"add chain inet tunsplit_guard {name} {{ {hook.replace('filter;', 'filter + 1;')} }}")
        twin += [f"add rule inet tunsplit_guard {name} {rule}" for rule in rules]

    assert twin == guard(TYPICAL).splitlines()
    assert "" == guard(replace(TYPICAL, firewall=False))


@pytest.mark.parametrize("name", ['eth"0', "eth*", "e\\0", "a{b}", "a;b", ""])
def test_a_name_that_nft_cannot_hold_is_an_error_and_no_rule(name):
    with pytest.raises(KernelError, match="rename the device"):
        rulesets(replace(TYPICAL, uplinks=(name,)))


def test_the_firewalls_chains_alone_are_left_out_without_it():
    with_it, without = rulesets(TYPICAL)["inet"], rulesets(replace(TYPICAL, firewall=False))["inet"]
    with_it = with_it.replace("\tmeta l4proto tcp accept\n", "", 1)  # what is left to it to refuse

    assert with_it.startswith(without)
    assert ["outgoing", "incoming", "forwarded"] == re.findall(r"chain (\w+)", with_it.removeprefix(without))


@pytest.mark.parametrize("name", ["outgoing", "incoming", "forwarded"])
def test_the_firewall_drops_what_nobody_thought_of(name):
    assert chain(name)[0].endswith("policy drop;")


def test_only_loopback_and_the_tun_are_open_by_themselves():
    rules = chain("outgoing")[1:]

    assert 'oifname { "lo", "tunsplit0" } accept' == rules[0]
    assert [] == [
        rule for rule in rules[1:] if rule.endswith("accept") and "counter" not in rule and "mark" not in rule
    ]


def test_every_rule_of_the_way_out_counts_but_those_of_loopback_and_the_tun():
    assert [rule for rule in chain("outgoing", LAN)[3:] if "counter name" not in rule] == []


def test_what_is_counted_has_a_counter():
    bodies = "".join(rulesets(facts)["inet"] for facts in VARIANTS.values())

    assert set(COUNTERS) == set(re.findall(r"counter name (\w+)", bodies))


def test_the_order_is_that_of_the_design():
    """DESIGN.md, "The firewall"."""
    facts = replace(LAN, fwmark=None, endpoints=((RELAY, 17, 51820),))
    found = re.findall(r"counter name (\w+)", "\n".join(chain("outgoing", facts)))

    assert list(dict.fromkeys(found)) == [
        "accepted_own", "rejected_transport", "accepted_transport", "accepted_dhcp", "accepted_neighbours",
        "accepted_membership", "rejected_dns", "rejected_header", "rejected_discovery", "rejected_hole",
        "accepted_lan", "rejected",
    ]  # fmt: skip


def test_what_steers_and_what_refuses_agree():
    """The first would otherwise send into the tun what the second lets out, or refuse what nobody has steered."""
    refused = {rule.removesuffix(" return") for rule in chain("may_leave", LAN) if rule.endswith("return")}
    accepted = {rule.removesuffix(" accept") for rule in chain("may_leave", LAN) if rule.endswith("accept")}
    rules = [rule.split(" counter name ") for rule in chain("outgoing", LAN)[3:-2]]

    assert refused == {match for match, end in rules if end.endswith("reject")}
    assert accepted == {match for match, end in rules if end.endswith("accept")}


def test_a_bridge_may_switch_its_own_frames_only():
    assert ['iifname { "br0" } oifname { "br0" } accept', 'iifname { "docker0" } oifname { "docker0" } accept'] == [
        rule for rule in chain("forwarded", VARIANTS["bridges"]) if rule.endswith("accept")
    ]
    assert [] == [rule for rule in chain("forwarded") if rule.endswith("accept")]


def test_only_guests_and_their_tun_forward_to_each_other():
    accepted = [rule for rule in chain("forwarded", GUESTS) if rule.endswith("accept")]

    assert [
        'iifname { "docker0", "virbr0" } oifname { "tunsplit1" } counter name accepted_forwarded accept',
        'iifname { "tunsplit1" } oifname { "docker0", "virbr0" } counter name accepted_forwarded accept',
    ] == accepted


def test_the_tun_of_forwarded_packets_is_nobodys_elses():
    """Neither does this host send by it, with or without the firewall, nor does anything come in by it for the host."""
    for facts in (GUESTS, VARIANTS["guests without the firewall"]):
        assert ["type filter hook output priority filter; policy accept;", *(
            'oifname { "tunsplit1" } ' + word
            for word in ("meta l4proto tcp counter name rejected reject with tcp reset", "counter name rejected reject")
        )] == chain("unforwarded", facts)  # fmt: skip
        assert 'iifname { "tunsplit1" } counter name arrived_elsewhere drop' in chain("arrived", facts)
        assert 'oifname { "tunsplit0" } ct status snat counter name rewritten drop' in chain("unwritten", facts)
        elsewhere = 'ip daddr { 10.128.0.5 } iifname != { "lo", "tunsplit0", "tunsplit1" }'
        assert f"{elsewhere} counter name arrived_for_other_side drop" in chain("arrive", facts)


def test_what_we_have_written_passes_at_once_what_is_for_others():
    for name in ("arrive", "arrived"):
        assert 'iifname { "tunsplit0" } accept' == chain(name)[1]
    assert 'iifname != { "eth0", "wg0" } accept' == chain("replies")[1]


def test_what_the_kernel_answers_to_strangers_does_not_fill_the_tun():
    """But a listener's word, so many a second, and what comes from resolvers of our own, by the tun's address."""
    into, drop = 'oifname { "tunsplit0" } ', " counter name answered_nobody drop"
    own = {"ip": "10.128.0.1", "ip6": "2001:2:0:5::1"}
    for facts, others in (
        (TYPICAL, [f"{family} saddr != {{ {address} }}" for family, address in own.items()]),
        (VARIANTS["no addresses"], ["meta nfproto ipv4", "meta nfproto ipv6"]),
    ):
        assert [
            f"{into}icmp type echo-reply{drop}",
            f"{into}icmpv6 type echo-reply{drop}",
            *(
                f"{into}{other} {word}{drop}"
                for other in others
                for word in (
                    "tcp flags rst ct direction reply ct status and assured == 0",
                    "tcp flags & (syn | ack) == syn | ack limit rate over 500/second burst 100 packets",
                )
            ),
        ] == chain("unanswered", facts)[1:]


def test_guests_are_told_of_errors_and_of_nothing_else():
    told = [rule for rule in chain("outgoing", GUESTS) if "docker0" in rule]

    assert 2 == len(told)
    assert all("accepted_guests" in rule and "destination-unreachable" in rule for rule in told)
    assert [] == [rule for rule in chain("incoming", GUESTS) if "docker0" in rule]


def test_names_come_before_the_local_network():
    rules = chain("may_leave", LAN)
    names = rules.index("meta l4proto { tcp, udp } th dport { 53, 853 } return")

    assert all("lan" not in rule and "192.168" not in rule for rule in rules[:names])
    assert [rule for rule in rules[names:] if "192.168.50.0/24" in rule]


def test_the_local_network_takes_the_uplinks_own_address_only():
    accepted = [rule for rule in chain("may_leave", LAN) if "fib saddr . oif type local accept" in rule]

    assert 4 == len(accepted)
    assert all(rule.startswith('oifname { "eth0" }') for rule in accepted)


def test_what_names_another_way_or_quotes_a_question_does_not_leave():
    """L32, L37: nor to the local network."""
    rules = chain("may_leave", LAN)
    refused = [
        "icmp type destination-unreachable @th,224,16 { 53, 853 } return",
        "icmpv6 type destination-unreachable @th,384,16 { 53, 853 } return",
        "ip hdrlength > 5 return",
        "exthdr rt exists return",
    ]
    first_local = next(number for number, rule in enumerate(rules) if "192.168.50.0/24" in rule)

    assert all(rules.index(rule) < first_local for rule in refused)


def test_our_own_sockets_are_known_by_mark_device_and_owner_together():
    """L33; and no socket takes a mark of ours from what comes in (tcp_fwmark_accept)."""
    assert [
        f'oifname {{ "eth0" }} meta mark {MARK_UPLINK:#x} meta skuid 0 accept',
        f'oifname {{ "wg0" }} meta mark {MARK_TUNNEL:#x} meta skuid 0 accept',
    ] == chain("may_leave")[:2]
    assert [
        f'iifname {{ "eth0" }} meta mark {MARK_UPLINK:#x} meta mark set 0',
        f'iifname {{ "wg0" }} meta mark {MARK_TUNNEL:#x} meta mark set 0',
    ] == chain("arrived")[-2:]


def test_the_transport_is_exact():
    assert ['oifname { "eth0" } meta mark 0xca6c ip daddr 203.0.113.10 meta l4proto 17 th dport 51820 accept'] == [
        rule for rule in chain("may_leave") if "ca6c" in rule
    ]


def test_a_foreign_owner_is_refused_before_the_endpoint_is_accepted():
    rules = [rule for rule in chain("may_leave", VARIANTS["endpoints"]) if "1194" in rule]

    assert ["meta skuid != { 0, 99 } return", "1194 accept"] == [rules[0][-30:], rules[1][-11:]]
    assert [] == [rule for rule in chain("may_leave") if "skuid !=" in rule]


def test_discovery_is_refused_unless_it_is_allowed():
    assert [rule for rule in chain("may_leave", LAN) if "5355" in rule]
    assert not [rule for rule in chain("may_leave", VARIANTS["discovery"]) if "5355" in rule]


def test_what_comes_by_the_tunnel_is_for_the_tunnels_address_and_not_in_the_local_networks_name():
    """L20, L37; what is no local network's own, though it lies within, may well come from there."""
    expected = [
        'iifname { "wg0" } fib daddr type local fib daddr . iif type != local counter name arrived_for_other_side drop',
        'iifname { "wg0" } ip saddr { 192.168.50.0/24 } ip saddr != { 192.168.50.9/32 } '
        "counter name arrived_forged drop",
        'iifname { "wg0" } ip6 saddr { fd50::/64 } counter name arrived_forged drop',
    ]
    facts = replace(LAN, lan_networks=(*LAN.lan_networks, ip_network("fe80::/64")))

    assert expected == [rule for rule in chain("arrive", facts) if "drop" in rule and "iifname !=" not in rule]
    assert [expected[0]] == [rule for rule in chain("arrive") if "drop" in rule and "iifname !=" not in rule]
