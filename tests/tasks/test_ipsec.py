"""What a policy of IPsec claims is refused, and ends."""

from dataclasses import replace
from ipaddress import ip_network

import pytest

from tests.craft import SYN, TCP, ends, tcp, udp
from tests.fakes.devices import ETH0, FAR4, HOST4, TUN4, UDP, WG0, Side, nat, opened
from tests.fakes.judges import EXCLUDED, Gate
from tunsplit.errors import KernelError
from tunsplit.host import IpsecPolicy
from tunsplit.kernel import xfrm
from tunsplit.tasks.ipsec import CLAIMED, Ipsec

FLOW = f"{TUN4}:5000 > {FAR4}:443"
POLICY = IpsecPolicy(ip_network(f"{HOST4}/32"), ip_network(f"{FAR4}/32"), 0, 0, 0, ETH0.index, 0, demands=True)


class Events:
    """News of policies; `lost` is what goes wrong."""

    def __init__(self):
        self.news = 0
        self.closed = False

    def waiting(self):
        return bool(self.news)

    def any(self):
        news, self.news = self.news, 0
        return bool(news)

    def fileno(self):
        return 4711

    def close(self):
        self.closed = True


class World:
    def __init__(self, monkeypatch):
        self.events, self.policies, self.error = Events(), (), None
        monkeypatch.setattr(xfrm, "follow", lambda: self.events)
        monkeypatch.setattr(xfrm, "policies", self.read)
        self.nat, self.uplink, self.tunnel = nat(), Side(), Side("tunnel", WG0)
        self.ended: list[object] = []
        self.ipsec = Ipsec(self.nat)
        self.ipsec.on_end = self.ended.append

    def read(self):
        if self.error:
            raise self.error
        return self.policies

    def become(self, *policies):
        self.policies = policies
        self.events.news += 1

    def claims(self, side=None, text=FLOW):
        return self.ipsec.claims(TCP, ends(text).key, (side or self.uplink).way())


@pytest.fixture
def world(monkeypatch):
    made = World(monkeypatch)
    yield made
    made.uplink.close()
    made.tunnel.close()


async def test_a_flow_is_claimed_by_the_address_and_device_that_it_leaves_by(world):
    assert not world.claims()
    world.become(POLICY)
    world.ipsec.hear()
    assert [True, False, False] == [
        world.claims(), world.claims(world.tunnel), world.claims(text=f"{TUN4}:5000 > 198.51.100.77:443")
    ]  # fmt: skip


async def test_a_policy_that_comes_ends_what_it_claims_and_nothing_else(world):
    claimed = opened(world.nat, FLOW, world.uplink.way(), protocol=TCP)
    other = opened(world.nat, f"{TUN4}:5001 > 198.51.100.77:443", world.uplink.way(), port=50001, protocol=TCP)
    world.become(POLICY)
    world.ipsec.hear()

    assert [claimed] == world.ended
    assert [False, True] == [claimed.passes, other.passes]


async def test_without_news_nobody_is_asked(world):
    world.policies = (POLICY,)
    world.ipsec.hear()

    assert not world.claims()


async def test_policies_that_cannot_be_read_are_read_the_next_time(world):
    world.become(POLICY)
    world.error = KernelError("no memory")
    with pytest.raises(KernelError):
        world.ipsec.hear()
    world.error = None
    world.ipsec.hear()

    assert world.claims()


async def test_what_bypasses_claims_nothing(world):
    world.become(replace(POLICY, demands=False), POLICY)
    world.ipsec.hear()

    assert not world.claims()


async def test_its_news_is_to_be_heard_first(world):
    assert [4711] == world.ipsec.descriptors()
    world.ipsec.close()
    assert world.events.closed


async def test_without_ipsec_there_is_no_news(world, monkeypatch):
    monkeypatch.setattr(xfrm, "follow", lambda: None)
    ipsec = Ipsec(world.nat)
    ipsec.hear()
    ipsec.close()

    assert [] == ipsec.descriptors()


async def test_where_policies_cannot_be_known_at_start_nothing_starts(world):
    """L21: nobody is to send in clear because a question failed."""
    world.error = KernelError("no memory")
    with pytest.raises(KernelError):
        Ipsec(world.nat)

    assert world.events.closed


@pytest.mark.parametrize("claimed", [True, False])
async def test_an_apps_and_a_guests_first_packet_is_refused_where_a_policy_claims_it(claimed):
    gate = Gate()
    try:
        gate.claimed = {443} if claimed else set()
        for protocol in (TCP, UDP):
            gate.source.knows(5000, EXCLUDED)
            packet = tcp(FLOW, flags=SYN) if protocol == TCP else udp(FLOW)
            gate.passes(packet)
            gate.forward.passed_by(bytes(10), packet, 1.0)
            for table, refused in ((gate.nat.outbound, gate.admit.refused), (gate.nat.forwarded, gate.forward.refused)):
                refusal = refused.get((protocol, ends(FLOW).key))
                assert claimed == (table.find(protocol, ends(FLOW).key) is None)
                assert claimed == (refusal is not None and refusal.reason.endswith(CLAIMED))
    finally:
        gate.close()
