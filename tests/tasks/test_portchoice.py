"""NAT's outside ports: nobody else's, and known to the kernel before they are used."""

import logging
from collections import Counter

import pytest
import trio

from tests.craft import ends
from tests.fakes.devices import FAR4, HOST4, ICMP, TCP, TUN4, UDP, Side, opened
from tests.fakes.judges import FakeDeaths, as_real
from tunsplit.engine.flow import LINGER_S, UDP_S, App, Flow, FlowEvent, FlowState
from tunsplit.engine.fragments import Fragments
from tunsplit.engine.hold import Hold
from tunsplit.engine.nat import Nat
from tunsplit.engine.ports import BATCH, REST_S, PortPool
from tunsplit.errors import KernelError
from tunsplit.kernel.conntrack import Entry, Tuple
from tunsplit.kernel.liveports import TableMissing
from tunsplit.tasks import expiry, portchoice
from tunsplit.tasks.handovers import Handovers
from tunsplit.tasks.portchoice import SETS, Asked, PortChoice

FLOW = f"{TUN4}:5000 > {FAR4}:443"
GRE = 47


class FakeLivePorts:
    """The sets of the nft table."""

    def __init__(self):
        self.sets: dict[str, set[int]] = {name: set() for names in SETS.values() for name in names}
        self.error: Exception | None = None
        self.missing = False

    def _check(self):
        if self.missing:
            raise TableMissing("gone")
        if self.error:
            raise self.error

    def is_there(self):
        return not self.missing

    def add(self, name, ports):
        self._check()
        self.sets[name].update(ports)

    def delete(self, name, ports):
        self._check()
        self.sets[name].difference_update(ports)


class FakeKernel:
    """Both SockDiag and Conntrack, on a host where nobody else has a port."""

    def __init__(self):
        self.error: Exception | None = None
        self.asked: list[tuple[object, ...]] = []
        self.tracked: dict[tuple[object, ...], Entry] = {}

    def is_bound(self, *_):
        if self.error:
            raise self.error
        return False

    def has_entry(self, *what):
        self.asked.append(what)
        return False

    def find(self, protocol, *what):
        self.asked.append(what)
        return self.tracked.get(what) if protocol == UDP else None


class World:
    def __init__(self):
        self.deaths, self.counters = FakeDeaths(), Counter[str]()
        self.handovers = Handovers(as_real(self.deaths), Hold(1.0), self.counters)
        self.side = Side("tunnel")
        self.nat = Nat({name: PortPool(49152, 65535, lambda _: 0) for name in ("tcp", "udp", "echo")})
        self.live, self.kernel = FakeLivePorts(), FakeKernel()
        self.ports = PortChoice(self.nat, as_real(self.live), as_real(self.kernel), as_real(self.kernel))
        self.told: list[str] = []
        self.ports.on_missing = lambda: self.told.append("missing")
        self.way = self.side.way()

    def choose(self, protocol=TCP, text=FLOW, now=0.0, user=None):
        return self.ports.choose(protocol, ends(text).key, self.way, now, user)

    def open(self, protocol=TCP, text=FLOW):
        port = self.choose(protocol, text)
        return self.nat.open(protocol, ends(text).key, self.way, port, 0.0)

    def take_all_but(self, count, name="tcp"):
        pool = self.nat.pools[name]
        while (places := pool.statistics())["free"] or places["reserved"] > count:
            if pool.must_reserve:
                pool.reserve()
            pool.draw()


@pytest.fixture
def world():
    made = World()
    yield made
    made.side.close()


@pytest.mark.parametrize(("protocol", "pool"), [(TCP, "tcp"), (UDP, "udp"), (ICMP, "echo")])
def test_the_kernel_knows_a_port_before_it_is_used(world, protocol, pool):
    port = world.choose(protocol)

    assert all(port in world.live.sets[name] for name in SETS[pool])
    assert BATCH == len(world.live.sets[SETS[pool][0]])
    assert world.ports.taken()[SETS[pool][0]].count(port) == 1


def test_a_protocol_without_ports_has_one_flow_for_each_pair_of_addresses(world):
    text = f"{TUN4} > {FAR4}"
    assert 0 == world.choose(GRE, text)
    world.nat.open(GRE, ends(text).key, world.way, None, 0.0)

    assert world.choose(GRE, text) is None
    assert set() == set().union(*world.live.sets.values())


def test_ports_are_told_in_batches(world):
    for number in range(BATCH):
        world.open(text=f"{TUN4}:{number + 1} > {FAR4}:443")

    assert BATCH == len(world.live.sets[SETS["tcp"][0]])


@pytest.mark.parametrize("whose", ["is_bound", "has_entry"])
def test_a_port_of_somebody_else_is_left_to_him(world, whose):
    asked = []

    def only_the_first(*what):
        asked.append(what)
        return len(asked) == 1

    setattr(world.kernel, whose, only_the_first)
    port = world.choose()

    first = asked[0][-1]
    assert port not in (None, first)
    assert first not in world.live.sets[SETS["tcp"][0]]
    assert first not in world.ports.taken()[SETS["tcp"][0]]
    assert 1 == world.ports.counters["port_in_use"]


