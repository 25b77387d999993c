"""Guests' first packets: nobody of this host is asked for, and nobody's flow is taken for theirs."""

import dpkt
import pytest

from tests.craft import ACK, RST, SYN, echo, ends, fragments, tcp, transport, udp
from tests.fakes.devices import FAR4, FAR6, HOST4, ICMP, TCP, TUN4, UDP
from tests.fakes.gates import in_words
from tests.fakes.judges import EXCLUDED, INCLUDED, Gate, policy
from tunsplit.engine.flow import FlowState
from tunsplit.engine.policy import Verdict
from tunsplit.errors import KernelError

GUEST4, GUEST6 = "172.17.0.2", "fd17::2"
WEB, WEB6 = f"{GUEST4}:5000 > {FAR4}:80", f"[{GUEST6}]:5000 > [{FAR6}]:80"
ASK = f"{GUEST4}:5000 > {FAR4}:53"
SAME = f"{TUN4}:5000 > {FAR4}:80"  # what a masquerade could make of it, and an app could send


@pytest.fixture
def gate():
    made = Gate()
    made.judge.policy = policy(forwarded=Verdict.UPLINK)
    yield made
    made.close()


def guests_send(gate, *packets):
    for packet in packets:
        gate.forward.passed_by(bytes(10), packet, gate.now)


def flow(gate, text, protocol=TCP):
    found = gate.nat.forwarded.find(protocol, ends(text).key)
    return found.flow if found else None


def told(gate):
    """What the guest was told, in words; nobody else was told anything."""
    assert [] == gate.tun.answers
    return [in_words(answer) for answer in gate.guests.answers]


@pytest.mark.parametrize("side", [Verdict.UPLINK, Verdict.TUNNEL])
@pytest.mark.parametrize(("text", "protocol"), [(WEB, TCP), (WEB6, TCP), (WEB, UDP)])
def test_a_guest_is_on_its_side_and_nobody_is_asked_whose_it_is(gate, side, text, protocol):
    gate.judge.policy = policy(forwarded=side)
    guests_send(gate, tcp(text, flags=SYN) if protocol == TCP else udp(text))

    opened = flow(gate, text, protocol)
    assert (side.value, side.value, "forwarded", "", None) == (
        opened.side, opened.verdict, opened.reason, opened.attribution, opened.app,
    )  # fmt: skip
    sent, other = (gate.uplink, gate.tunnel) if side is Verdict.UPLINK else (gate.tunnel, gate.uplink)
    assert (1, []) == (len(sent.socket.packets), other.socket.packets)
    assert [] == gate.source.asked + gate.source.searched


def test_the_same_four_tuple_may_be_an_apps_and_a_guests(gate):
    gate.source.knows(5000, INCLUDED)
    gate.passes(tcp(SAME, flags=SYN))
    guests_send(gate, tcp(SAME, flags=SYN))

    assert ("tunnel", "uplink") == (gate.flow(SAME, TCP).side, flow(gate, SAME).side)
    assert {False, True} == {one.forwarded for one in gate.nat}


def test_an_apps_packet_does_not_pass_by_a_guests_flow(gate):
    guests_send(gate, udp(SAME))
    gate.source.knows(5000, INCLUDED)
    gate.uplink.socket.frames.clear()
    gate.passes(udp(SAME))

    assert [] == gate.uplink.socket.frames
    assert 1 == len(gate.tunnel.socket.frames)


async def test_replies_go_back_to_whom_they_are_for(gate, nursery):
    gate.source.knows(5000, EXCLUDED)
    gate.passes(udp(SAME))
    guests_send(gate, udp(WEB))
    gate.pump.attach(gate.uplink.device)
    for one in gate.nat:
        port = int.from_bytes(one.outside[-4:-2], "big")
        gate.uplink.socket.delivers(
            udp(f"{FAR4}:80 > {HOST4}:{port}", b"for a guest" if one.forwarded else b"for an app")
        )
    gate.pump.turn()

    assert [b"for an app"] == [dpkt.ip.IP(packet).data.data for packet in gate.tun.answers]
    assert [b"for a guest"] == [dpkt.ip.IP(packet).data.data for packet in gate.guests.answers]
    assert [GUEST4] == [".".join(map(str, dpkt.ip.IP(packet).dst)) for packet in gate.guests.answers]


def test_a_syn_once_more_passes_and_one_after_the_end_is_another_flow(gate):
    guests_send(gate, tcp(WEB, flags=SYN), tcp(WEB, flags=SYN))
    first = flow(gate, WEB)
    assert (2, FlowState.OPEN) == (first.original.packets, first.state)

    guests_send(gate, tcp(WEB, flags=RST), tcp(WEB, flags=SYN))
    assert flow(gate, WEB) is not first


def test_what_is_older_than_tunsplit_is_refused(gate):
    guests_send(gate, tcp(WEB, b"segment", flags=ACK))

    assert ["reset"] == told(gate)
    assert [] == gate.uplink.socket.frames + gate.tunnel.socket.frames


