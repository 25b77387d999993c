"""ICMP errors find the flow that they speak of; outside and inside are right, to the checksum (RFC 5508 §4)."""

import dpkt
import pytest

from tests import craft
from tests.craft import GRE, TCP, address, echo, ends, error, tcp, transport, udp
from tests.world import TUNNEL, unknown, way
from tunsplit.engine.flow import FlowEvent
from tunsplit.engine.slowpath import TooBig, Unknown

# Version, the app and its peer inside, the same outside, a router, kinds of error.
V4 = ("10.128.0.1", "192.0.2.7", "1.1.1.1", "203.0.113.1")
V6 = ("fd75::1", "2001:db8:50::2", "2001:db8::1", "2001:db8:ff::1")
BOTH = pytest.mark.parametrize(("own", "outside", "peer", "router"), [V4, V6], ids=["v4", "v6"])
UNREACHABLE, PORT = {False: 3, True: 1}, {False: 3, True: 4}  # by "is IPv6"
TIME_EXCEEDED = {False: 11, True: 3}


def at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def line(source: str, source_port: int, destination: str, destination_port: int) -> str:
    return f"{at(source, source_port)} > {at(destination, destination_port)}"


def opened(world, own, outside, peer, protocol=17):
    return world.open(line(own, 5000, peer, 53), outside=at(outside, 40000), protocol=protocol)


@BOTH
@pytest.mark.parametrize("build", [udp, tcp])
@pytest.mark.parametrize("quoted", ["whole", "8 bytes", "18 bytes"])
def test_an_error_of_a_router_reaches_the_app(world, own, outside, peer, router, build, quoted):
    opened(world, own, outside, peer, 17 if build is udp else TCP)
    size = {"whole": None, "8 bytes": 8, "18 bytes": 18}[quoted]
    v6 = ":" in own
    end = None if size is None else (40 if v6 else 20) + size

    cause = build(line(outside, 40000, peer, 53), b"what the app said")
    expected = build(line(own, 5000, peer, 53), b"what the app said")
    received = world.received_slowly(error(f"{router} > {outside}", cause[:end], TIME_EXCEEDED[v6]))
    assert [error(f"{router} > {own}", expected[:end], TIME_EXCEEDED[v6])] == received


@BOTH
def test_the_path_mtu_is_kept(world, own, outside, peer, router):
    opened(world, own, outside, peer)
    kind, code = (2, 0) if ":" in own else (3, 4)

    cause, expected = udp(line(outside, 40000, peer, 53), bytes(1400)), udp(line(own, 5000, peer, 53), bytes(1400))
    (received,) = world.received_slowly(error(f"{router} > {outside}", cause[:548], kind, code, word=1280))
    assert error(f"{router} > {own}", expected[:548], kind, code, word=1280) == received
    header = 40 if ":" in own else 20
    assert 1280 == int.from_bytes(received[header + 4 : header + 8], "big")


@BOTH
@pytest.mark.parametrize(("build", "protocol"), [(udp, 17), (tcp, 6)])
def test_a_path_that_is_too_narrow_is_told_apart(world, own, outside, peer, router, build, protocol):
    """For whom the error is not the kernel's to remember; the size is the packet's own word."""
    opened(world, own, outside, peer, protocol)
    kind, code = (2, 0) if ":" in own else (3, 4)
    cause = build(line(outside, 40000, peer, 53), bytes(1400))

    (told,) = world.told_too_big(error(f"{router} > {outside}", cause[:100], kind, code, word=1280))
    assert TooBig(1280, len(cause), 1 if protocol == 6 else None) == told
    assert [None] == world.told_too_big(error(f"{router} > {outside}", cause[:100], TIME_EXCEEDED[":" in own]))
    if ":" not in own:
        assert [None] == world.told_too_big(error(f"{router} > {outside}", cause[:100], 3, 1))


