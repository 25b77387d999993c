"""NAT against a naive one: two dictionaries of texts, no expiry wheel, no deltas, no fast path."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from tests import craft
from tests.craft import ACK, FIN, RST, TCP, UDP
from tests.world import TUNNEL, UPLINK, Device, World, way
from tunsplit.engine.flow import Flow, FlowEvent, FlowState
from tunsplit.engine.nat import PORT_POOLS

INSIDE = {4: "10.128.0.1", 6: "[fd75::1]"}
OUTSIDE = {
    (UPLINK, 4): "192.0.2.7",
    (UPLINK, 6): "[2001:db8:50::2]",
    (TUNNEL, 4): "10.64.0.2",
    (TUNNEL, 6): "[fd64::2]",
}
PEERS = {4: ("1.1.1.1:53", "1.1.1.1:54", "8.8.8.8:53"), 6: ("[2001:db8::1]:53", "[2001:db8::2]:53")}
BUILD: dict[int, Callable[..., bytes]] = {TCP: craft.tcp, UDP: craft.udp}


@dataclass(frozen=True)
class Conversation:
    """A flow as its app sees it."""

    protocol: int
    inside: str
    peer: str
    device: Device
    outside: str


conversations = st.builds(
    lambda protocol, version, port, peer, device: Conversation(
        protocol, f"{INSIDE[version]}:{port}", PEERS[version][peer % len(PEERS[version])], device, ""
    ),
    st.sampled_from((TCP, UDP)), st.sampled_from((4, 6)), st.integers(5000, 5003), st.integers(0, 5),
    st.sampled_from((UPLINK, TUNNEL)),
)  # fmt: skip


class Nats(RuleBasedStateMachine):
    """Whatever is opened, sent, answered, closed, ended or idle: both say the same of every packet."""

    flows = Bundle("flows")

    def __init__(self) -> None:
        super().__init__()
        self.world = World(ports=(40000, 40011))
        self.open_flows: dict[tuple[int, str, str], tuple[Conversation, Flow]] = {}
        self.seen: dict[tuple[int, str, str], float] = {}

    def key(self, one: Conversation) -> tuple[int, str, str]:
        return one.protocol, one.inside, one.peer

    def alive(self, one: Conversation) -> bool:
        return self.open_flows.get(self.key(one), (None,))[0] == one

    def answered_by(self, protocol: int, peer: str, outside: str, device: Device) -> Conversation | None:
        for one, _ in self.open_flows.values():
            if (one.protocol, one.peer, one.outside, one.device) == (protocol, peer, outside, device):
                return one
        return None

    def choose(self, one: Conversation, source: str) -> int | None:
        """A port as tasks/portchoice.py draws it, without the kernel."""
        nat, leaving = self.world.nat, way(source.strip("[]"), one.device)
        key = craft.ends(f"{one.inside} > {one.peer}").key
        if (port := nat.mapped_port(one.protocol, key, leaving)) is not None:
            return port
        pool = nat.pools[PORT_POOLS[one.protocol]]
        if pool.must_reserve:
            pool.reserve(0.0)
        if (port := pool.draw()) is not None:
            in_use = {
                other.outside.rpartition(":")[2]
                for other, _ in self.open_flows.values()
                if other.protocol == one.protocol
            }
            assert str(port) not in in_use
            return port
        port = pool.some_live() if one.protocol == TCP else None
        return port if port is not None and nat.is_free(one.protocol, key, leaving, port) else None

    @rule(target=flows, one=conversations)
    def open(self, one: Conversation) -> Conversation:
        if self.key(one) in self.open_flows:
            return self.open_flows[self.key(one)][0]
        source = OUTSIDE[one.device, 6 if one.inside[0] == "[" else 4]
        same = {
            other.outside
            for other, _ in self.open_flows.values()
            if (other.protocol, other.inside, other.device) == (one.protocol, one.inside, one.device)
        }
        port = self.choose(one, source)
        if port is None:
            return one
        one = replace(one, outside=f"{source}:{port}")
        assert one.protocol == TCP or not same or {one.outside} == same  # one inside port, one outside port
        assert self.answered_by(one.protocol, one.peer, one.outside, one.device) is None
        leaving = way(source.strip("[]"), one.device)
        flow = self.world.nat.open(
            one.protocol, craft.ends(f"{one.inside} > {one.peer}").key, leaving, port, self.world.now
        )
        self.open_flows[self.key(one)] = one, flow
        self.seen[self.key(one)] = self.world.now
        return one

    @rule(one=flows, data=st.binary(max_size=8), finished=st.booleans())
    def send(self, one: Conversation, data: bytes, finished: bool) -> None:
        packet = BUILD[one.protocol](f"{one.inside} > {one.peer}", data)
        sent = self.world.sent(packet if finished else craft.unfinished(packet), finished=finished)
        found, _ = self.open_flows.get(self.key(one), (None, None))
        if found is None:
            assert sent is None
            return
        assert sent is not None
        self.seen[self.key(found)] = self.world.now
        expected = BUILD[one.protocol](f"{found.outside} > {found.peer}", data)
        assert expected == (sent if finished else craft.finished(sent))

    @rule(one=flows, other_peer=st.booleans(), other_device=st.booleans(), data=st.binary(max_size=8))
    def answer(self, one: Conversation, other_peer: bool, other_device: bool, data: bytes) -> None:
        if not one.outside:
            return
        device = ({UPLINK, TUNNEL} - {one.device}).pop() if other_device else one.device
        peer = one.peer[:-1] + "4" if other_peer else one.peer
        received = self.world.received(BUILD[one.protocol](f"{peer} > {one.outside}", data), device)
        found = self.answered_by(one.protocol, peer, one.outside, device)
        if found is None:
            assert received is None
            return
        self.seen[self.key(found)] = self.world.now
        assert BUILD[one.protocol](f"{peer} > {found.inside}", data) == received

    @rule(one=flows, reset=st.booleans(), from_app=st.booleans())
    def close(self, one: Conversation, reset: bool, from_app: bool) -> None:
        if one.protocol != TCP or not self.alive(one):
            return
        flow = self.open_flows[self.key(one)][1]
        there, back = f"{one.inside} > {one.peer}", f"{one.peer} > {one.outside}"
        for outbound in (from_app,) if reset else (from_app, not from_app):
            flags = RST if reset else FIN | ACK
            if outbound:
                assert self.world.sent(craft.tcp(there, flags=flags)) is not None
            else:
                assert self.world.received(craft.tcp(back, flags=flags), one.device) is not None
        assert FlowState.CLOSING is flow.state
        self.seen[self.key(one)] = self.world.now

    @rule(one=flows)
    def reopen(self, one: Conversation) -> None:
        if self.alive(one) and (flow := self.open_flows[self.key(one)][1]).state is FlowState.CLOSING:
            self.world.nat.reopen(flow, self.world.now)
            assert (FlowState.OPEN, False) == (flow.state, flow.finished)

    @rule(one=flows)
    def end(self, one: Conversation) -> None:
        if self.alive(one):
            _, flow = self.open_flows.pop(self.key(one))
            self.world.nat.end(flow, FlowEvent.BLOCK, self.world.now)

    @rule(device=st.sampled_from((UPLINK, TUNNEL)))
    @precondition(lambda self: len(self.open_flows) > 4)
    def lose_a_side(self, device: Device) -> None:
        for flow in self.world.nat.flows_of([device]):
            self.world.nat.end(flow, FlowEvent.BLOCK, self.world.now)
        self.world.nat.forget_device(device)
        self.open_flows = {key: pair for key, pair in self.open_flows.items() if pair[0].device is not device}

    @rule(seconds=st.sampled_from((0.5, 5, 11, 100, 241, 301, 8000)))
    def wait(self, seconds: float) -> None:
        idle = {key: flow.idle_s for key, (_, flow) in self.open_flows.items()}
        before = len(self.world.nat)
        gone = self.world.later(seconds)
        assert before - gone == len(self.world.nat)
        for key in tuple(self.open_flows):
            ends_at = self.seen[key] + idle[key]
            flow = self.open_flows[key][1]
            if flow.state is FlowState.GONE:
                assert ends_at <= self.world.now
                del self.open_flows[key]
            else:
                assert ends_at > self.world.now - 1  # looked at once a second
        for pool in self.world.nat.pools.values():
            pool.rested(self.world.now)

    @invariant()
    def the_tables_say_the_same(self) -> None:
        nat = self.world.nat
        assert len(self.open_flows) == len(nat)
        assert {id(flow) for _, flow in self.open_flows.values()} == {id(flow) for flow in nat}
        for protocol, name in ((TCP, "tcp"), (UDP, "udp")):
            live = {one.outside.rpartition(":")[2] for one, _ in self.open_flows.values() if one.protocol == protocol}
            assert len(live) == nat.pools[name].statistics()["live"]
        statistics = nat.statistics()
        assert statistics["mappings"] <= len(self.open_flows)
        assert statistics["closing"] == sum(flow.state is FlowState.CLOSING for flow in nat)
        if not self.open_flows:
            assert 0 == statistics["mappings"]

    @invariant()
    def forward_and_reply_are_inverses(self) -> None:
        for one, flow in self.open_flows.values():
            reply = self.world.nat.inbound(one.device).find(one.protocol, craft.ends(f"{one.peer} > {one.outside}").key)
            assert flow.reply is reply
            assert craft.ends(f"{one.peer} > {one.inside}").key == flow.reply.four_tuple
            assert craft.ends(f"{one.outside} > {one.peer}").key == flow.original.four_tuple


TestNats = Nats.TestCase
TestNats.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
