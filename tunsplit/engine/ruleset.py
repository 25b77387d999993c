"""The bodies of our nftables tables, in nft's words.

Theory of operation. The tables stand under routing and outlive the process. They do eight things:

    arrive    what comes in by a device: nothing for addresses that others are not to know, nor in others' name; a mark
              for strict rp_filter
    replies   answers to NAT's own flows end here: packet sockets have seen them, the kernel knows no such flow
    steer     what names a side's device without being bound to it goes into the tun after all
    unwritten what somebody's NAT has given another source does not enter the tun: it would be taken for another's
    unforwarded, fitted
              what this host itself sends never looks like a guest's; guests' connections hear what their tun takes
    outgoing  nothing leaves by a device but what may; refused before ARP asks for anybody
    incoming, forwarded
              nothing comes in by a device that is no side, nothing is passed on but between guests and their tun

A device is closed unless it is named: what appears at run time is, from its first moment. The last three are the
firewall, whose order DESIGN.md explains; without it ("enabled = false") the others stay.

The sets of live ports belong to the running NAT: they, and the counters, outlive the rules when the text changes. So do
the tunnel's addresses, which change without the text: a tunnel that comes back is not to wait for it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tunsplit.engine import strangers
from tunsplit.engine.nftsets import SET_ECHO4, SET_ECHO6, SET_TCP, SET_UDP, SETS_TUNNEL, live_sets, tunnel_sets
from tunsplit.engine.nftwords import address_matches, chain_commands, chain_words, device_set, family_word, listed
from tunsplit.host import IPAddress, IPNetwork
from tunsplit.names import MARK_STEER, MARK_TUNNEL, MARK_UPLINK, NFT_GUARD

COUNTERS = (
    "arrived_for_other_side",
    "arrived_forged",
    "arrived_elsewhere",
    "arrived_redirects",
    "forwarded",
    "replies",
    "accepted_own",
    "accepted_transport",
    "accepted_dhcp",
    "accepted_neighbours",
    "accepted_membership",
    "accepted_lan",
    "accepted_guests",
    "accepted_forwarded",
    "rejected",
    "rejected_transport",
    "rejected_dns",
    "rejected_header",
    "rejected_discovery",
    "rejected_hole",
    "steered_unrouted",
    "rewritten",
    "answered_nobody",
)

# What finds names and opens ports: NetBIOS names, NAT-PMP and PCP, SSDP, LLMNR.
DISCOVERY_PORTS = "{ 137, 138, 1900, 5350, 5351, 5355 }"

# A client's ports and the server's (RFC 2131 §4.1, RFC 8415 §7.2), and its first words, before it knows of a server.
DHCP = DHCP4, DHCP6 = "udp sport 68 udp dport 67", "udp sport 546 udp dport 547"
DHCP_TO_ALL = (("ip daddr 255.255.255.255", DHCP4), ("ip6 daddr ff02::1:2", DHCP6))
NEIGHBOURS = "{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }"
NEIGHBOURS_IN = "{ nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert }"
# What the kernel tells a guest of what it cannot forward.
ERRORS = (
    "icmp type { destination-unreachable, time-exceeded, parameter-problem }",
    "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }",
)
MEMBERSHIP = "{ mld-listener-report, mld-listener-done, mld2-listener-report }"

COUNTED = re.compile(r"counter name \w+ ?")


class Leaving(NamedTuple):
    """What is to become of a packet that is about to leave: the match in nft's words, and what counts it."""

    match: str
    counter: str

    @property
    def may(self) -> bool:
        """Whether it may leave."""
        return self.counter.startswith("accepted")


@dataclass(frozen=True, slots=True)
class RulesetFacts:
    """What the table depends on. Devices are names: the table holds for them also before they exist."""

    uplinks: tuple[str, ...]
    tunnel: str
    tun: str
    forwarded: str  # the tun of forwarded packets
    guests: tuple[str, ...] = ()  # devices that they are behind
    bridges: tuple[str, ...] = ()
    tun_addresses: tuple[IPAddress, ...] = ()
    forwarded_addresses: tuple[IPAddress, ...] = ()
    fwmark: int | None = None
    endpoints: tuple[tuple[IPAddress, int, int], ...] = ()  # address, protocol number, port
    transport_uids: tuple[int, ...] = (0,)
    lan_allow: bool = False
    lan_networks: tuple[IPNetwork, ...] = ()
    lan_holes: tuple[IPNetwork, ...] = ()
    lan_discovery: bool = False
    firewall: bool = True
    uid: int = 0