@BOTH
def test_an_error_about_an_echo(world, own, outside, peer, router):
    """Traceroute by ICMP."""
    world.echo(f"{own} > {peer}", 7, outside=at(outside, 40000))
    kind = TIME_EXCEEDED[":" in own]

    received = world.received_slowly(error(f"{router} > {outside}", echo(f"{outside} > {peer}", 40000, b"?"), kind))
    assert [error(f"{router} > {own}", echo(f"{own} > {peer}", 7, b"?"), kind)] == received


@BOTH
def test_an_error_about_another_protocol(world, own, outside, peer, router):
    world.open(line(own, 0, peer, 0), outside=at(outside, 0), protocol=GRE)
    kind = UNREACHABLE[":" in own]

    cause, expected = (transport(f"{one} > {peer}", GRE, bytes(20)) for one in (outside, own))
    received = world.received_slowly(error(f"{router} > {outside}", cause, kind))
    assert [error(f"{router} > {own}", expected, kind)] == received


@BOTH
def test_an_error_about_a_first_fragment(world, own, outside, peer, router):
    """Its checksum is of the whole datagram, so it is known from what left."""
    opened(world, own, outside, peer)
    data = bytes(range(200))
    kind = TIME_EXCEEDED[":" in own]

    cause, expected = (
        craft.fragments(udp(text, data), 104)[0] for text in (line(outside, 40000, peer, 53), line(own, 5000, peer, 53))
    )
    received = world.received_slowly(error(f"{router} > {outside}", cause, kind, 1))
    assert [error(f"{router} > {own}", expected, kind, 1)] == received


def test_a_quoted_datagram_without_a_checksum_stays_without(world):
    own, outside, peer, router = V4
    opened(world, own, outside, peer)

    cause = udp(line(outside, 40000, peer, 53), checksum=False)
    received = world.received_slowly(error(f"{router} > {outside}", cause, 3, 1))
    assert [error(f"{router} > {own}", udp(line(own, 5000, peer, 53), checksum=False), 3, 1)] == received


@BOTH
@pytest.mark.parametrize("build", [udp, tcp])
def test_an_error_of_the_apps_host_reaches_the_peer(world, own, outside, peer, router, build):
    """The app has closed its socket: port unreachable, with the peer's packet as the peer has sent it."""
    opened(world, own, outside, peer, 17 if build is udp else TCP)
    kind, code = UNREACHABLE[":" in own], PORT[":" in own]

    cause, expected = build(line(peer, 53, own, 5000), b"late"), build(line(peer, 53, outside, 40000), b"late")
    sent = world.sent_slowly(error(f"{own} > {peer}", cause, kind, code))
    assert [error(f"{outside} > {peer}", expected, kind, code)] == sent


@BOTH
def test_an_error_keeps_its_flow_alive_but_is_none_of_its_packets(world, own, outside, peer, router):
    flow = opened(world, own, outside, peer)
    world.now += 100

    world.received_slowly(
        error(f"{router} > {outside}", udp(line(outside, 40000, peer, 53)), TIME_EXCEEDED[":" in own])
    )
    assert (world.now, 0) == (flow.last_seen, flow.reply.packets)


# What finds no flow


@BOTH
def test_of_a_servers_answer_only_what_the_kernel_cannot_tell_its_socket_is_ours(world, own, outside, peer, router):
    """It left from the address that was asked; the socket is bound to every one, and looks for its way without."""
    key, kind, code = ends(line(own, 53, peer, 5000)).key, *((2, 0) if ":" in own else (3, 4))
    flow = world.nat.open_untranslated(
        17, key, way(outside), world.now, app=None, reason="", attribution="", asked=(address(outside), 53)
    )  # fmt: skip
    cause, as_sent = (udp(line(source, 53, peer, 5000), bytes(1400)) for source in (outside, own))
    too_big = error(f"{router} > {outside}", cause[:548], kind, code, word=1280)

    assert [error(f"{router} > {own}", as_sent[:548], kind, code, word=1280)] == world.received_slowly(too_big)
    assert [TooBig(1280, len(cause), None)] == world.told_too_big(too_big)
    refused = error(f"{router} > {outside}", cause[:548], UNREACHABLE[":" in own], PORT[":" in own])
    assert nobodys(world.received_slowly(refused))
    world.nat.end(flow, FlowEvent.TIMEOUT, world.now)
    assert nobodys(world.received_slowly(too_big))


