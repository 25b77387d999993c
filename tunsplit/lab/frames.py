"""What a frame says, as an observer writes it down. Pure; dpkt reads the headers, not our own code."""

from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Literal, NamedTuple

import dpkt

from tunsplit.lab.addresses import TUNNEL_PORT, Address

Direction = Literal["out", "in"]

ETHERNET_HEADER = 14
ETHERTYPE_IPV4, ETHERTYPE_ARP, ETHERTYPE_IPV6 = 0x0800, 0x0806, 0x86DD
ETHERTYPES_VLAN = (0x8100, 0x88A8)
ICMP, TCP, UDP, ICMPV6, SCTP = 1, 6, 17, 58, 132
RST = 0x04  # RFC 9293 §3.1
NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPV6: "icmpv6", SCTP: "sctp"}
ECHO = {ICMP: (8, 0), ICMPV6: (128, 129)}  # request, answer (RFC 792, RFC 4443 §4)
ICMP_ERRORS = (3, 4, 5, 11, 12)  # RFC 792: these quote the packet they are about
ICMPV6_ERRORS = 128  # below this (RFC 4443 §2.1)
NDP = range(133, 138)  # RFC 4861 §4
NDP_WITH_TARGET = (135, 136, 137)
WIREGUARD_TYPES = frozenset(bytes((kind, 0, 0, 0)) for kind in (1, 2, 3, 4))  # WireGuard white paper §5.4


class FlowKey(NamedTuple):
    """One direction of a conversation; ports are None where the protocol has none, or a fragment hides them."""

    protocol: str
    source: Address | None
    source_port: int | None
    destination: Address | None
    destination_port: int | None


@dataclass(frozen=True, slots=True)
class Seen:
    """One frame.

    Attributes:
        time: seconds since the epoch, when it was read.
        direction: as the host sees it.
        protocol: tcp, udp, icmp, icmpv6, sctp; ndp and arp, whose destination is the address that is asked for;
            wireguard, the VPN's own; `ip-47` and `ethertype-0x88cc` for others; malformed.
        identifier: an echo's.
        kind: ICMP's type.
        is_reset: it is a segment with TCP's RST flag.
        fragment: it is part of a packet.
        payload: what the transport carries, as far as it was captured.
        quoted: the packet that an ICMP error is about.
        octets: its length, with all headers, uncaptured ones included.
        frame: as it was captured, link header included.
    """

    protocol: str
    source: Address | None = None
    destination: Address | None = None
    source_port: int | None = None
    destination_port: int | None = None
    identifier: int | None = None
    kind: int | None = None
    is_reset: bool = False
    fragment: bool = False
    payload: bytes = b""
    quoted: "Seen | None" = None
    direction: Direction = "out"
    time: float = 0.0
    octets: int = 0
    frame: bytes = b""

    @property
    def flow(self) -> FlowKey:
        """The flow that it is counted under."""
        return FlowKey(self.protocol, self.source, self.source_port, self.destination, self.destination_port)

    def __str__(self) -> str:
        ends = " > ".join(
            f"{address}" if port is None else f"{address}.{port}"
            for address, port in ((self.source, self.source_port), (self.destination, self.destination_port))
        )
        return f"{self.direction} {self.protocol} {ends} {self.octets} octets"


def parse_untrusted(frame: bytes, *, ethernet: bool, ethertype: int) -> Seen:
    """What a frame says; never raises.

    Args:
        frame: its beginning, from the link header on.
        ethernet: it has a link header.
        ethertype: what the device says about one that has none.
    """
    at = 0
    if ethernet:
        if len(frame) < ETHERNET_HEADER:
            return Seen("malformed", payload=frame)
        ethertype, at = int.from_bytes(frame[12:14], "big"), ETHERNET_HEADER
        while ethertype in ETHERTYPES_VLAN and len(frame) >= at + 4:
            ethertype, at = int.from_bytes(frame[at + 2 : at + 4], "big"), at + 4
    return _parse_packet_untrusted(frame[at:], ethertype)