@lru_cache(maxsize=1)
def rulesets(facts: RulesetFacts) -> Mapping[str, str]:
    """Write the body of our table of each family, `inet` and `arp`.

    Raises:
        KernelError: a device has a name that nft's language cannot hold.
    """
    parts = [
        *(f"counter {name} {{\n}}\n" for name in COUNTERS),
        live_sets(),
        tunnel_sets("inet"),
        # Earlier than conntrack and than what distributions hang at raw (-300): firewalld's own reverse-path test
        # honours the mark too.
        chain_words("arrive", "type filter hook prerouting priority -310", _arrive(facts)),
        chain_words("arrived", "type filter hook input priority -310", _arrived(facts)),
        # Right after conntrack (-200).
        chain_words("replies", "type filter hook prerouting priority -199", _replies(facts)),
        chain_words("may_leave", "", _may_leave(facts)),
        chain_words("steer", "type route hook output priority mangle", _steer(facts)),
        chain_words("unsteered", "type filter hook postrouting priority filter", _unsteered(facts)),
        chain_words("unwritten", "type filter hook postrouting priority srcnat + 10", _unwritten(facts)),
        strangers.chain(facts.tun, facts.tun_addresses),
        chain_words("unforwarded", "type filter hook output priority filter", _unforwarded(facts)),
        chain_words("fitted", "type filter hook forward priority mangle", _fitted(facts)),
    ]
    parts += [
        chain_words(name, f"type filter hook {hook} priority filter", rules, policy="drop")
        for name, hook, rules in _firewall(facts)
    ]
    arp = chain_words("arrive", "type filter hook input priority -310", _arrive_arp(facts))
    return {"inet": "".join(parts), "arp": tunnel_sets("arp") + arp}


@lru_cache(maxsize=1)
def guard(facts: RulesetFacts) -> str:
    """Write what fills the guard's table: the firewall once more, behind the first, without counters.

    Raises:
        KernelError: a device has a name that nft's language cannot hold.
    """
    chains = (
        chain_commands(f"inet {NFT_GUARD} {name}", f"type filter hook {hook} priority filter + 1", rules, policy="drop")
        for name, hook, rules in _firewall(facts)
    )
    return COUNTED.sub("", "".join(chains))


def _firewall(facts: RulesetFacts) -> Iterator[tuple[str, str, Iterator[str]]]:
    """Chains with their hooks and rules."""
    if facts.firewall:
        yield "outgoing", "output", _outgoing(facts)
        yield "incoming", "input", _incoming(facts)
        yield "forwarded", "forward", _forwarded(facts)


def _arrive(facts: RulesetFacts) -> Iterator[str]:
    uplinks, tunnel = device_set(facts.uplinks), device_set([facts.tunnel])
    yield _is_ours(facts)
    # What a neighbour on another network can send to the tunnel's address tells it of the tunnel's flows, and
    # injects into them (CVE-2019-14899). Before conntrack, so that nothing rewrites the address first.
    tunnels = (f"{family} daddr @{SETS_TUNNEL['inet'][version]}" for version, family in ((4, "ip"), (6, "ip6")))
    for within, matches in (
        ((), address_matches("daddr", facts.tun_addresses)),
        ((facts.forwarded,), address_matches("daddr", facts.forwarded_addresses)),
        ((facts.tunnel,), tunnels),
    ):
        elsewhere = f"iifname != {device_set([*_inner(facts), *within])}"
        for matched in matches:
            # The address first: to find a name in a set is dearer.
            yield f"{matched} {elsewhere} counter name arrived_for_other_side drop"
    # Likewise what comes by the tunnel for the uplink's: an excluded server would answer it there, and show the VPN's
    # server, or who is behind it, the way to this host beside the tunnel.
    yield (
        f"iifname {tunnel} fib daddr type local fib daddr . iif type != local counter name arrived_for_other_side drop"
    )
    yield from _forged(facts)
    # The mark takes part in the reverse-path look-up (src_valid_mark) and finds the side's own table, so that strict
    # rp_filter passes what a side may send. Others' marks stay: they may restore one from conntrack for the same end.
    if uplinks:
        yield f"iifname {uplinks} meta mark 0 meta mark set {MARK_UPLINK:#x}"
    yield f"iifname {tunnel} meta mark 0 meta mark set {MARK_TUNNEL:#x}"


