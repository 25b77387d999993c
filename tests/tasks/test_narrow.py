"""What a socket is told of its path, and what stands in the kernel for that: as long as it has to, and for it alone."""

from collections import Counter
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from tests.craft import ends
from tests.fakes.devices import ETH0, FAR4, FAR6, HOST4, HOST6, ICMP, ROUTER6, TUN4, TUN6, UDP, Side, nat, opened
from tests.fakes.judges import as_real
from tunsplit.engine.flow import FlowEvent
from tunsplit.engine.paths import KNOWN_S
from tunsplit.engine.sides import SideFacts, Sides
from tunsplit.errors import KernelError
from tunsplit.host import Link, Rule, Snapshot
from tunsplit.names import (
    PRIORITY_NARROW,
    ROUTE_PROTOCOL,
    TABLE_BOUND_UPLINK,
    TABLE_NARROW_TUNNEL,
    TABLE_NARROW_UPLINK,
    TABLE_TUN,
)
from tunsplit.tasks import narrow as module
from tunsplit.tasks.narrow import PAUSE_S, Narrow

TUN = Link(9, "tunsplit0", 1420)
FLOW = f"{TUN4}:5000 > {FAR4}:443"
SECOND = f"{TUN4}:5001 > {FAR4}:443"
ERROR = bytearray(b"error")


class Kernel:
    """Routes and rules as they stand; `story` has what the apps were told, and what stood over the tun's route then."""

    def __init__(self):
        self.routes = {}
        self.rules = set()
        self.story = []
        self.fails = ""
        self.counters: Counter[str] = Counter()
        self.tun_mtu = 1420
        self.has_tun = True

    def replace_route(self, route):
        self._may("route")
        self.routes[route.table, route.destination] = route

    def delete_route(self, route):
        self._may("delete")
        del self.routes[route.table, route.destination]

    def add_rule(self, rule):
        self._may("rule")
        self.rules.add(rule)

    def delete_rule(self, rule):
        self._may("delete")
        self.rules.remove(rule)

    def _may(self, what):
        if self.fails == what:
            raise KernelError(f"no {what}")

    @property
    def snapshot(self):
        return Snapshot(links=(TUN,) if self.has_tun else ())

    @property
    def sides(self):
        return Sides(SideFacts(ETH0, (ip_interface(f"{HOST4}/24"),)), None, None)

    def own_address(self, version):
        return ip_address(TUN4 if version == 4 else TUN6).packed

    def write(self, packet, _):
        self.story.append((bytes(packet), (TABLE_TUN, ip_network(FAR4)) in self.routes))

    def too_big(self, _, packet, mtu):
        self.story.append((packet, mtu))


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def narrow(kernel):
    return Narrow(as_real(kernel), as_real(kernel), as_real(kernel), TUN.name)


@pytest.fixture
def table(narrow):
    made = nat()
    made.on_end = narrow.forget
    return made


@pytest.fixture
def flow(table, uplink):
    return opened(table, FLOW, uplink.way())


def end(table, flow):
    table.end(flow, FlowEvent.TIMEOUT, 1.0)


def rule(port, table=TABLE_NARROW_UPLINK, far=FAR4):
    destination = ip_network(far)
    return Rule(
        destination.version, PRIORITY_NARROW, iif="lo", to=destination, ipproto=UDP,
        sport=(port, port), dport=(443, 443), table=table, protocol=ROUTE_PROTOCOL,
    )  # fmt: skip


def test_an_error_is_read_under_a_route_of_its_own(kernel, narrow, flow):
    narrow.heard(flow, ERROR, 1300, 1.0)

    assert [(b"error", True)] == kernel.story
    assert (TABLE_TUN, ip_network(FAR4)) not in kernel.routes
    assert {"path_mtu_told": 1} == kernel.counters


def test_what_carries_a_sides_address_has_a_table_of_its_own(kernel, narrow, table, uplink):
    flow = opened(table, f"{HOST4}:5000 > {FAR4}:443", uplink.way())
    kernel.fails = "delete"
    narrow.heard(flow, ERROR, 1300, 1.0)

    assert (TABLE_BOUND_UPLINK, ip_network(FAR4)) in kernel.routes
    assert (TABLE_TUN, ip_network(FAR4)) not in kernel.routes


def test_from_then_on_the_kernel_knows_it_of_this_flow(kernel, narrow, flow):
    narrow.heard(flow, ERROR, 1300, 1.0)

    assert {rule(5000)} == kernel.rules == narrow.rules()
    assert {(TABLE_NARROW_UPLINK, ip_network(FAR4)): 1300} == {at: route.mtu for at, route in kernel.routes.items()}


def test_each_side_has_a_table(kernel, narrow, table):
    tunnel = Side("tunnel")
    text = f"[{TUN6}]:5000 > [{FAR6}]:443"
    narrow.heard(opened(table, text, tunnel.way(ROUTER6, version=6, source=HOST6)), ERROR, 1300, 1.0)
    tunnel.close()

    assert {rule(5000, TABLE_NARROW_TUNNEL, FAR6)} == kernel.rules