def _parse_packet_untrusted(packet: bytes, ethertype: int) -> Seen:
    try:
        if ethertype == ETHERTYPE_IPV4:
            return _parse_ipv4(packet)
        if ethertype == ETHERTYPE_IPV6:
            return _parse_ipv6(packet)
        if ethertype == ETHERTYPE_ARP:
            return _parse_arp(packet)
    except Exception:  # dpkt raises whatever it stumbles over, and every frame is worth a record
        return Seen("malformed", payload=packet)
    return Seen(f"ethertype-{ethertype:#06x}", payload=packet)


def _parse_ipv4(packet: bytes) -> Seen:
    header = dpkt.ip.IP(packet)
    if header.v != 4 or header.hl < 5:
        return Seen("malformed", payload=packet)
    offset = int.from_bytes(packet[6:8], "big") & 0x3FFF  # MF and offset
    end = header.len or len(packet)  # 0: a super-packet of more than 64 KiB
    seen = Seen(NAMES.get(header.p, f"ip-{header.p}"), fragment=bool(offset))
    seen = replace(seen, source=ip_address(header.src), destination=ip_address(header.dst))
    return _with_transport(seen, header.p, packet[header.hl * 4 : end], later=bool(offset & 0x1FFF))


def _parse_ipv6(packet: bytes) -> Seen:
    header = dpkt.ip6.IP6(packet)
    if header.v != 6:
        return Seen("malformed", payload=packet)
    fragment = header.extension_hdrs.get(dpkt.ip.IP_PROTO_FRAGMENT)
    start = 40 + sum(extension.length for extension in header.all_extension_headers)
    end = 40 + header.plen if header.plen else len(packet)
    seen = Seen(NAMES.get(header.p, f"ip-{header.p}"), fragment=fragment is not None)
    seen = replace(seen, source=ip_address(header.src), destination=ip_address(header.dst))
    return _with_transport(seen, header.p, packet[start:end], later=fragment is not None and fragment.frag_off > 0)


def _with_transport(seen: Seen, protocol: int, data: bytes, *, later: bool) -> Seen:
    """Add what the transport's header says; a later fragment has none."""
    if later or len(data) < 8:
        return replace(seen, payload=data)
    if protocol in (TCP, UDP, SCTP):
        ports = int.from_bytes(data[:2], "big"), int.from_bytes(data[2:4], "big")
        start = {TCP: (data[12] >> 4) * 4 if len(data) > 12 else 8, UDP: 8, SCTP: 12}[protocol]
        payload = data[start:]
        if protocol == UDP and TUNNEL_PORT in ports and payload[:4] in WIREGUARD_TYPES:
            seen = replace(seen, protocol="wireguard")
        elif protocol == TCP:
            seen = replace(seen, is_reset=len(data) > 13 and bool(data[13] & RST))
        return replace(seen, source_port=ports[0], destination_port=ports[1], payload=payload)
    if protocol in (ICMP, ICMPV6):
        return _with_icmp(seen, protocol, data)
    return replace(seen, payload=data)


def _with_icmp(seen: Seen, protocol: int, data: bytes) -> Seen:
    seen = replace(seen, kind=data[0], payload=data[8:])
    if data[0] in ECHO[protocol]:
        return replace(seen, identifier=int.from_bytes(data[4:6], "big"))
    if protocol == ICMPV6 and data[0] in NDP:
        asked = ip_address(data[8:24]) if data[0] in NDP_WITH_TARGET and len(data) >= 24 else seen.destination
        return replace(seen, protocol="ndp", destination=asked)
    if data[0] in ICMP_ERRORS if protocol == ICMP else data[0] < ICMPV6_ERRORS:
        ethertype = ETHERTYPE_IPV4 if protocol == ICMP else ETHERTYPE_IPV6
        return replace(seen, quoted=_parse_packet_untrusted(data[8:], ethertype))
    return seen


def _parse_arp(packet: bytes) -> Seen:
    header = dpkt.arp.ARP(packet)
    return Seen("arp", ip_address(header.spa), ip_address(header.tpa), kind=header.op)
