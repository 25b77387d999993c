"""The packets that the fast path passes by.

Theory of operation. Options, extension headers, fragments, echo, ICMP errors and other protocols are
taken apart here, at leisure, and find the same rewrites by the same keys:

- TCP, UDP: the four-tuple;
- echo: the addresses, and the identifier in the place of the asker's port (RFC 5508 §3.1);
- other protocols: the addresses alone;
- other ICMP: nothing, it is of no flow;
- later fragments: the rewrite that their first has taken;
- ICMP errors: the flow of the packet inside, turned round; both packets are rewritten (RFC 5508 §4).

No packet leaves with IPv4 options (taken off: they would carry the tun's address out or steer the
packet; RFC 7126 drops most of them on the way anyway), and none passes with a source route of either version. No SYN
leaves with an option by which a server would know again, on one side, whom it has met on the other: Fast Open's cookie
(the kernel keeps it by the tun's address, for the apps of both sides), Multipath TCP's join, and where the kernel tells
one time to all of a server's connections, on one of the sides, timestamps.
"""

from collections import Counter
from dataclasses import dataclass

from tunsplit.engine.direction import ACK, RST, SYN, Direction, reversed_key
from tunsplit.engine.flow import Rewrite
from tunsplit.engine.fragments import Fragments, Refused
from tunsplit.errors import MalformedPacket
from tunsplit.wire import craft, icmp, tcpoptions, vnet
from tunsplit.wire.checksum import internet_checksum, pseudo_header
from tunsplit.wire.ip import (
    CHECKSUM_AT,
    DCCP,
    ICMP,
    ICMPV6,
    TCP,
    UDP,
    UDPLITE,
    Headers,
    pack_u16,
    pack_u32,
    parse_untrusted,
    unpack_u16,
    unpack_u32,
    without_options,
)

WITH_PORTS = frozenset((TCP, UDP))
_SHORTEST = {
    TCP: 20,
    UDP: 8,
    ICMP: 8,
    ICMPV6: 8,
    DCCP: 12,
    UDPLITE: 8,
}  # bytes of transport that a first fragment has to have
HIDDEN = frozenset((tcpoptions.FAST_OPEN, tcpoptions.MPTCP))
HIDDEN_WITH_CLOCK = HIDDEN | {tcpoptions.TIMESTAMPS}
_NO_PORTS = bytes(4)
_NO_FLOW = b"\xff" * 4  # as ports of ICMP: echo has zeros in one half of them


@dataclass(slots=True)
class TooBig:
    """A packet of `size` bytes was too big for its path, which takes `mtu`; `sequence` is a TCP segment's."""

    mtu: int
    size: int
    sequence: int | None


@dataclass(slots=True)
class Ready:
    """A packet that has been rewritten and may go; what came in and tells of a path's MTU says so."""

    rewrite: Rewrite
    vnet: bytearray
    packet: bytearray
    too_big: TooBig | None = None


@dataclass(slots=True)
class Unknown:
    """A packet of no flow that is open: the first of a new one, or none of ours."""

    protocol: int
    key: bytes
    headers: Headers
    vnet: bytes
    packet: bytes


