"""The bodies of our nftables tables, in nft's words.

Theory of operation. The tables stand under routing and outlive the process. They do four things:

    arrive   what comes in by a side: nothing for the other side's addresses; a mark for strict rp_filter
    replies  answers to NAT's own flows end here: packet sockets have seen them, the kernel knows no such flow
    steer    what names a side's device without being bound to it goes into the tun after all
    outgoing nothing leaves by a side but what may; refused before ARP asks for anybody

The sets of live ports belong to the running NAT: they, and the counters, outlive the rules when the text changes.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tunsplit.errors import KernelError
from tunsplit.host import IPAddress, IPNetwork
from tunsplit.names import MARK_STEER, MARK_TUNNEL, MARK_UPLINK

# Live ports and echo identifiers of NAT, by protocol.
SET_TCP, SET_UDP, SET_ECHO4, SET_ECHO6 = "nat_tcp", "nat_udp", "nat_echo4", "nat_echo6"
SETS = {
    SET_TCP: "type inet_service",
    SET_UDP: "type inet_service",
    SET_ECHO4: "typeof icmp id",
    SET_ECHO6: "typeof icmpv6 id",
}

COUNTERS = (
    "arrived_for_other_side",
    "replies",
    "rejected",
    "rejected_dns",
    "rejected_header",
    "steered_unrouted",
)

# What finds names and opens ports: NetBIOS names, NAT-PMP and PCP, SSDP, LLMNR.
DISCOVERY_PORTS = "{ 137, 138, 1900, 5350, 5351, 5355 }"

WRITABLE = re.compile(r"[A-Za-z0-9_.@:+=#,-]+")


@dataclass(frozen=True, slots=True)
class RulesetFacts:
    """What the table depends on. Devices are names: the table holds for them also before they exist."""

    uplinks: tuple[str, ...]
    tunnel: str
    tun_addresses: tuple[IPAddress, ...] = ()
    tunnel_addresses: tuple[IPAddress, ...] = ()
    fwmark: int | None = None
    endpoints: tuple[tuple[IPAddress, int, int], ...] = ()  # address, protocol number, port
    transport_uids: tuple[int, ...] = (0,)
    lan_allow: bool = False
    lan_networks: tuple[IPNetwork, ...] = ()
    lan_holes: tuple[IPNetwork, ...] = ()
    lan_discovery: bool = False
    firewall: bool = True
    uid: int = 0


def rulesets(facts: RulesetFacts) -> dict[str, str]:
    """Write the body of our table of each family, `inet` and `arp`.

    Raises:
        KernelError: a device has a name that nft's language cannot hold.
    """
    parts = [
        *(f"counter {name} {{\n}}\n" for name in COUNTERS),
        # A set of 16-bit keys would be a bitmap, whose insertion walks all its elements (nft_set_bitmap.c): 1.6 ms for
        # 64 ports beside 6,000. A dynamic one is a hash: 0.14 ms.
        *(f"set {name} {{\n\t{key}\n\tflags dynamic\n}}\n" for name, key in SETS.items()),
        # Earlier than conntrack and than what distributions hang at raw (-300): firewalld's own reverse-path test
        # honours the mark too.
        _chain("arrive", "type filter hook prerouting priority -310", _arrive(facts)),
        _chain("arrived", "type filter hook input priority -310", _arrived(facts)),
        # Right after conntrack (-200).
        _chain("replies", "type filter hook prerouting priority -199", _replies(facts)),
        _chain("may_leave", "", _may_leave(facts)),
        _chain("steer", "type route hook output priority mangle", _steer(facts)),
        _chain("unsteered", "type filter hook postrouting priority filter", _unsteered(facts)),
    ]
    if facts.firewall:
        parts.append(_chain("outgoing", "type filter hook output priority filter", _outgoing(facts)))
    arp = _chain("arrive", "type filter hook input priority -310", _arrive_arp(facts))
    return {"inet": "".join(parts), "arp": arp}


def _arrive(facts: RulesetFacts) -> Iterator[str]:
    uplinks, tunnel = _names(facts.uplinks), _names([facts.tunnel])
    # What a neighbour on the uplink's network can send to the tunnel's address tells it of the tunnel's flows, and
    # injects into them (CVE-2019-14899). Before conntrack, so that nothing rewrites the address first.
    if uplinks:
        for matched in _addresses("daddr", (*facts.tun_addresses, *facts.tunnel_addresses)):
            yield f"iifname {uplinks} {matched} counter name arrived_for_other_side drop"
    for matched in _addresses("daddr", facts.tun_addresses):
        yield f"iifname {tunnel} {matched} counter name arrived_for_other_side drop"
    # The mark takes part in the reverse-path look-up (src_valid_mark) and finds the side's own table, so that strict
    # rp_filter passes what a side may send. Others' marks stay: they may restore one from conntrack for the same end.
    if uplinks:
        yield f"iifname {uplinks} meta mark 0 meta mark set {MARK_UPLINK:#x}"
    yield f"iifname {tunnel} meta mark 0 meta mark set {MARK_TUNNEL:#x}"


def _arrive_arp(facts: RulesetFacts) -> Iterator[str]:
    # A neighbour's question passes the reverse-path test too (net/ipv4/arp.c, arp_process): unmarked, under a strict
    # one, the host would answer nobody.
    if uplinks := _names(facts.uplinks):
        yield f"iifname {uplinks} meta mark 0 meta mark set {MARK_UPLINK:#x}"
    yield f"iifname {_names([facts.tunnel])} meta mark 0 meta mark set {MARK_TUNNEL:#x}"


def _arrived(facts: RulesetFacts) -> Iterator[str]:
    # The look-up is over. A socket that takes its mark from what comes in (tcp_fwmark_accept, fwmark_reflect) would
    # answer with ours, beside the tun.
    for device, mark in ((_names(facts.uplinks), MARK_UPLINK), (_names([facts.tunnel]), MARK_TUNNEL)):
        if device:
            yield f"iifname {device} meta mark {mark:#x} meta mark set 0"


def _replies(facts: RulesetFacts) -> Iterator[str]:
    sides = _names([*facts.uplinks, facts.tunnel])
    # The kernel would answer with RST, port unreachable, or deliver an echo reply twice. Its own flows and sockets in
    # the range live on: they are in conntrack, or their port is not in the set.
    new = f"iifname {sides} ct state != {{ established, related }}"
    yield f"{new} tcp dport @{SET_TCP} counter name replies drop"
    yield f"{new} udp dport @{SET_UDP} counter name replies drop"
    yield f"{new} icmp type echo-reply icmp id @{SET_ECHO4} counter name replies drop"
    yield f"{new} icmpv6 type echo-reply icmpv6 id @{SET_ECHO6} counter name replies drop"


def _may_leave(facts: RulesetFacts) -> Iterator[str]:
    uplinks, tunnel = _names(facts.uplinks), _names([facts.tunnel])
    # The kernel's own membership reports carry the router alert option (RFC 3376 §4, RFC 3810 §5) and stay on the link.
    yield "icmpv6 type { mld-listener-report, mld-listener-done, mld2-listener-report } ip6 daddr ff02::/16 accept"
    if facts.lan_allow and uplinks:
        yield f"oifname {uplinks} meta l4proto igmp ip daddr 224.0.0.0/24 accept"
    # Record route would write the tun's address into the packet; a routing header names another way.
    yield "ip hdrlength > 5 return"
    yield "exthdr rt exists return"
    # Our own sockets, by mark, device and owner: none of them opens anything alone.
    if uplinks:
        yield f"oifname {uplinks} meta mark {MARK_UPLINK:#x} meta skuid {facts.uid} accept"
    yield f"oifname {tunnel} meta mark {MARK_TUNNEL:#x} meta skuid {facts.uid} accept"
    if uplinks:
        yield from (f"oifname {uplinks} {rule}" for rule in _transport(facts))
        # DHCP: privileged ports at both ends.
        yield f"oifname {uplinks} udp sport 68 udp dport 67 accept"
        yield f"oifname {uplinks} udp sport 546 udp dport 547 accept"
    # Neighbour discovery, for which the hop limit proves that it stays on the link (RFC 4861 §6.1, §7.1).
    yield "icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255 accept"
    # Names are asked by the table or not at all, on the local network too.
    yield "meta l4proto { tcp, udp } th dport { 53, 853 } return"
    # An answer that nobody waits for any more is quoted whole to whom the question was addressed: the quoted packet's
    # source port, behind the header of ICMP and its own (RFC 792, RFC 4443 §3.1).
    yield "icmp type destination-unreachable @th,224,16 { 53, 853 } return"
    yield "icmpv6 type destination-unreachable @th,384,16 { 53, 853 } return"
    if facts.lan_allow and uplinks:
        yield from (f"oifname {uplinks} {rule}" for rule in _local(facts))


def _transport(facts: RulesetFacts) -> Iterator[str]:
    """The VPN's own packets."""
    mark = f"meta mark {facts.fwmark:#x} " if facts.fwmark is not None else ""
    if mark and not facts.endpoints:
        yield f"{mark}accept"
    for address, protocol, port in facts.endpoints:
        to = f"{_family(address)} daddr {address} meta l4proto {protocol} th dport {port}"
        if mark:
            yield f"{mark}{to} accept"
            continue
        # A foreign owner is refused, and none accepted: a kernel tunnel's handshake has no socket, and its packets
        # carry the owner of what is inside them.
        yield f"{to} meta skuid != {{ {_list(facts.transport_uids)} }} return"
        yield f"{to} accept"


