"""Others' sockets below IP, as of the last look at everybody's descriptors."""

import os
import socket
from collections import Counter

import pytest

from tests.fakes.judges import EXCLUDED, as_real, process
from tunsplit.engine.flow import App
from tunsplit.errors import KernelError
from tunsplit.kernel.procnet import PacketSocket
from tunsplit.tasks.linksockets import LinkSocket, LinkSockets

LO = socket.if_nametoindex("lo")
DHCLIENT = App(200, EXCLUDED, 1000)


class World:
    """Sockets by inode with the index of their device, and who holds which."""

    def __init__(self):
        self.sockets = {1: LO, 2: 0}
        self.held = {1: frozenset({(200, 1)}), 2: frozenset({(200, 1)})}
        self.xdp = 0
        self.counters: Counter[str] = Counter()
        self.link_sockets = LinkSockets(as_real(self), self.counters)

    def read(self, pid):
        return None if pid == 404 else process(EXCLUDED, pid)

    def look(self):
        assert self.sockets.keys() == self.link_sockets.wanted_sockets()
        for _ in self.link_sockets.take_holders(self.held):
            pass
        return self.link_sockets.listed()


@pytest.fixture
def world(monkeypatch):
    made = World()
    procnet = "tunsplit.kernel.procnet"
    monkeypatch.setattr(f"{procnet}.packet_sockets", lambda: [PacketSocket(*one) for one in made.sockets.items()])
    monkeypatch.setattr(f"{procnet}.count_xdp_sockets", lambda: made.xdp)
    return made


def test_nobody_is_told_of_before_the_first_look(world):
    assert [] == world.link_sockets.listed()


def test_packet_sockets_are_told_by_holder_and_device(world):
    assert [LinkSocket("packet", "lo", DHCLIENT), LinkSocket("packet", None, DHCLIENT)] == world.look()


def test_several_of_one_process_and_device_are_told_once(world):
    world.sockets[2] = LO

    assert [LinkSocket("packet", "lo", DHCLIENT)] == world.look()


def test_our_own_are_left_out(world):
    world.held[1] |= {(os.getpid(), 1)}

    assert [LinkSocket("packet", None, DHCLIENT)] == world.look()


@pytest.mark.parametrize("holders", [frozenset(), frozenset({(404, 1)})])
def test_one_that_nobody_shows_is_somebodys(world, holders):
    world.held[2] = holders

    assert LinkSocket("packet", None, None) in world.look()


def test_a_device_that_is_gone_has_a_number(world):
    world.sockets[1] = 0x7FFFFFFF

    assert LinkSocket("packet", "#2147483647", DHCLIENT) in world.look()


def test_of_xdp_sockets_it_is_known_that_they_are_there(world):
    world.xdp = 2

    assert [LinkSocket("xdp", None, None)] * 2 == world.look()[-2:]


def fail(*_):
    raise KernelError("no room")


def test_who_cannot_be_read_is_somebody_and_no_flow_ends_for_it(world, monkeypatch):
    """A failure of one who looks counts against all: where looks go on failing, flows end."""
    monkeypatch.setattr(world, "read", fail)

    assert [LinkSocket("packet", "lo", None), LinkSocket("packet", None, None)] == world.look()
    assert 2 == world.counters["link_sockets_not_seen"]


def test_tables_that_cannot_be_read_are_empty(world, monkeypatch):
    for name in ("packet_sockets", "count_xdp_sockets"):
        monkeypatch.setattr(f"tunsplit.kernel.procnet.{name}", fail)
    world.sockets.clear()

    assert [] == world.look()
    assert 2 == world.counters["link_sockets_not_seen"]


def test_where_nobody_can_look_the_last_look_counts(world):
    before = world.look()
    world.link_sockets.holders_unknown()

    assert before == world.link_sockets.listed()