class SlowPath:
    """One direction's slow path. Drops are counted in `counters`."""

    def __init__(
        self, direction: Direction, counters: Counter[str], *, outbound: bool, shared_clock: bool = False
    ) -> None:
        """`shared_clock`: TCP timestamps tell one time to all connections between two addresses."""
        self._direction = direction
        self._counters = counters
        self._outbound = outbound
        self._hidden = {"tunnel": HIDDEN_WITH_CLOCK if shared_clock else HIDDEN}
        self.fragments = Fragments()

    def translate_untrusted(self, vnet_header: bytes, packet: bytes, now: float) -> list[Ready] | Unknown:
        """Rewrite a packet and whatever fragments it sets free, or say that it belongs to no open flow."""
        try:
            headers = parse_untrusted(packet, len(packet))
            if headers.routed:
                self._counters["source_route"] += 1
                return []
            if self._outbound and headers.version == 4 and headers.options:
                removed = headers.transport - 20
                packet = bytes(without_options(packet[: headers.size]))
                header = bytearray(vnet_header)
                vnet.shift(header, -removed)
                vnet_header = bytes(header)
                headers = parse_untrusted(packet, len(packet))
            return self._translate(headers, vnet_header, packet[: headers.size], now)
        except MalformedPacket:
            self._counters["malformed"] += 1
            return []

    def _translate(self, headers: Headers, vnet_header: bytes, packet: bytes, now: float) -> list[Ready] | Unknown:
        if headers.offset:
            return self._translate_later(headers, vnet_header, packet, now)
        if headers.transport + _SHORTEST.get(headers.protocol, 0) > headers.size:
            raise MalformedPacket("transport header is cut")
        if headers.protocol in icmp.ERRORS and icmp.is_error(headers.protocol, packet[headers.transport]):
            return self._translate_error(headers, vnet_header, packet, now)
        key = flow_key(packet, headers)
        rewrite = self._direction.find(headers.protocol, key)
        if self._outbound and rewrite is not None and rewrite.flow.ending:
            return self._translate_ending(rewrite, headers, vnet_header, packet, now)
        if rewrite is None or self._must_be_judged(rewrite, headers, packet, now):
            return self._unknown(key, headers, vnet_header, packet, now)
        return self._pass(rewrite, headers, vnet_header, packet, now)

    def _must_be_judged(self, rewrite: Rewrite, headers: Headers, packet: bytes, now: float) -> bool:
        """Whether a packet of an open flow may be another socket's."""
        if headers.protocol == TCP:
            flags = packet[headers.transport + 13]
            follows = self._direction.control(rewrite, flags)
            # The end of a connection that nobody takes any more is the kernel's own word.
            return not follows or (self._outbound and rewrite.flow.unaccepted and not flags & RST)
        return self._direction.owned and now != rewrite.last_seen

    def _translate_ending(
        self, rewrite: Rewrite, headers: Headers, vnet_header: bytes, packet: bytes, now: float
    ) -> list[Ready]:
        """Let the RST pass that ends the flow, and nothing else.

        The peer believes one that begins where what it has ends (RFC 5961 §3.2): mostly where what was dropped begins,
        unless that had been sent before. Of one that comes later it lets us know.
        """
        flow, flags = rewrite.flow, packet[headers.transport + 13]
        (sequence,) = unpack_u32(packet, headers.transport + 4)
        if not flags & RST:
            self._counters["sent_after_its_end"] += 1
            flow.resets = flow.resets or (sequence,)
            return []
        self._direction.control(rewrite, flags)
        flow.resets = tuple(dict.fromkeys((*flow.resets, sequence)))
        ready = []
        for number in flow.resets:
            reset = bytearray(packet)
            pack_u32(reset, headers.transport + 4, number)
            if not vnet_header[0] & vnet.NEEDS_CSUM:
                (check,) = unpack_u16(reset, headers.transport + 16)
                pack_u16(reset, headers.transport + 16, (check + _folded(sequence) - _folded(number)) % 0xFFFF)
            ready += self._pass(rewrite, headers, vnet_header, bytes(reset), now)
        return ready

    def _translate_later(self, headers: Headers, vnet_header: bytes, packet: bytes, now: float) -> list[Ready]:
        try:
            rewrite = self.fragments.later(headers)
        except Refused:
            self._counters["fragments_refused"] += 1
            return []
        if rewrite is not None:
            return [self._rewrite(rewrite, headers, vnet_header, packet, now)]
        self._counters["fragments_full"] += self.fragments.hold(headers, vnet_header, packet, now)
        return []

    def _unknown(self, key: bytes, headers: Headers, vnet_header: bytes, packet: bytes, now: float) -> Unknown:
        unknown = Unknown(headers.protocol, key, headers, vnet_header, packet)
        if headers.identification is not None:
            if self._outbound:
                self.fragments.start(headers)
            else:  # nobody judges it: it is not ours
                self.refuse_fragments(unknown, now)
        return unknown

    def pass_on(self, unknown: Unknown, rewrite: Rewrite, now: float) -> list[Ready]:
        """Rewrite a packet whose flow has been opened since, and whatever fragments it sets free."""
        return self._pass(rewrite, unknown.headers, unknown.vnet, unknown.packet, now)

    def write_into(self, packet: memoryview, unknown: Unknown, rewrite: Rewrite, now: float) -> None:
        """Rewrite, in place, a copy of a packet that is no fragment, and whose flow has been opened since."""
        self._write_over(packet, unknown.headers, unknown.vnet, rewrite, now)

    def refuse_fragments(self, unknown: Unknown, now: float) -> None:
        """The packet was refused: so is the rest of its datagram."""
        if unknown.headers.identification is not None:
            self._counters["fragments_refused"] += self.fragments.refuse(unknown.headers, now)

    def _pass(self, rewrite: Rewrite, headers: Headers, vnet_header: bytes, packet: bytes, now: float) -> list[Ready]:
        ready = [self._rewrite(rewrite, headers, vnet_header, packet, now)]
        if headers.identification is not None:
            for held_vnet, held in self.fragments.first(headers, rewrite, now):
                ready.append(self._rewrite(rewrite, parse_untrusted(held, len(held)), held_vnet, held, now))
        return ready

    def _rewrite(self, rewrite: Rewrite, headers: Headers, vnet_header: bytes, packet: bytes, now: float) -> Ready:
        ready = Ready(rewrite, bytearray(vnet_header), bytearray(packet))
        self._write_over(ready.packet, headers, vnet_header, rewrite, now)
        return ready

    def _write_over(
        self, packet: bytearray | memoryview, headers: Headers, vnet_header: bytes, rewrite: Rewrite, now: float
    ) -> None:
        """Write the rewrite over a packet that is about to leave, and count it."""
        finished = not vnet_header[0] & vnet.NEEDS_CSUM
        _write(packet, headers, rewrite, finished=finished)
        if self._outbound and headers.has_transport and opens_connection(packet, headers):
            kinds = self._hidden.get(rewrite.flow.side, HIDDEN)
            rewrite.flow.syn = _hide(packet, headers, kinds, finished=finished)
        rewrite.last_seen = now
        rewrite.packets += 1
        rewrite.octets += len(packet)

    def _translate_error(
        self, headers: Headers, vnet_header: bytes, packet: bytes, now: float
    ) -> list[Ready] | Unknown:
        at, inner = icmp.embedded_untrusted(packet, headers)
        key = flow_key(packet[at:], inner, turned_round=True)
        too_big = None if self._outbound else _too_big(packet, headers, at, inner)
        rewrite = self._direction.find(inner.protocol, key)
        if rewrite is None and too_big is not None and inner.protocol == UDP:
            rewrite = self._direction.answered.get(key)
        # An error goes to whom its cause came from; the app's own host sends it as whom that was meant for.
        fits = headers.destination == inner.source and (not self._outbound or headers.source == inner.destination)
        if rewrite is None or not fits:
            key = headers.source + headers.destination + _NO_FLOW
            return self._unknown(key, headers, vnet_header, packet, now)
        error = bytearray(packet)
        _write_quoted(error, at, inner, rewrite)
        # The error travels with the flow: only the end that stands for the app is translated; a router keeps its name.
        size = (len(rewrite.four_tuple) - 4) // 2
        own = rewrite.four_tuple[:size] if self._outbound else rewrite.four_tuple[size : 2 * size]
        own_at = rewrite.at if self._outbound else rewrite.at + size
        error[own_at : own_at + size] = own
        if headers.version == 4:
            (check,) = unpack_u16(error, 10)
            pack_u16(error, 10, (check - rewrite.ip_delta) % 0xFFFF)
        message = bytes(error[headers.transport + 4 :])
        covered = b"" if headers.version == 4 else pseudo_header(bytes(error[8:40]), ICMPV6, len(message) + 4)
        start = bytes(error[headers.transport : headers.transport + 2]) + bytes(2)
        pack_u16(error, headers.transport + 2, internet_checksum(covered + start + message))
        rewrite.last_seen = now
        return [Ready(rewrite, bytearray(vnet.NONE), error, too_big)]