def _is_ours(facts: RulesetFacts) -> str:
    """What comes out of the tun we have written: nothing here is for it, and it is to take no longer than it must."""
    return f"iifname {device_set([facts.tun])} accept"


def _forged(facts: RulesetFacts) -> Iterator[str]:
    # The mark below lets a side's packets pass the reverse-path test whoever they say they are from. With the local
    # network open to included apps, their answers to its name would leave there. A link-local address is everybody's.
    for version, family in ((4, "ip"), (6, "ip6")):
        own = [one for one in facts.lan_networks if one.version == version and not one.is_link_local]
        holes = [one for one in facts.lan_holes if one.version == version]
        if own:
            but = f" {family} saddr != {{ {listed(holes)} }}" if holes else ""
            forged = f"{family} saddr {{ {listed(own)} }}{but}"
            yield f"iifname {device_set([facts.tunnel])} {forged} counter name arrived_forged drop"


def _arrive_arp(facts: RulesetFacts) -> Iterator[str]:
    # By itself the kernel answers on any device for all of its addresses.
    tuns = (*facts.tun_addresses, *facts.forwarded_addresses)
    if own := [address for address in tuns if address.version == 4]:
        yield f"arp daddr ip {{ {listed(own)} }} drop"
    yield f"iifname != {device_set([facts.tunnel])} arp daddr ip @{SETS_TUNNEL['arp'][4]} drop"
    # A neighbour's question passes the reverse-path test too (net/ipv4/arp.c, arp_process): unmarked, under a strict
    # one, the host would answer nobody.
    if uplinks := device_set(facts.uplinks):
        yield f"iifname {uplinks} meta mark 0 meta mark set {MARK_UPLINK:#x}"
    yield f"iifname {device_set([facts.tunnel])} meta mark 0 meta mark set {MARK_TUNNEL:#x}"


def _arrived(facts: RulesetFacts) -> Iterator[str]:
    yield _is_ours(facts)
    # An answer to a guest of whom conntrack knows no more; no socket of this host has asked.
    yield f"iifname {device_set([facts.forwarded])} counter name arrived_elsewhere drop"
    # Another way for one destination, which every table's routes would take up (net/ipv4/route.c, __ip_do_redirect): a
    # neighbour could cut the VPN's transport off.
    sides = device_set([*facts.uplinks, facts.tunnel])
    for redirect in ("icmp type redirect", "icmpv6 type nd-redirect"):
        yield f"iifname {sides} {redirect} counter name arrived_redirects drop"
    # The look-up is over. A socket that takes its mark from what comes in (tcp_fwmark_accept, fwmark_reflect) would
    # answer with ours, beside the tun.
    for device, mark in ((device_set(facts.uplinks), MARK_UPLINK), (device_set([facts.tunnel]), MARK_TUNNEL)):
        if device:
            yield f"iifname {device} meta mark {mark:#x} meta mark set 0"


def _replies(facts: RulesetFacts) -> Iterator[str]:
    yield f"iifname != {device_set([*facts.uplinks, facts.tunnel])} accept"
    # The kernel would answer with RST, port unreachable, or deliver an echo reply twice. Its own flows and sockets in
    # the range live on: they are in conntrack, or their port is not in the set.
    new = "ct state != { established, related }"
    yield f"{new} tcp dport @{SET_TCP} counter name replies drop"
    yield f"{new} udp dport @{SET_UDP} counter name replies drop"
    yield f"{new} icmp type echo-reply icmp id @{SET_ECHO4} counter name replies drop"
    yield f"{new} icmpv6 type echo-reply icmpv6 id @{SET_ECHO6} counter name replies drop"


