"""Packets for Hypothesis: valid ones of every kind, bent ones, and bytes that are none."""

from hypothesis import strategies as st

from tests import craft

INSIDE = {4: "10.128.0.1", 6: "[fd75::1]"}
OUTSIDE = {4: "192.0.2.7", 6: "[2001:db8:50::2]"}
PEERS = {4: ("1.1.1.1", "8.8.8.8"), 6: ("[2001:db8::1]", "[2001:db8::2]")}

ports = st.one_of(st.sampled_from((5000, 53, 40000, 40001, 40002, 40003)), st.integers(0, 65535))
data = st.binary(max_size=64)


def bare(text: str) -> str:
    """The address without brackets, for packets without ports."""
    return text.strip("[]")


@st.composite
def packets(draw: st.DrawFn, *, inbound: bool = False) -> bytes:
    """A valid packet from the inside to a peer, or from a peer to the outside, of any kind that a flow may have."""
    version = draw(st.sampled_from((4, 6)))
    own, peer = (OUTSIDE if inbound else INSIDE)[version], draw(st.sampled_from(PEERS[version]))
    if inbound:
        own, peer = peer, own
    plain, bare_line = f"{own}:{draw(ports)} > {peer}:{draw(ports)}", f"{bare(own)} > {bare(peer)}"
    kind = draw(st.sampled_from(("tcp", "udp", "echo", "reply", "error", "dccp", "udplite", "gre", "esp")))
    body = draw(data)
    if kind == "tcp":
        options = draw(st.sampled_from((b"", b"\x01\x01\x08\x0a" + bytes(8))))
        return craft.tcp(plain, body, flags=draw(st.integers(0, 31)), options=options)
    if kind == "udp":
        return craft.udp(plain, body, checksum=draw(st.booleans()))
    if kind in ("echo", "reply"):
        return craft.echo(bare_line, draw(ports), body, reply=kind == "reply")
    if kind == "error":
        quoted = craft.udp(f"{peer}:{draw(ports)} > {own}:{draw(ports)}", body)
        return craft.error(bare_line, quoted, draw(st.integers(1, 13)), draw(st.integers(0, 15)))
    protocol = {"dccp": craft.DCCP, "udplite": craft.UDPLITE, "gre": craft.GRE, "esp": 50}[kind]
    return craft.transport(bare_line, protocol, bytes(12) + body)


@st.composite
def wrapped(draw: st.DrawFn, *, inbound: bool = False) -> bytes:
    """A valid packet with options or extension headers, or one piece of it."""
    packet = draw(packets(inbound=inbound))
    if packet[0] >> 4 == 4:
        choices = (b"", b"\x01\x01\x01\0", craft.RECORD_ROUTE, craft.LOOSE_SOURCE_ROUTE)
        packet = craft.with_options(packet, draw(st.sampled_from(choices)))
    else:
        kinds = st.sampled_from((craft.HOP_BY_HOP, craft.DESTINATION_OPTIONS, craft.ROUTING, craft.FRAGMENT))
        return craft.with_extensions(packet, *((kind, craft.PADDING) for kind in draw(st.lists(kinds, max_size=3))))
    if draw(st.booleans()) and packet[0] == 0x45:
        pieces = craft.fragments(packet, 8 * draw(st.integers(1, 4)))
        return draw(st.sampled_from(pieces))
    return packet


@st.composite
def bent(draw: st.DrawFn, *, inbound: bool = False) -> bytes:
    """A packet that was valid before some bytes of it were changed, cut off or added."""
    packet = bytearray(draw(wrapped(inbound=inbound)))
    for _ in range(draw(st.integers(0, 3))):
        packet[draw(st.integers(0, min(len(packet), 80) - 1))] = draw(st.integers(0, 255))
    return bytes(packet[: draw(st.integers(0, len(packet)))]) + draw(st.binary(max_size=3))


untrusted = st.one_of(st.binary(max_size=120), bent(), bent(inbound=True))