def _folded(word: int) -> int:
    """32 bits as what they add to a checksum (RFC 1624 §3)."""
    return (word >> 16) + (word & 0xFFFF)


def _too_big(packet: bytes, headers: Headers, at: int, inner: Headers) -> TooBig | None:
    """What an error tells of the path's MTU; `at` is where the quoted packet begins."""
    if (mtu := icmp.path_mtu(packet, headers)) is None:
        return None
    # Its own word: routers quote less than there was, and leave the length as it was.
    size = int(unpack_u16(packet, at + 2)[0]) if inner.version == 4 else 40 + int(unpack_u16(packet, at + 4)[0])
    sequence = int(unpack_u32(packet, at + inner.transport + 4)[0]) if inner.protocol == TCP else None
    return TooBig(mtu, size, sequence)


def is_for_nobody(unknown: Unknown) -> str:
    """Why this packet is dropped unjudged, in a word to count by; empty: it is to be judged.

    So is what the kernel itself answers, of no flow (a port scan must not cost a search a packet), and what is
    addressed to many.
    """
    packet, at = unknown.packet, unknown.headers.transport
    if craft.is_multicast(unknown.headers.destination):
        return "multicast"
    if unknown.protocol == TCP and packet[at + 13] & RST:
        return "reset_of_no_flow"
    if unknown.protocol in icmp.ECHO_REQUEST and packet[at] != icmp.ECHO_REQUEST[unknown.protocol]:
        return "icmp_of_no_flow"
    return ""


def opens_connection(packet: bytes | bytearray | memoryview, headers: Headers) -> bool:
    """Whether a packet, which has its transport header, is a client's SYN."""
    return headers.protocol == TCP and packet[headers.transport + 13] & (SYN | ACK) == SYN