def test_connections_are_asked_for_as_they_would_come_in(world):
    port = world.choose()

    assert [(TCP, ends(FLOW).destination, world.way.source, 443, port)] == world.kernel.asked


def test_echo_identifiers_are_nobody_s_port(world):
    world.kernel.error = KernelError("not to be asked")

    assert world.choose(ICMP)


def test_one_socket_keeps_its_port_towards_everybody(world):
    first = world.open(UDP)
    second = world.open(UDP, f"{TUN4}:5000 > {FAR4}:444")

    assert first.outside[4 + 4 : 4 + 6] == second.outside[8:10]


def test_when_all_ports_are_live_a_connection_shares_one_towards_another_destination(world):
    world.take_all_but(1)
    only = world.open()

    port = world.ports.choose(TCP, ends(f"{TUN4}:5001 > {FAR4}:444").key, world.way, 0.0)

    assert port is not None
    assert port in world.nat.pools["tcp"].taken()
    assert only


def test_when_none_can_be_shared_the_oldest_closing_flow_gives_way(world, monkeypatch):
    monkeypatch.setattr(world.ports, "_shared", lambda *_: None)
    world.take_all_but(1)
    old = world.open()
    world.nat.close(old)

    assert int.from_bytes(old.outside[-4:-2], "big") == world.choose(text=f"{TUN4}:5001 > {FAR4}:443")


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_when_nothing_is_left_nothing_is_given(world, protocol, monkeypatch):
    monkeypatch.setattr(world.nat, "is_free", lambda *_: False)
    world.take_all_but(0, "tcp" if protocol == TCP else "udp")

    assert world.choose(protocol) is None
    assert 1 == world.ports.counters["ports_exhausted"]


def test_it_does_not_look_for_ever(world):
    world.kernel.is_bound = lambda *_: True

    assert world.choose() is None
    assert portchoice.MOST_TRIES == world.ports.counters["port_in_use"]


# Failures


def test_ports_that_the_kernel_was_not_told_of_are_not_used(world):
    world.live.error = KernelError("nft: no memory")
    with pytest.raises(KernelError):
        world.choose()
    assert {"free": 16384, "reserved": 0, "live": 0, "resting": 0} == world.nat.pools["tcp"].statistics()

    world.live.error = None

    assert world.choose() in world.live.sets[SETS["tcp"][0]]


def test_a_port_that_could_not_be_judged_is_given_back(world):
    world.kernel.error = KernelError("bind: too many files")
    with pytest.raises(KernelError):
        world.choose()

    assert 0 == world.nat.pools["tcp"].statistics()["live"]
    assert BATCH - 1 == len(world.live.sets[SETS["tcp"][0]])


def test_a_missing_table_is_told_and_does_not_stop_flows(world, caplog):
    world.live.missing = True

    assert world.choose()
    assert ["missing"] == world.told
    assert [logging.WARNING] == [record.levelno for record in caplog.records]


def test_it_is_seen_also_while_no_flow_opens(world):
    world.live.missing = True

    world.ports.rest(1.0)

    assert ["missing"] == world.told


# Rest


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


COOKIE = b"8 bytes."


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


# Answers

PEER, FIRST, SECOND, TUNNEL = (ends(f"{text} > {FAR4}").source for text in (FAR4, HOST4, "192.168.50.3", "10.64.0.2"))
OWN = [SECOND, TUNNEL, FIRST]


def track(world, own, *, asked=None, port=8080):
    """Somebody has asked this address of ours at port 80, which leads to `port` of `asked`."""
    entry = Entry(Tuple(PEER, own, 5000, 80), Tuple(asked or own, PEER, port, 5000))
    world.kernel.tracked[asked or own, PEER, port, 5000] = entry


def answers(world, source):
    return world.ports.asked(ends(f"{source}:8080 > {FAR4}:5000").key, world.way, OWN)


@pytest.mark.parametrize("own", OWN)
def test_an_answer_from_everywhere_is_of_whatever_was_asked(world, own):
    """L38: an address of either side, and the port that was asked, which may lead to another."""
    track(world, own)

    assert Asked(own, 80) == answers(world, TUN4)


def test_the_ways_own_address_goes_first(world):
    for own in OWN:
        track(world, own)

    assert world.way.source == answers(world, TUN4).address
    assert 1 == len(world.kernel.asked)


def test_who_is_bound_to_an_address_was_asked_there_alone(world):
    track(world, FIRST)

    assert answers(world, "192.168.50.3") is None
    assert [(SECOND, PEER, 8080, 5000)] == world.kernel.asked


def test_what_we_began_answers_nothing(world):
    world.kernel.tracked[FIRST, PEER, 8080, 5000] = Entry(
        Tuple(FIRST, PEER, 8080, 5000), Tuple(PEER, FIRST, 5000, 8080)
    )

    assert answers(world, TUN4) is None
    assert {*OWN, world.way.source} == {own for own, *_ in world.kernel.asked}
