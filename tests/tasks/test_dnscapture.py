"""Questions in flows: who asks what is told the proxy, and its answers come from whom was asked."""

import gc

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.craft import ACK, RST, SYN, ends, fragments, tcp, udp, unfinished
from tests.fakes.devices import FAR4, FAR6, TCP, TUN4, TUN6, UDP
from tests.fakes.judges import EXCLUDED, INCLUDED, RELAY4, Gate
from tunsplit.engine.dnstable import DnsTable
from tunsplit.engine.flow import FlowEvent, Rewrite
from tunsplit.engine.policy import Verdict
from tunsplit.errors import KernelError, MalformedPacket
from tunsplit.tasks.dnscapture import Conversation, datagram_untrusted
from tunsplit.wire import vnet

ASK = f"{TUN4}:5000 > {FAR4}:53"
ASK6 = f"[{TUN6}]:5000 > [{FAR6}]:53"
BACK = f"{FAR4}:53 > {TUN4}:5000"
LISTENER = 4000
PEER = "10.128.0.2"


@pytest.fixture
def gate():
    made = Gate()
    made.source.knows(5000, EXCLUDED)
    yield made
    made.close()


def nothing_left(gate):
    return [[], []] == [gate.uplink.socket.frames, gate.tunnel.socket.frames]


@pytest.mark.parametrize("text", [ASK, ASK6])
def test_a_question_goes_to_the_proxy_and_its_answer_comes_from_whom_was_asked(gate, text):
    gate.passes(udp(text, b"question"))

    ((message, asker),) = gate.proxy.asked
    assert (b"question", Verdict.UPLINK, EXCLUDED, False) == (message, asker.verdict, asker.app.exe, asker.over_tcp)
    assert ends(text).destination == asker.asked.packed
    gate.proxy.replies[0](b"answer" * 5000)
    source, destination = text.split(" > ")
    assert [udp(f"{destination} > {source}", b"answer" * 5000)] == without_header_details(gate.tun.answers, text)
    assert nothing_left(gate)
    assert (1, 1) == (gate.flow(text, UDP).original.packets, gate.flow(text, UDP).reply.packets)


def without_header_details(packets, text):
    """As craft writes them: time to live, identification and flags are the sender's own."""
    version = 6 if "[" in text else 4
    shown = []
    for packet in packets:
        parsed = dpkt.ip.IP(packet) if version == 4 else dpkt.ip6.IP6(packet)
        source, destination = text.split(" > ")
        assert ends(f"{destination} > {source}").source == parsed.src
        shown.append(udp(f"{destination} > {source}", bytes(parsed.data.data)))
        assert parsed.data.sum == dpkt.udp.UDP(transport_of(shown[-1], version)).sum
    return shown


def transport_of(packet, version):
    return packet[20:] if version == 4 else packet[40:]


def test_a_super_packet_has_several_questions(gate):
    """UDP_SEGMENT: the tun hands over what the app sent in one call."""
    header = bytes((vnet.NEEDS_CSUM, 5)) + (42).to_bytes(2, "little") + (3).to_bytes(2, "little") + bytes(4)

    gate.passes(unfinished(udp(ASK, b"onetwothr")), header=header)

    assert [b"one", b"two", b"thr"] == [message for message, _ in gate.proxy.asked]


def test_a_fragment_is_no_question(gate):
    gate.passes(*fragments(udp(ASK, b"?" * 3000)))

    assert [] == gate.proxy.asked
    assert gate.dns.counters["dns_malformed"] == 3
    assert nothing_left(gate)


def test_an_answer_to_a_flow_that_has_ended_is_kept_back(gate):
    gate.passes(udp(ASK, b"?"))
    gate.nat.end(gate.flow(ASK, UDP), FlowEvent.BLOCK, gate.now)

    gate.proxy.replies[0](b"!")

    assert [] == gate.tun.answers
    assert 1 == gate.dns.counters["dns_answers_late"]


def test_a_flow_of_questions_that_has_ended_leaves_the_collector_nothing_to_do(gate):
    def alive():
        return [one for one in gc.get_objects() if isinstance(one, Rewrite | Conversation)]

    before = len(alive())
    gc.disable()
    try:
        gate.passes(udp(ASK, b"?"))
        gate.proxy.replies.pop()(b"!")
        assert 3 == len(alive()) - before
        gate.nat.end(gate.flow(ASK, UDP), FlowEvent.TIMEOUT, gate.now)
        assert 0 == len(alive()) - before
    finally:
        gc.enable()


def test_who_asks_is_looked_up_once_a_flow(gate):
    gate.passes(udp(ASK, b"1"), udp(ASK, b"2"))

    (_, first), (_, second) = gate.proxy.asked
    assert first is second


def test_the_vpns_client_is_told_as_such_from_the_moment_it_is_one(gate):
    for clients in (set(), {EXCLUDED}):
        gate.judge.clients = clients
        gate.passes(udp(ASK, b"?"))

    assert [False, True] == [asker.client for _, asker in gate.proxy.asked]