def test_what_fits_the_tun_is_no_news(kernel, narrow, flow):
    narrow.heard(flow, ERROR, 1420, 1.0)

    assert ([], set()) == (kernel.story, kernel.rules)


def test_the_rule_goes_with_the_flow_and_the_route_with_the_last_one(kernel, narrow, table, uplink, flow):
    second = opened(table, SECOND, uplink.way(), port=50001)
    narrow.heard(flow, ERROR, 1300, 1.0)
    narrow.heard(second, ERROR, 1290, 1.0)

    end(table, flow)
    assert ({rule(5001)}, 1290) == (kernel.rules, kernel.routes[TABLE_NARROW_UPLINK, ip_network(FAR4)].mtu)
    end(table, second)
    assert (set(), {}, set()) == (kernel.rules, kernel.routes, narrow.rules())


def test_a_path_that_becomes_narrower_is_told_again(kernel, narrow, flow):
    narrow.heard(flow, ERROR, 1300, 1.0)
    narrow.heard(flow, ERROR, 1290, 1.0)

    assert (2, {rule(5000)}) == (len(kernel.story), kernel.rules)
    assert 1290 == kernel.routes[TABLE_NARROW_UPLINK, ip_network(FAR4)].mtu


def test_who_goes_on_is_told_again_after_a_pause(kernel, narrow, flow):
    for now in (1.0, 1.0 + PAUSE_S / 2, 1.0 + PAUSE_S):
        narrow.heard(flow, ERROR, 1300, now)

    assert (2, {rule(5000)}) == (len(kernel.story), kernel.rules)


def test_it_may_be_tried_again_in_time_or_in_another_network(kernel, narrow, flow):
    narrow.heard(flow, ERROR, 1300, 1.0)
    narrow.expire(KNOWN_S)
    assert {rule(5000)} == kernel.rules
    narrow.expire(1.0 + KNOWN_S)
    assert (set(), {}) == (kernel.rules, kernel.routes)

    narrow.heard(flow, ERROR, 1300, 1.0)
    narrow.forget_all()
    assert (set(), {}) == (kernel.rules, kernel.routes)


# Ours


def test_what_a_side_does_not_take_is_told_as_well(kernel, narrow, flow):
    assert narrow.too_big(flow.original, b"packet", 1300)

    assert [(b"packet", 1300)] == kernel.story
    assert {rule(5000)} == kernel.rules


@pytest.fixture
def echoing(table, uplink):
    key = ends(f"{TUN4}:7 > {FAR4}:0").key
    return table.open(ICMP, key, uplink.way(), None, 0.0)


def test_without_ports_it_is_told_once_and_then_cut(kernel, narrow, table, echoing):
    assert [True, False, False] == [narrow.too_big(echoing.original, b"packet", 1300) for _ in range(3)]
    assert ([(b"packet", 1300)], set()) == (kernel.story, kernel.rules)
    end(table, echoing)
    assert not narrow.rules()


def test_so_it_is_with_one_flow_too_many(kernel, narrow, table, uplink, flow, monkeypatch):
    monkeypatch.setattr(module, "MOST_RULES", 1)
    second = opened(table, SECOND, uplink.way(), port=50001)

    assert [True, True] == [narrow.too_big(one.original, b"packet", 1300) for one in (flow, second)]
    assert (False, {rule(5000)}) == (narrow.too_big(second.original, b"packet", 1300), kernel.rules)


def test_those_are_bounded_too(narrow, table, uplink, monkeypatch):
    monkeypatch.setattr(module, "MOST_RULES", 0)
    monkeypatch.setattr(module, "MOST_TOLD", 2)
    flows = [
        opened(table, f"{TUN4}:{port} > {FAR4}:443", uplink.way(), port=45000 + port) for port in range(5000, 5003)
    ]

    assert [True] * 3 == [narrow.too_big(flow.original, b"packet", 1300) for flow in flows]
    assert [True, False] == [narrow.too_big(flow.original, b"packet", 1300) for flow in (flows[0], flows[2])]


# Failures


@pytest.mark.parametrize("what", ["route", "rule"])
def test_what_cannot_be_kept_apart_is_not_told(kernel, narrow, flow, what):
    kernel.fails = what

    assert not narrow.too_big(flow.original, b"packet", 1300)
    assert ([], {"path_mtu_not_told": 1}) == (kernel.story, kernel.counters)


def test_nor_is_it_without_a_tun(kernel, narrow, flow):
    kernel.has_tun = False

    assert not narrow.too_big(flow.original, b"packet", 1300)
    assert ([], {"path_mtu_not_told": 1}) == (kernel.story, kernel.counters)


def test_what_cannot_be_taken_back_ends_nothing_else(kernel, narrow, table, flow, caplog):
    narrow.heard(flow, ERROR, 1300, 1.0)
    kernel.fails = "delete"
    end(table, flow)

    assert "cannot be taken back" in caplog.text
    assert not narrow.rules()