def nobodys(outcome: list[bytes] | Unknown) -> bool:
    """Whether it is of no flow, and can be mistaken for none: no echo has such a key."""
    return unknown(outcome).key[-4:] == b"\xff" * 4


@BOTH
def test_errors_about_strangers_packets_reach_nobody(world, own, outside, peer, router):
    opened(world, own, outside, peer)
    kind = TIME_EXCEEDED[":" in own]
    cause = udp(line(outside, 40000, peer, 53))

    for packet in (
        error(f"{router} > {outside}", udp(line(outside, 40000, peer, 54)), kind),
        error(f"{router} > {outside}", udp(line(outside, 40001, peer, 53)), kind),
        error(f"{router} > {outside}", udp(line(peer, 53, outside, 40000)), kind),
        error(f"{router} > {outside}", tcp(line(outside, 40000, peer, 53)), kind),
    ):
        assert nobodys(world.received_slowly(packet))
    assert nobodys(world.received_slowly(error(f"{router} > {outside}", cause, kind), TUNNEL))
    assert not nobodys(world.received_slowly(udp(line(peer, 54, outside, 40000))))


@BOTH
def test_an_error_goes_to_whom_its_cause_came_from(world, own, outside, peer, router):
    """Else an address of the host that the flow does not use would be rewritten, with a wrong checksum."""
    opened(world, own, outside, peer)
    kind = TIME_EXCEEDED[":" in own]
    other = "192.0.2.8" if own == V4[0] else "2001:db8:50::3"

    assert nobodys(world.received_slowly(error(f"{router} > {other}", udp(line(outside, 40000, peer, 53)), kind)))
    answer = udp(line(peer, 53, own, 5000))
    assert nobodys(world.sent_slowly(error(f"{own} > {router}", answer, kind)))
    assert nobodys(world.sent_slowly(error(f"{other} > {peer}", answer, kind)))


def test_an_error_is_never_taken_for_a_ping_that_waits(world):
    """The packet inside is an echo's: by its key the error would be held and sent with the ping."""
    own, _, peer, _ = V4
    waiting = unknown(world.sent_slowly(echo(f"{own} > {peer}", 7)))
    stray = unknown(world.sent_slowly(error(f"{own} > {peer}", echo(f"{peer} > {own}", 7, reply=True), 3, 1)))

    assert waiting.key != stray.key
    assert ends(f"{own}:7 > {peer}:0").key == waiting.key


@pytest.mark.parametrize(
    ("text", "quoted"), [("203.0.113.1 > 192.0.2.7", b"\x45"), ("2001:db8:ff::1 > fd75::1", b"\x60")]
)
def test_an_error_about_nothing_is_malformed(world, text, quoted):
    assert [] == world.received_slowly(error(text, quoted, 3))
    assert [] == world.sent_slowly(error(text, quoted, 3))
    assert 2 == world.counters["malformed"]


def test_what_we_call_right_dpkt_calls_right(world):
    """The comparison above, once by dpkt's own reading of the packet."""
    own, outside, peer, router = V4
    opened(world, own, outside, peer)
    (received,) = world.received_slowly(error(f"{router} > {outside}", udp(line(outside, 40000, peer, 53)), 3, 1))

    outer = dpkt.ip.IP(received)
    assert (0, 0) == (dpkt.dpkt.in_cksum(received[:20]), dpkt.dpkt.in_cksum(received[20:]))
    inner = outer.data.data.data
    assert (craft.address(own), 5000, 53) == (inner.src, inner.data.sport, inner.data.dport)