def _leaving(facts: RulesetFacts) -> Iterator[Leaving]:
    """What may leave by a device other than lo and the tun, and what may not; what is left may not either."""
    uplinks, tunnel = device_set(facts.uplinks), device_set([facts.tunnel])
    # Our own sockets, by mark, device and owner: none of them opens anything alone.
    if uplinks:
        yield Leaving(f"oifname {uplinks} meta mark {MARK_UPLINK:#x} meta skuid {facts.uid}", "accepted_own")
    yield Leaving(f"oifname {tunnel} meta mark {MARK_TUNNEL:#x} meta skuid {facts.uid}", "accepted_own")
    if uplinks:
        yield from (Leaving(f"oifname {uplinks} {match}", counter) for match, counter in _transport(facts))
        # DHCP: privileged ports at both ends.
        yield from (Leaving(f"oifname {uplinks} {ports}", "accepted_dhcp") for ports in DHCP)
    # To all on the link, and neighbour discovery, for which the hop limit proves that it stays there (RFC 4861 §6.1,
    # §7.1): by any device, or none that is new could become the uplink.
    for to, ports in DHCP_TO_ALL:
        yield Leaving(f"oifname != {tunnel} {to} {ports}", "accepted_dhcp")
    yield Leaving(f"icmpv6 type {NEIGHBOURS} ip6 hoplimit 255", "accepted_neighbours")
    # The kernel's own membership reports carry the router alert option (RFC 3376 §4, RFC 3810 §5) and stay on the link.
    yield Leaving(f"icmpv6 type {MEMBERSHIP} ip6 daddr ff02::/16", "accepted_membership")
    if facts.guests:
        # Before names: an error quotes to a guest what it has asked itself.
        for match in ERRORS:
            yield Leaving(f"oifname {device_set(facts.guests)} {match}", "accepted_guests")
    if facts.lan_allow and uplinks:
        yield Leaving(f"oifname {uplinks} meta l4proto igmp ip daddr 224.0.0.0/24", "accepted_membership")
    # Names are asked by the table or not at all, on the local network too.
    yield Leaving("meta l4proto { tcp, udp } th dport { 53, 853 }", "rejected_dns")
    # An answer that nobody waits for any more is quoted whole to whom the question was addressed: the quoted packet's
    # source port, behind the header of ICMP and its own (RFC 792, RFC 4443 §3.1).
    yield Leaving("icmp type destination-unreachable @th,224,16 { 53, 853 }", "rejected_dns")
    yield Leaving("icmpv6 type destination-unreachable @th,384,16 { 53, 853 }", "rejected_dns")
    # Record route would write the tun's address into the packet; a routing header names another way.
    yield Leaving("ip hdrlength > 5", "rejected_header")
    yield Leaving("exthdr rt exists", "rejected_header")
    if facts.lan_allow and uplinks:
        yield from (Leaving(f"oifname {uplinks} {match}", counter) for match, counter in _local(facts))


def _transport(facts: RulesetFacts) -> Iterator[Leaving]:
    """The VPN's own packets."""
    mark = f"meta mark {facts.fwmark:#x} " if facts.fwmark is not None else ""
    if mark and not facts.endpoints:
        yield Leaving(mark.rstrip(), "accepted_transport")
    for address, protocol, port in facts.endpoints:
        to = f"{mark}{family_word(address)} daddr {address} meta l4proto {protocol} th dport {port}"
        if not mark:
            # A foreign owner is refused, and none accepted: a kernel tunnel's handshake has no socket, and its packets
            # carry the owner of what is inside them.
            yield Leaving(f"{to} meta skuid != {{ {listed(facts.transport_uids)} }}", "rejected_transport")
        yield Leaving(to, "accepted_transport")


def _local(facts: RulesetFacts) -> Iterator[Leaving]:
    if not facts.lan_discovery:
        yield Leaving(f"udp dport {DISCOVERY_PORTS}", "rejected_discovery")
    for matched in address_matches("daddr", facts.lan_holes):
        yield Leaving(matched, "rejected_hole")
    # With the uplink's own address only: a socket bound to the tunnel's or the tun's would carry it to the neighbours.
    own = "fib saddr . oif type local"
    for matched in address_matches("daddr", facts.lan_networks):
        yield Leaving(f"{matched} {own}", "accepted_lan")
    # Link-local and administrative scope (RFC 2365; RFC 4291 §2.7), limited broadcast.
    yield Leaving(f"ip daddr {{ 224.0.0.0/24, 239.0.0.0/8, 255.255.255.255 }} {own}", "accepted_lan")
    yield Leaving(f"ip6 daddr {{ ff02::/16, ff04::/16, ff05::/16 }} {own}", "accepted_lan")