def _local(facts: RulesetFacts) -> Iterator[str]:
    if not facts.lan_discovery:
        yield f"udp dport {DISCOVERY_PORTS} return"
    for matched in _addresses("daddr", facts.lan_holes):
        yield f"{matched} return"
    # With the uplink's own address only: a socket bound to the tunnel's or the tun's would carry it to the neighbours.
    own = "fib saddr . oif type local"
    for matched in _addresses("daddr", facts.lan_networks):
        yield f"{matched} {own} accept"
    # Link-local and administrative scope (RFC 2365; RFC 4291 §2.7), limited broadcast.
    yield f"ip daddr {{ 224.0.0.0/24, 239.0.0.0/8, 255.255.255.255 }} {own} accept"
    yield f"ip6 daddr {{ ff02::/16, ff04::/16, ff05::/16 }} {own} accept"


def _steer(facts: RulesetFacts) -> Iterator[str]:
    # IP_UNICAST_IF and IP_PKTINFO need no privilege and pass every rule; systemd-resolved uses the former. A changed
    # mark makes the kernel look again, and the mark's rule leads into the tun. A socket that is bound to the device
    # finds no way there, and its packet ends with an error.
    yield f"oifname != {_names([*facts.uplinks, facts.tunnel])} accept"
    yield "jump may_leave"
    if facts.firewall:
        # TCP names a device by being bound to it alone. A SYN that ends here would be sent again and again; refused
        # by the firewall, it ends the connect at once (net/ipv4/tcp_output.c, tcp_connect).
        yield "meta l4proto tcp accept"
    yield f"meta mark set {MARK_STEER:#x}"