@pytest.mark.parametrize(("packet", "answer"), [(tcp(WEB, flags=SYN), "reset"), (udp(WEB), "icmp 3/13 from us")])
def test_blocked_guests_are_told_at_once_and_it_is_shown(gate, packet, answer):
    gate.judge.policy = policy(forwarded=Verdict.BLOCK)
    guests_send(gate, packet)

    assert [answer] == told(gate)
    assert ["forwarded"] == [refusal.reason for refusal in gate.forward.refused.values()]
    assert [] == gate.uplink.socket.frames + gate.tunnel.socket.frames


def test_where_the_side_has_no_way_they_are_told_too(gate):
    gate.network.closed.add("uplink")
    guests_send(gate, tcp(WEB, flags=SYN))

    assert ["reset"] == told(gate)
    assert ["forwarded; the uplink has no way there"] == [one.reason for one in gate.forward.refused.values()]


def test_without_ports_or_an_answer_of_the_kernel_nothing_is_guessed(gate):
    gate.ports.room = False
    guests_send(gate, udp(WEB))
    gate.ports.error = KernelError("no answer")
    guests_send(gate, udp(f"{GUEST4}:5001 > {FAR4}:80"))

    assert ["icmp 3/13 from us"] * 2 == told(gate)
    assert [] == gate.uplink.socket.frames


def test_other_protocols_are_refused_unless_they_are_listed(gate):
    guests_send(gate, transport(f"{GUEST4}:0 > {FAR4}:0", 47, bytes(20)))
    assert ["protocol not listed"] == [one.reason for one in gate.forward.refused.values()]

    made = Gate(protocols=frozenset({47}))
    try:
        made.judge.policy = policy(forwarded=Verdict.UPLINK)
        for guest in (GUEST4, "172.17.0.3"):
            guests_send(made, transport(f"{guest}:0 > {FAR4}:0", 47, bytes(20)))
        assert 1 == len(made.uplink.socket.packets)  # two guests towards one peer cannot be told apart
    finally:
        made.close()


def test_what_is_for_nobody_is_dropped(gate):
    guests_send(gate, udp(f"{GUEST4}:5353 > 224.0.0.251:5353"), tcp(WEB, flags=RST))

    assert [] == told(gate)
    assert (1, 1) == (gate.forward.counters["forwarded_multicast"], gate.forward.counters["forwarded_reset_of_no_flow"])


def test_fragments_follow_their_flow(gate):
    pieces = fragments(udp(WEB, bytes(4000)), 1480)
    guests_send(gate, *pieces)

    assert len(pieces) == len(gate.uplink.socket.packets)


def test_echo_is_mapped_like_an_apps(gate):
    guests_send(gate, echo(f"{GUEST4} > {FAR4}", 77))

    assert flow(gate, f"{GUEST4}:77 > {FAR4}:0", ICMP).pooled


def test_a_guests_question_goes_to_the_proxy_and_is_answered_into_its_tun(gate):
    guests_send(gate, udp(ASK, b"question"))

    ((message, asker),) = gate.proxy.asked
    assert (b"question", Verdict.UPLINK, None) == (message, asker.verdict, asker.app)
    gate.proxy.replies[0](b"answer")
    assert [b"answer"] == [dpkt.ip.IP(packet).data.data for packet in gate.guests.answers]
    assert [] == gate.tun.answers


def test_a_guests_question_over_tcp_comes_to_our_listener_and_its_answer_to_the_guest(gate):
    gate.dns.listeners[4] = 4000
    guests_send(gate, tcp(ASK, flags=SYN))

    (segment,) = gate.tun.answers
    assert (TUN4, 4000) == (".".join(map(str, dpkt.ip.IP(segment).dst)), dpkt.ip.IP(segment).data.dport)
    peer = dpkt.ip.IP(segment).data.sport
    assert gate.dns.passed_by(bytes(10), tcp(f"{TUN4}:4000 > 10.128.0.2:{peer}", flags=SYN | ACK), gate.now)
    (answer,) = gate.guests.answers
    assert (53, 5000) == (dpkt.ip.IP(answer).data.sport, dpkt.ip.IP(answer).data.dport)


def test_what_the_configuration_says_anew_ends_what_is_on_the_other_side(gate):
    guests_send(gate, tcp(WEB, flags=SYN))
    gate.forward.judge_again(gate.now)
    assert FlowState.OPEN is flow(gate, WEB).state

    gate.judge.policy = policy(forwarded=Verdict.TUNNEL)
    gate.forward.judge_again(gate.now)
    assert None is flow(gate, WEB)
    guests_send(gate, tcp(WEB, b"late", flags=ACK))
    assert ["reset"] == told(gate)


def test_another_verdict_leaves_apps_alone(gate):
    gate.source.knows(5000, EXCLUDED)
    gate.passes(tcp(SAME, flags=SYN))
    gate.judge.policy = policy(forwarded=Verdict.BLOCK)
    gate.forward.judge_again(gate.now)

    assert FlowState.OPEN is gate.flow(SAME, TCP).state
