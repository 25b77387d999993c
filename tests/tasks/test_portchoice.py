"""NAT's outside ports: nobody else's, and known to the kernel before they are used."""

import logging

import pytest

from tests.craft import SYN, ends, tcp
from tests.fakes.devices import FAR4, HOST4, ICMP, TCP, TUN4, UDP
from tests.tasks.portstage import FLOW, World
from tunsplit.engine.flow import FlowEvent
from tunsplit.engine.ports import BATCH
from tunsplit.errors import KernelError
from tunsplit.kernel.conntrack import Entry, Tuple
from tunsplit.tasks import portchoice
from tunsplit.tasks.portchoice import SETS, Asked

GRE = 47


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


def test_ports_of_others_do_not_stand_in_the_way_of_those_that_have_rested(world):
    world.take_all_but(2)
    old = world.open()
    own = int.from_bytes(old.outside[-4:-2], "big")
    world.nat.end(old, FlowEvent.TIMEOUT, 0.0)
    world.kernel.is_bound = lambda _protocol, _version, port: port != own

    assert own == world.choose(text=f"{TUN4}:5001 > {FAR4}:443")
    assert 1 == world.ports.counters["port_in_use"]


@pytest.mark.parametrize(("sent", "fits"), [(999, 1), (1000, 0)])
def test_a_port_is_used_again_for_what_its_server_tells_from_the_last(world, sent, fits):
    """Both have the same server; of the second the last began at the lower number. If neither fits, the older one."""
    world.take_all_but(2)
    outside = []
    for port, number in ((1, 5000), (2, 1000)):
        text = f"{TUN4}:{port} > {FAR4}:443"
        flow = world.open(text=text)
        flow.syn = tcp(text, flags=SYN, seq=number)[20:]
        flow.original.octets = sent
        outside.append(int.from_bytes(flow.outside[-4:-2], "big"))
        world.nat.end(flow, FlowEvent.TIMEOUT, 0.0)
    syn = tcp(f"{TUN4}:3 > {FAR4}:443", flags=SYN, seq=2000)[20:]
    key = ends(f"{TUN4}:3 > {FAR4}:443").key

    assert outside[fits] == world.ports.choose(TCP, key, world.way, 1.0, syn=syn)


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
    assert {"free": 16384, "reserved": 0, "live": 0, "resting": 0, "foreign": 0} == world.nat.pools["tcp"].statistics()

    world.live.error = None

    assert world.choose() in world.live.sets[SETS["tcp"][0]]


def test_a_port_that_could_not_be_judged_is_given_back(world):
    world.kernel.error = KernelError("bind: too many files")
    with pytest.raises(KernelError):
        world.choose()

    places = world.nat.pools["tcp"].statistics()
    assert (0, 0) == (places["live"], places["foreign"])
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
