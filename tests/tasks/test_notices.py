"""Apps are told of a flow that has ended, before they send anything."""

import dpkt
import pytest
import trio
import trio.testing

from tests.craft import ends
from tests.fakes.devices import FAR4, FAR6, ICMP, ICMPV6, SIGNER, TCP, TUN4, TUN6, UDP, FakeTun, Side, nat, opened
from tests.fakes.judges import as_real
from tunsplit.errors import KernelError
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.notices import BATCH, Notices
from tunsplit.tasks.tuns import Tuns

V4, V6 = f"{TUN4}:5000 > {FAR4}:53", f"[{TUN6}]:5000 > [{FAR6}]:53"


class FakeDiag:
    """Notes whose socket is to be destroyed."""

    def __init__(self):
        self.destroyed = []
        self.error = None

    def destroy(self, protocol, four_tuple, cookie):
        if self.error:
            raise self.error
        self.destroyed.append((protocol, four_tuple, cookie))
        return True


class Signer:
    """Who signs ICMP errors."""

    def own_router(self, version):
        return SIGNER[version]


class World:
    def __init__(self):
        self.tun, self.diag, self.side, self.nat = FakeTun(), FakeDiag(), Side(), nat()
        self.guests = FakeTun()
        answers = Answers(Tuns(as_real(self.tun), as_real(self.guests)), as_real(Signer()))
        self.notices = Notices(as_real(self.diag), answers)

    def flow(self, text=V4, protocol=UDP, port=50000):
        way = self.side.way(version=6 if "[" in text else 4)
        return opened(self.nat, text, way, protocol=protocol, port=port)


@pytest.fixture
async def world(nursery):
    made = World()
    nursery.start_soon(made.notices.tell)
    await trio.testing.wait_all_tasks_blocked()
    yield made
    made.tun.close()
    made.guests.close()
    made.side.close()


async def test_a_tcp_socket_is_destroyed_if_it_is_still_that_one(world):
    flow = world.flow(protocol=TCP)
    flow.cookie = b"12345678"
    world.notices.ended(flow)
    await trio.testing.wait_all_tasks_blocked()

    assert ([(TCP, flow.key, b"12345678")], []) == (world.diag.destroyed, world.tun.answers)


async def test_a_kernel_that_cannot_is_told_of(world, caplog):
    world.diag.error = KernelError("no SOCK_DESTROY")
    world.notices.ended(world.flow(protocol=TCP))
    world.notices.ended(world.flow())
    await trio.testing.wait_all_tasks_blocked()

    assert 1 == len(world.tun.answers)
    assert 1 == len(caplog.records)


@pytest.mark.parametrize(
    ("text", "kind", "code", "echo"), [(V4, 3, 13, ICMP), (V6, 1, 1, ICMPV6)], ids=["IPv4", "IPv6"]
)
async def test_who_waits_for_datagrams_or_pings_is_sent_an_error(world, text, kind, code, echo):
    world.notices.ended(world.flow(text))
    world.notices.ended(world.flow(text, protocol=echo, port=50001))
    await trio.testing.wait_all_tasks_blocked()

    for answer, protocol in zip(world.tun.answers, (UDP, echo), strict=True):
        packet = dpkt.ip.IP(answer) if text is V4 else dpkt.ip6.IP6(answer)
        error, quoted = packet.data, ends(text)
        assert (kind, code, quoted.source) == (error.type, error.code, packet.dst)
        inside = bytes(error.data.data)
        found = dpkt.ip.IP(inside) if text is V4 else dpkt.ip6.IP6(inside)
        assert (quoted.source, quoted.destination, protocol) == (found.src, found.dst, found.p)
        if protocol == UDP:
            assert (5000, 53) == (found.data.sport, found.data.dport)
        else:
            assert (5000).to_bytes(2, "big") == inside[-4:-2]  # the identifier


async def test_where_the_tun_has_no_such_address_nobody_is_told(world, monkeypatch):
    monkeypatch.setitem(SIGNER, 6, None)
    world.notices.ended(world.flow(V6))
    await trio.testing.wait_all_tasks_blocked()

    assert [] == world.tun.answers


async def test_others_have_their_turn_in_between(world):
    turns = []

    async def others():
        while len(world.diag.destroyed) < 3 * BATCH:
            turns.append(len(world.diag.destroyed))
            await trio.lowlevel.checkpoint()

    for number in range(3 * BATCH):
        world.notices.ended(world.flow(f"{TUN4}:{6000 + number} > {FAR4}:80", protocol=TCP, port=50000 + number))
    with trio.fail_after(5):
        await others()

    assert len(turns) > 2
