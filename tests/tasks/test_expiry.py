"""What is due ends, and ports rest and are given back."""

from collections import Counter

import pytest
import trio

from tests.craft import ends
from tests.fakes.devices import FAR4, TCP, TUN4, UDP, opened
from tests.tasks.portstage import FLOW, World
from tunsplit.engine.flow import LINGER_S, UDP_S, App, Flow, FlowEvent, FlowState
from tunsplit.engine.fragments import Fragments
from tunsplit.engine.ports import REST_S
from tunsplit.errors import KernelError
from tunsplit.tasks import expiry
from tunsplit.tasks.portchoice import SETS

COOKIE = b"8 bytes."


@pytest.fixture
def world():
    made = World()
    yield made
    made.side.close()


def test_a_port_rests_before_the_kernel_gets_it_back(world):
    flow = world.open()
    port = int.from_bytes(flow.outside[-4:-2], "big")
    world.nat.end(flow, FlowEvent.TIMEOUT, 10.0)

    world.ports.rest(10.0 + REST_S - 1)
    assert port in world.live.sets[SETS["tcp"][0]]

    world.ports.rest(10.0 + REST_S)
    assert port not in world.live.sets[SETS["tcp"][0]]


async def test_once_a_second_what_is_due_ends(world, nursery, autojump_clock):
    pieces = Fragments()
    counters: Counter[str] = Counter()
    nursery.start_soon(expiry.expire, world.nat, world.ports, [pieces], world.handovers, counters)
    start = trio.current_time()
    key = ends(FLOW).key
    port = world.choose(UDP)
    world.nat.open(UDP, key, world.way, port, start)
    await trio.sleep(290)
    assert 1 == len(world.nat)

    await trio.sleep(20)
    assert 0 == len(world.nat)
    assert port in world.live.sets[SETS["udp"][0]]

    await trio.sleep(REST_S)
    assert port not in world.live.sets[SETS["udp"][0]]


async def test_a_kernel_that_does_not_listen_ends_nothing(world, nursery, autojump_clock, caplog):
    flow = opened(world.nat, FLOW, world.way)
    world.nat.end(flow, FlowEvent.TIMEOUT, trio.current_time())
    world.live.error = KernelError("nft: no")
    counters: Counter[str] = Counter()
    nursery.start_soon(expiry.expire, world.nat, world.ports, [], world.handovers, counters)

    await trio.sleep(REST_S + 5)

    assert {"ports_not_told": 1} == counters
    assert ["ports cannot be given back"] == [record.message for record in caplog.records]


def with_cookie(world, protocol):
    now = trio.current_time()
    return world.nat.open(protocol, ends(FLOW).key, world.way, world.choose(protocol), now, cookie=COOKIE)


@pytest.mark.parametrize(("protocol", "left"), [(UDP, 0), (TCP, 1)])
async def test_a_udp_flow_ends_soon_after_its_socket(world, nursery, autojump_clock, protocol, left):
    """A TCP connection says so itself: its last packets may still be under way."""
    with_cookie(world, protocol)
    nursery.start_soon(expiry.expire, world.nat, world.ports, [], world.handovers, Counter())
    world.deaths.dies(5000, COOKIE, protocol)
    world.deaths.dies(5000, b"another.", protocol)

    await trio.sleep(LINGER_S + 5)
    assert left == len(world.nat)


async def test_without_news_of_dead_sockets_flows_end_by_time(world, nursery, autojump_clock, caplog):
    with_cookie(world, UDP)
    world.deaths.fails = "sock_diag: no"
    nursery.start_soon(expiry.expire, world.nat, world.ports, [], world.handovers, world.counters)

    await trio.sleep(UDP_S + 5)
    assert 0 == len(world.nat)
    assert world.counters["socket_deaths_failed"] > 100
    assert 1 == len(caplog.records)


def open_until_none_is_left(world, user):
    """One datagram from each of a user's sockets, one a millisecond; the flows."""
    flows: list[Flow] = []
    for number in range(1024 + 16384 * (user - 1000), 65536):
        text = f"{TUN4}:{number} > {FAR4}:53"
        if (port := world.choose(UDP, text, user=user)) is None:
            break
        key, app = ends(text).key, App(100, "", user)
        flows.append(world.nat.open(UDP, key, world.way, port, number / 1000, app=app))
    return flows


def test_when_ports_run_out_the_flows_that_are_idle_for_longest_give_theirs(world):
    flows = [*open_until_none_is_left(world, 1000), *open_until_none_is_left(world, 1001)]
    assert world.choose(UDP, f"{TUN4}:900 > {FAR4}:53", now=100.0, user=1002) is not None

    gone = {flow for flow in flows if flow.state is FlowState.GONE}
    assert set(flows[: len(gone)]) == gone != set()


def test_one_user_leaves_a_quarter_of_the_ports_to_others(world):
    """L35: who wants more than his share gives a port of his own for it; if none is idle, he has to wait."""
    flows = open_until_none_is_left(world, 1000)
    assert 16384 * 3 // 4 == len(flows)
    text = f"{TUN4}:901 > {FAR4}:53"
    others = world.nat.open(UDP, ends(text).key, world.way, world.choose(UDP, text, user=1001), 0.0)

    assert world.choose(UDP, f"{TUN4}:902 > {FAR4}:53", now=flows[-1].opened + 20, user=1000)
    assert FlowState.OPEN is others.state
    assert FlowState.GONE is flows[0].state