def segment_of(unknown: Unknown) -> bytes:
    """TCP's part of a packet, from its header on; nothing of other protocols."""
    return unknown.packet[unknown.headers.transport :] if unknown.protocol == TCP else b""


def flow_key(packet: bytes, headers: Headers, *, turned_round: bool = False) -> bytes:
    """The key of the flow that this packet, with its transport header, belongs to.

    `turned_round`: the key of the opposite direction, as for the packet inside an ICMP error.
    """
    at = headers.transport
    if headers.protocol in WITH_PORTS:
        ports = packet[at : at + 4]
    elif headers.protocol in icmp.ECHO_REQUEST and packet[at] == icmp.ECHO_REQUEST[headers.protocol]:
        ports = packet[at + 4 : at + 6] + bytes(2)
    elif headers.protocol in icmp.ECHO_REPLY and packet[at] == icmp.ECHO_REPLY[headers.protocol]:
        ports = bytes(2) + packet[at + 4 : at + 6]
    elif headers.protocol in icmp.ECHO_REPLY:
        ports = _NO_FLOW
    else:
        ports = _NO_PORTS
    key = headers.source + headers.destination + bytes(ports)
    return reversed_key(key) if turned_round else key


def _write(packet: bytearray | memoryview, headers: Headers, rewrite: Rewrite, *, finished: bool) -> None:
    """Write the rewrite over a packet of any shape."""
    packet[rewrite.at : rewrite.end - 4] = rewrite.four_tuple[:-4]
    if headers.version == 4:
        (check,) = unpack_u16(packet, 10)
        pack_u16(packet, 10, (check - rewrite.ip_delta) % 0xFFFF)
    if headers.has_transport:
        change = -rewrite.transport_delta if finished else rewrite.pseudo_delta
        keeps_none = finished and headers.protocol == UDP
        _write_transport(packet, headers.transport, headers, rewrite.four_tuple[-4:], change, keeps_none=keeps_none)


def _hide(packet: bytearray | memoryview, headers: Headers, kinds: frozenset[int], *, finished: bool) -> bytes:
    """Hide options of a SYN; what of it is TCP's, as it leaves."""
    segment = bytearray(packet[headers.transport : headers.size])
    before = internet_checksum(segment[tcpoptions.OPTIONS_AT :]) if finished else 0
    tcpoptions.hide_untrusted(segment, kinds)
    if finished:
        (check,) = unpack_u16(segment, CHECKSUM_AT[TCP])
        check += internet_checksum(segment[tcpoptions.OPTIONS_AT :]) - before
        pack_u16(segment, CHECKSUM_AT[TCP], check % 0xFFFF)
    packet[headers.transport : headers.size] = segment
    return bytes(segment)


def _write_quoted(error: bytearray, at: int, inner: Headers, rewrite: Rewrite) -> None:
    """Write the rewrite over the packet inside an error: it went the other way, so turned round."""
    four_tuple = reversed_key(rewrite.four_tuple)
    quoted = error[at:]
    quoted[rewrite.at : rewrite.end - 4] = four_tuple[:-4]
    if inner.version == 4:
        (check,) = unpack_u16(quoted, 10)
        pack_u16(quoted, 10, (check - rewrite.ip_delta) % 0xFFFF)
    _write_transport(
        quoted, inner.transport, inner, four_tuple[-4:], -rewrite.transport_delta, keeps_none=inner.protocol == UDP
    )
    error[at:] = quoted


def _write_transport(
    packet: bytearray | memoryview, at: int, headers: Headers, ports: bytes, change: int, *, keeps_none: bool
) -> None:
    """Write the ports, or the identifier, and add `change` to the checksum; `keeps_none`: where 0 means "none"."""
    if headers.protocol in WITH_PORTS:
        packet[at : at + 4] = ports
    elif headers.protocol in icmp.ECHO_REQUEST:
        packet[at + 4 : at + 6] = ports[:2] if packet[at] == icmp.ECHO_REQUEST[headers.protocol] else ports[2:]
    check_at = 2 if headers.protocol == ICMP else CHECKSUM_AT.get(headers.protocol)
    if check_at is None or at + check_at + 2 > len(packet):
        return  # a quoted packet may end before its checksum
    (check,) = unpack_u16(packet, at + check_at)
    if keeps_none and not check:
        return
    value = (check + change) % 0xFFFF
    never_zero = headers.protocol in (UDP, UDPLITE)  # RFC 768; RFC 3828 §3.1
    pack_u16(packet, at + check_at, value or 0xFFFF if never_zero else value)