def _may_leave(facts: RulesetFacts) -> Iterator[str]:
    for leaving in _leaving(facts):
        yield f"{leaving.match} {'accept' if leaving.may else 'return'}"


def _steer(facts: RulesetFacts) -> Iterator[str]:
    # IP_UNICAST_IF and IP_PKTINFO need no privilege and pass every rule; systemd-resolved uses the former. A changed
    # mark makes the kernel look again, and the mark's rule leads into the tun. A socket that is bound to the device
    # finds no way there, and its packet ends with an error.
    yield f"oifname != {device_set([*facts.uplinks, facts.tunnel])} accept"
    yield "jump may_leave"
    if facts.firewall:
        # TCP names a device by being bound to it alone. A SYN that ends here would be sent again and again; refused
        # by the firewall, it ends the connect at once (net/ipv4/tcp_output.c, tcp_connect).
        yield "meta l4proto tcp accept"
    yield f"meta mark set {MARK_STEER:#x}"


def _unsteered(facts: RulesetFacts) -> Iterator[str]:
    # Marked for the tun, and yet elsewhere: the mark's rule was missing, or someone else set the mark.
    yield f"meta mark {MARK_STEER:#x} oifname != {device_set(_inner(facts))} counter name steered_unrouted drop"


def _unwritten(facts: RulesetFacts) -> Iterator[str]:
    # A masquerade for guests takes what this host sends from a bridge's address too, and gives it the tun's: whoever
    # has a socket on that port there would be thought to have sent it.
    yield f"oifname {device_set([facts.tun])} ct status snat counter name rewritten drop"


def _unforwarded(facts: RulesetFacts) -> Iterator[str]:
    # A socket that names the tun of forwarded packets would be judged as a guest; also without the firewall.
    for match, how in (" meta l4proto tcp", " with tcp reset"), ("", ""):
        yield f"oifname {device_set([facts.forwarded])}{match} counter name rejected reject{how}"


def _fitted(facts: RulesetFacts) -> Iterator[str]:
    # A guest's end of a connection knows its own device's MTU alone, and the other end would have to hear from the VPN
    # that less passes; many networks drop such words (RFC 2923 §2.1).
    if facts.guests:
        guests, tun = device_set(facts.guests), device_set([facts.forwarded])
        for way in f"iifname {guests} oifname {tun}", f"iifname {tun} oifname {guests}":
            yield f"{way} tcp flags syn tcp option maxseg size set rt mtu"


def _outgoing(facts: RulesetFacts) -> Iterator[str]:
    yield f"oifname {device_set(_inner(facts))} accept"
    # On its way into the tun; within this hook the old device still shows.
    yield f"meta mark {MARK_STEER:#x} accept"
    for leaving in _leaving(facts):
        yield f"{leaving.match} counter name {leaving.counter} {'accept' if leaving.may else 'reject'}"
    # At once, and before ARP or neighbour discovery names the destination to the network.
    yield "meta l4proto tcp counter name rejected reject with tcp reset"
    yield "counter name rejected reject"


def _incoming(facts: RulesetFacts) -> Iterator[str]:
    yield f"iifname {device_set([*_inner(facts), *facts.uplinks, facts.tunnel])} accept"
    # What a new device needs to become the uplink: the answers to what `outgoing` lets out by any.
    yield "udp sport 67 udp dport 68 accept"
    yield "udp sport 547 udp dport 546 accept"
    yield f"icmpv6 type {NEIGHBOURS_IN} ip6 hoplimit 255 accept"
    yield "icmpv6 type mld-listener-query accept"
    yield "counter name arrived_elsewhere drop"


def _forwarded(facts: RulesetFacts) -> Iterator[str]:
    # With br_netfilter a bridge's own frames pass here too, from it to itself: switched, not passed on.
    for bridge in facts.bridges:
        yield f"iifname {device_set([bridge])} oifname {device_set([bridge])} accept"
    if facts.guests:
        guests, tun = device_set(facts.guests), device_set([facts.forwarded])
        yield f"iifname {guests} oifname {tun} counter name accepted_forwarded accept"
        yield f"iifname {tun} oifname {guests} counter name accepted_forwarded accept"
    yield "counter name forwarded drop"


def _inner(facts: RulesetFacts) -> tuple[str, str]:
    """The devices whose packets stay with us."""
    return "lo", facts.tun