def _unsteered(facts: RulesetFacts) -> Iterator[str]:
    # Marked for the tun, and yet at a side: the mark's rule was missing, or someone else set the mark.
    sides = _names([*facts.uplinks, facts.tunnel])
    yield f"oifname {sides} meta mark {MARK_STEER:#x} counter name steered_unrouted drop"


def _outgoing(facts: RulesetFacts) -> Iterator[str]:
    yield f"oifname != {_names([*facts.uplinks, facts.tunnel])} accept"
    # On its way into the tun; within this hook the old device still shows.
    yield f"meta mark {MARK_STEER:#x} accept"
    yield "jump may_leave"
    yield "ip hdrlength > 5 counter name rejected_header reject"
    yield "exthdr rt exists counter name rejected_header reject"
    yield "meta l4proto { tcp, udp } th dport { 53, 853 } counter name rejected_dns reject"
    # At once, and before ARP or neighbour discovery names the destination to the network.
    yield "meta l4proto tcp counter name rejected reject with tcp reset"
    yield "counter name rejected reject"


def _chain(name: str, hook: str, rules: Iterable[str]) -> str:
    lines = [f"{hook}; policy accept;"] if hook else []
    return f"chain {name} {{\n" + "".join(f"\t{line}\n" for line in [*lines, *rules]) + "}\n"


def _names(devices: Iterable[str]) -> str:
    devices = tuple(dict.fromkeys(devices))
    for device in devices:
        if not WRITABLE.fullmatch(device):
            raise KernelError(f"device {device!r}: nft cannot hold this name; rename the device")
    return "{ " + ", ".join(f'"{device}"' for device in devices) + " }" if devices else ""


def _addresses(field: str, addresses: Iterable[IPAddress | IPNetwork]) -> Iterator[str]:
    """One match a family."""
    found = tuple(dict.fromkeys(addresses))
    for version, family in ((4, "ip"), (6, "ip6")):
        if own := [address for address in found if address.version == version]:
            yield f"{family} {field} {{ {_list(own)} }}"


def _family(address: IPAddress) -> str:
    return "ip" if address.version == 4 else "ip6"


def _list(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)