def test_a_question_of_nobody_knows_whom_is_dropped(gate, monkeypatch):
    """L21: whose row of the table is its own?"""
    gate.passes(udp(ASK, b"1"))

    def fail(_):
        raise KernelError("no room")

    monkeypatch.setattr(gate.dns._questions, "_is_client", fail)  # noqa: SLF001  what fails is the kernel's answer
    gate.passes(udp(ASK, b"2"))

    assert [b"1"] == [message for message, _ in gate.proxy.asked]
    assert 1 == gate.dns.counters["dns_askers_unknown"]


# TCP


@pytest.fixture
def listening(gate):
    gate.dns.listeners[4] = LISTENER
    return gate


def test_a_connection_comes_back_into_the_tun_to_our_listener(listening):
    listening.passes(tcp(ASK, flags=SYN))

    assert [tcp(f"{PEER}:1024 > {TUN4}:{LISTENER}", flags=SYN)] == listening.tun.answers
    assert nothing_left(listening)
    flow = listening.flow(ASK, TCP)
    assert flow is listening.dns.flow_of(listening.network.own_router(4), 1024, 4)
    assert ("uplink", "uplink") == (flow.side, flow.verdict)

    assert listening.dns.passed_by(vnet.NONE, tcp(f"{TUN4}:{LISTENER} > {PEER}:1024", flags=SYN | ACK), 100.0)
    assert tcp(BACK, flags=SYN | ACK) == listening.tun.answers[-1]


def test_each_connection_has_a_four_tuple_of_its_own_or_none(listening):
    listening.source.knows(5001, EXCLUDED)
    listening.passes(tcp(ASK, flags=SYN), tcp(ASK.replace("5000", "5001"), flags=SYN))

    assert listening.flow(ASK.replace("5000", "5001"), TCP) is None
    assert dpkt.ip.IP(listening.tun.answers[-1]).data.flags & RST


def test_what_our_listener_sends_in_a_flow_that_has_ended_is_refused(listening):
    listening.passes(tcp(ASK, flags=SYN))
    listening.nat.end(listening.flow(ASK, TCP), FlowEvent.BLOCK, listening.now)

    assert listening.dns.passed_by(vnet.NONE, tcp(f"{TUN4}:{LISTENER} > {PEER}:1024", b"late"), 100.0)

    refused = dpkt.ip.IP(listening.tun.answers[-1])
    assert (1024, LISTENER, RST) == (refused.data.sport, refused.data.dport, refused.data.flags & RST)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        tcp(f"{TUN4}:{LISTENER + 1} > {PEER}:1024"),
        tcp(f"{FAR4}:{LISTENER} > {PEER}:1024"),
        udp(f"{TUN4}:{LISTENER} > {PEER}:1024", bytes(20)),
        tcp(f"[{TUN6}]:{LISTENER} > [{FAR6}]:1024"),
    ],
)
def test_what_is_not_our_listeners_is_left_to_others(listening, packet):
    assert not listening.dns.passed_by(vnet.NONE, packet, 100.0)


def test_nobody_stands_behind_a_peer_that_no_flow_has(listening):
    assert listening.dns.flow_of(listening.network.own_router(4), 1024, 4) is None
    assert listening.dns.flow_of(listening.network.own_router(6), 1024, 6) is None


@pytest.mark.parametrize("flags", [ACK, SYN | ACK])
def test_a_connection_that_we_have_not_seen_begin_is_refused(listening, flags):
    listening.passes(tcp(ASK, flags=flags))

    assert listening.flow(ASK, TCP) is None
    assert dpkt.ip.IP(listening.tun.answers[-1]).data.flags & RST


def test_without_a_listener_connections_are_refused(gate):
    gate.passes(tcp(ASK, flags=SYN))

    assert dpkt.ip.IP(gate.tun.answers[-1]).data.flags & RST


# By the table


@pytest.mark.parametrize(("app", "side"), [(EXCLUDED, "tunnel"), (INCLUDED, "tunnel")])
def test_an_encrypted_question_leaves_by_its_row_and_keeps_its_verdict(gate, app, side):
    text = f"{TUN4}:5000 > {RELAY4}:853"
    gate.source.knows(5000, app)

    gate.passes(tcp(text, flags=SYN))

    flow = gate.flow(text, TCP)
    assert (side, "uplink" if app == EXCLUDED else "tunnel") == (flow.side, flow.verdict)
    assert 1 == len(gate.tunnel.socket.frames)


def test_what_goes_another_way_now_ends(gate):
    encrypted = f"{TUN4}:5001 > {RELAY4}:853"
    gate.source.knows(5001, INCLUDED)
    gate.passes(udp(ASK, b"?"), udp(encrypted, b"?"))
    gate.dns.review(gate.now)
    assert None not in (gate.flow(ASK, UDP), gate.flow(encrypted, UDP))

    gate.dns.table = DnsTable("linux", relay=(), listed_only=True)
    gate.dns.review(gate.now)

    assert [None, None] == [gate.flow(ASK, UDP), gate.flow(encrypted, UDP)]


@given(st.binary(max_size=100))
def test_garbage_is_no_datagram_and_nothing_worse(packet):
    try:
        start, end = datagram_untrusted(memoryview(packet))
    except MalformedPacket:
        return
    assert 0 < start <= end <= len(packet)
