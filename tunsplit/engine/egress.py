"""What leaves by a side below IP: the netdev table, in nft's words.

Theory of operation. The firewall of the inet family stands where IP sends. What a packet socket sends comes in below
that (nmap, scapy, a VPN's or a DHCP client's own raw frames): it would leave beside the tunnel whatever the app's side
is. The egress hook of a device sees it, as it sees every frame, so the table says first what is none of its business:

    ours      by priority and owner together. A mark would do too, but goes on into what a tunnel of the kernel's makes
              of the frame, where routing and IPsec's policies look at it; a priority leads nowhere.
    routed    what carries a route has been through IP, and the inet hooks with it. A packet socket's frames have none.
    unowned   what no socket of this network namespace has made: the kernel's own ARP, a bridge's or container's frames
              that pass this host by. It is the policy, for nft has no word for it.

What is left was made by a socket, without IP: of that leaves what a link needs for itself, and nothing else. Frames
are known by what is on the wire, not by the protocol that their sender has told the kernel. A virtual machine with a
device of its own on the wire (macvtap) is such a socket as well, and known by its address.

A hook is a device's. Newer kernels take the name of one that is to come, so that it is closed from its first moment;
older ones refuse it, and all that is in the same transaction: hence a table that is put in force by itself, and a
second text for the devices that are there. It outlives the process like the others.
"""

from collections.abc import Iterable, Iterator

from tunsplit.engine.nftwords import chain_words, device_set
from tunsplit.engine.ruleset import DHCP, MEMBERSHIP, NEIGHBOURS, RulesetFacts
from tunsplit.host import EgressTable, Link
from tunsplit.names import FRAME_PRIORITY

COUNTERS = (
    "accepted_guests",
    "accepted_link",
    "accepted_dhcp",
    "accepted_neighbours",
    "accepted_membership",
    "rejected",
)

# What a link needs for itself (IANA, "IEEE 802 Numbers"): ARP, EAPOL and its preauthentication, WAPI, TDLS, LLDP, slow
# protocols (LACP), PPPoE, MACsec, and the clock's (PTP). None of them carries an app's packet beside the tunnel but in
# a session that the host has with its provider.
LINK_TYPES = "{ 0x0806, 0x888e, 0x88c7, 0x88b4, 0x890d, 0x88cc, 0x8809, 0x8863, 0x8864, 0x88e5, 0x88f7 }"


def egress(facts: RulesetFacts, links: Iterable[Link]) -> EgressTable:
    """Say what the netdev table is to be while these devices are on the host: none without the firewall.

    Raises:
        KernelError: a device has a name that nft's language cannot hold.
    """
    if not facts.firewall:
        return EgressTable()
    there = {link.name: link for link in links}
    sides = tuple(dict.fromkeys((*facts.uplinks, facts.tunnel)))
    devices = tuple(name for name in sides if name in there)
    below = {there[name].index for name in devices}
    guests = [link.mac for link in there.values() if link.kind == "macvtap" and link.below in below and link.mac]
    return EgressTable(_body(facts, sides, guests), _body(facts, devices, guests) if devices else "", devices)


def _body(facts: RulesetFacts, devices: Iterable[str], guests: Iterable[bytes]) -> str:
    hook = f"type filter hook egress devices = {device_set(devices)} priority filter"
    parts = [
        *(f"counter {name} {{\n}}\n" for name in COUNTERS),
        chain_words("leaving", hook, _leaving(facts)),
        chain_words("unrouted", "", _unrouted(guests)),
    ]
    return "".join(parts)


def _leaving(facts: RulesetFacts) -> Iterator[str]:
    yield f"meta priority {FRAME_PRIORITY >> 16:x}:{FRAME_PRIORITY & 0xFFFF:x} meta skuid {facts.uid} accept"
    # Whatever its class: who has no route has none (net/netfilter/nft_meta.c, nft_meta_get_eval_rtclassid).
    yield "meta rtclassid >= 0 accept"
    yield "meta skuid >= 0 goto unrouted"


def _unrouted(guests: Iterable[bytes]) -> Iterator[str]:
    if addresses := ", ".join(sorted(mac.hex(":") for mac in guests)):
        yield f"ether saddr {{ {addresses} }} counter name accepted_guests accept"
    # On a VLAN of its own, too.
    for layer in ("ether", "vlan"):
        yield f"{layer} type {LINK_TYPES} counter name accepted_link accept"
    # A client without an address yet, and others that speak for the link: as the firewall has it.
    for ports in DHCP:
        yield f"{ports} counter name accepted_dhcp accept"
    yield f"icmpv6 type {NEIGHBOURS} ip6 hoplimit 255 counter name accepted_neighbours accept"
    yield f"icmpv6 type {MEMBERSHIP} ip6 daddr ff02::/16 counter name accepted_membership accept"
    yield "counter name rejected drop"
