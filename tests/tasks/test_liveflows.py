"""Live flows whose verdict changes, or cannot be had."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator

import pytest

from tests.craft import TCP, UDP, ends
from tests.fakes.devices import Side, nat, opened
from tests.fakes.judges import EXCLUDED, INCLUDED, FakeJudge, as_real, owner, policy, process
from tunsplit.engine.attribution import Owner
from tunsplit.engine.direction import reversed_key
from tunsplit.engine.flow import Flow, FlowEvent
from tunsplit.engine.policy import Judgement, Verdict
from tunsplit.engine.rules import Rule
from tunsplit.errors import KernelError
from tunsplit.process import Process
from tunsplit.tasks.halfopen import HalfOpen
from tunsplit.tasks.liveflows import LiveFlows
from tunsplit.tasks.refusals import Refusal, Refusals

SOCKET, OTHER_SOCKET = 4711, 4712


class Judge(FakeJudge):
    """Judges by programs, unless the sockets cannot be asked for."""

    error: KernelError | None = None

    def judge(self, owner: Owner | None, sockets: Collection[int] = ()) -> Judgement:
        if self.error:
            raise self.error
        return super().judge(owner, sockets)


class Holders:
    """What /proc shows: who holds which socket, and who these are."""

    def __init__(self) -> None:
        self.held: dict[int, frozenset[tuple[int, int]]] = {}
        self.programs: dict[int, str | KernelError] = {}

    def scan_all(self, inodes: set[int]) -> Iterator[tuple[int, frozenset[tuple[int, int]]]]:
        yield from ((inode, self.held[inode]) for inode in sorted(inodes & self.held.keys()))

    def held_of(self, pid: int, inodes: set[int]) -> set[int]:
        return {inode for inode in inodes if (pid, 1) in self.held.get(inode, ())}

    def sockets_of(self, pid: int) -> set[int]:
        return self.held_of(pid, set(self.held))

    def read(self, pid: int) -> Process:
        program = self.programs[pid]
        if isinstance(program, KernelError):
            raise program
        return process(program, pid)


class Diag:
    def __init__(self) -> None:
        self.destroyed: list[bytes] = []

    def destroy(self, _: int, key: bytes, __: object) -> bool:
        self.destroyed.append(key)
        return True


class World:
    def __init__(self) -> None:
        self.nat, self.judge, self.holders, self.tunnel = nat(), Judge(policy()), Holders(), Side("tunnel")
        self.refused, self.half_open, self.diag = Refusals(), HalfOpen(Counter()), Diag()
        self.carry: Callable[[], int] = lambda: 0
        self.live = LiveFlows(
            judge=as_real(self.judge), nat=self.nat, refused=self.refused, half_open=self.half_open,
            diag=as_real(self.diag), processes=as_real(self.holders), carry=lambda: self.carry(),
        )  # fmt: skip

    def open(self, text: str, port: int, inode: int, *, protocol: int = UDP) -> Flow:
        """A flow of the included app in the tunnel."""
        flow = opened(self.nat, text, self.tunnel.way(), port=port, protocol=protocol)
        flow.verdict = "tunnel"
        self.nat.own(flow, owner(INCLUDED), (inode,))
        return flow


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.tunnel.close()


async def test_what_cannot_be_judged_again_ends(world):
    """L21: the change is told once, and a failure must not let the old side stand."""
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    world.judge.error = KernelError("sock_diag: no memory")
    world.live.on_change({(100, 1)})

    assert not flow.passes


async def test_what_is_judged_as_before_goes_on(world):
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    world.live.on_change({(100, 1)})

    assert flow.passes


@pytest.mark.parametrize("change", [LiveFlows.rejudge_all, lambda live: live.on_change({(100, 1)})])
async def test_what_was_refused_may_be_allowed_by_what_has_changed(world, change):
    """The app need not wait until the refusal is forgotten."""
    world.refused.remember(Refusal.of((6, bytes(12)), 1.0, "default", None))
    change(world.live)

    assert {} == world.refused


async def test_a_program_that_inherits_no_socket_of_a_flow_costs_no_look_at_flows(world, monkeypatch):
    """Programs start all the time, each with some socket that is none of ours, and flows may be many."""
    world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    world.holders.held = {OTHER_SOCKET: frozenset({(300, 1)})}
    monkeypatch.setattr(type(world.nat), "__iter__", None)

    world.live.on_exec(process(EXCLUDED, 300))


async def test_sockets_of_flows_that_have_ended_are_forgotten_with_the_next_look(world):
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    world.open("10.0.0.2:5001 > 1.1.1.1:443", 50001, OTHER_SOCKET)
    world.nat.end(flow, FlowEvent.TIMEOUT, 1.0)

    assert {OTHER_SOCKET} == world.live.wanted_sockets() == world.nat.sockets


async def test_a_program_that_inherits_the_socket_of_a_flow_is_judged_with_its_holders(world):
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    other = world.open("10.0.0.2:5001 > 1.1.1.1:443", 50001, OTHER_SOCKET)
    world.live.on_exec(process(EXCLUDED, 300))
    assert [True, True] == [flow.passes, other.passes]

    world.holders.held = {SOCKET: frozenset({(300, 1)})}
    world.live.on_exec(process(EXCLUDED, 300))
    assert [False, True] == [flow.passes, other.passes]


def take(world):
    """Look once, as tasks/holders.py does."""
    held = dict(world.holders.scan_all(world.live.wanted_sockets()))
    for _ in world.live.take_holders(held):
        pass


async def test_a_look_that_fails_halfway_leaves_nothing_unseen(world):
    """Both sockets have been passed to the excluded app; the look at the second one's holder fails, once."""
    flows = [
        world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET),
        world.open("10.0.0.2:5001 > 1.1.1.1:443", 50001, OTHER_SOCKET),
    ]
    world.holders.held = {SOCKET: frozenset({(200, 1)}), OTHER_SOCKET: frozenset({(201, 1)})}
    world.holders.programs = {200: EXCLUDED, 201: KernelError("too many open files")}
    with pytest.raises(KernelError):
        take(world)
    assert [True, True] == [flow.passes for flow in flows]
    world.holders.programs[201] = EXCLUDED
    take(world)

    assert [False, False] == [flow.passes for flow in flows]


async def test_a_udp_servers_socket_is_left_to_it(world):
    """Its next answer is judged anew; an error while it waits for questions might end it."""
    server = world.nat.open_untranslated(
        UDP, ends("10.64.0.2:80 > 198.51.100.1:5000").key, world.tunnel.way(), 0.0,
        app=None, reason="", attribution="", asked=(ends("10.64.0.2:80 > 198.51.100.1:5000").source, 80),
    )  # fmt: skip
    client = world.open("10.128.0.1:5000 > 198.51.100.1:53", 50000, SOCKET)
    server.owner = client.owner = owner(EXCLUDED)
    world.live.rejudge_all()

    assert [client.key] == world.diag.destroyed
    assert [] == list(world.nat)
    assert {} == world.refused


async def test_what_a_lost_connection_has_still_to_say_meets_its_tombstone(world):
    """L1: a late segment must not be judged as its app stands now; only the kernel's RST leaves before."""
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET, protocol=TCP)
    passed: list[tuple[bool, bool]] = []

    def carry() -> int:
        passed.append((flow.passes, flow.ending))
        return 1 if len(passed) == 1 else 0

    world.carry = carry
    flow.owner = owner(EXCLUDED)
    world.live.rejudge_all()

    assert (True, True) == passed[0]
    assert not flow.passes
    assert "switched: rule 1" in world.refused[TCP, flow.key].reason
    assert [(world.tunnel.device, reversed_key(flow.outside))] == list(world.half_open)


async def test_datagrams_that_were_sent_before_a_switch_pass_on_neither_side(world):
    """L2, L3: while what is in the tun is carried, they open nothing; afterwards the next one is judged anew."""
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    seen: list[tuple[bool, bool]] = []

    def carry() -> int:
        seen.append((flow.passes, (UDP, flow.key) in world.refused))
        return 0

    world.carry = carry
    flow.owner = owner(EXCLUDED)
    world.live.rejudge_all()

    assert [(False, True)] == seen
    assert {} == world.refused


async def test_who_loses_his_side_while_others_are_being_ended_is_ended_with_them(world):
    """L27: a segment that is read then may be of who has just become another. One switch goes on meanwhile."""
    flows = [
        world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET, protocol=TCP),
        world.open("10.0.0.2:5001 > 1.1.1.1:443", 50001, OTHER_SOCKET, protocol=TCP),
    ]
    seen: list[list[bool]] = []

    def carry() -> int:
        """The second one's holder has become another; so has the first one's, once more; then nobody can look."""
        seen.append([flow.ending and flow.passes for flow in flows])
        if len(seen) == 1:
            for flow in flows:
                flow.owner = owner(EXCLUDED)
            world.live.on_change({(100, 1)})
            world.live.holders_unknown()
            assert 1 == len(seen), "nothing is carried while something is"
        return 0

    world.carry = carry
    flows[0].owner = owner(EXCLUDED)
    world.live.rejudge_all()

    assert [[True, False], [True, True]] == seen[:2]
    assert [False, False] == [flow.passes for flow in flows]
    assert [flow.key for flow in flows] == world.diag.destroyed
    assert len(flows) == len(world.refused)

    world.carry = lambda: 0
    third = world.open("10.0.0.2:5002 > 1.1.1.1:443", 50002, SOCKET, protocol=TCP)
    third.owner = owner(EXCLUDED)
    world.live.rejudge_all()
    assert not third.passes


async def test_what_was_sent_before_a_switch_opens_nothing_whatever_changes_meanwhile(world):
    """L2, L3."""
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    world.refused.remember(Refusal.of((UDP, bytes(12)), 1.0, "default", None))
    seen: list[list[bytes]] = []

    def carry() -> int:
        world.live.on_change({(300, 1)})
        seen.append([key for _, key in world.refused])
        return 0

    world.carry = carry
    flow.owner = owner(EXCLUDED)
    world.live.on_change({(100, 1)})

    assert [flow.key] == seen[0]
    assert {} == world.refused


async def test_a_failure_while_flows_are_being_ended_leaves_none_of_them_open(world):
    """L21: and the next switch is carried out as any other."""
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET, protocol=TCP)
    flow.owner = owner(EXCLUDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "carry", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            world.live.rejudge_all()
    assert not flow.passes

    other = world.open("10.0.0.2:5001 > 1.1.1.1:443", 50001, OTHER_SOCKET, protocol=TCP)
    other.owner = owner(EXCLUDED)
    world.live.rejudge_all()
    assert not other.passes


@pytest.mark.parametrize("failing", [False, True])
async def test_when_the_tunnel_comes_or_goes_all_are_judged_again_if_there_is_a_client(world, failing, monkeypatch):
    """Also when events of processes fail: which side the tunnel's state gives is known all the same."""
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    monkeypatch.setattr(world.judge, "judge", lambda _: Judgement(Verdict.UPLINK, "tunnel client: x"))
    world.live.tunnel_changed()
    assert flow.passes

    def fail() -> None:
        raise KernelError("no room")

    if failing:
        monkeypatch.setattr(world.judge, "prepare", fail)
    world.judge.policy = policy(clients=(Rule(1, "x", (), client=True),))
    world.live.tunnel_changed()
    assert not flow.passes


async def test_while_births_cannot_be_taken_in_flows_go_on(world, monkeypatch):
    """L29: a storm of one user's forks is none of the others' business."""
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    world.holders.held = {SOCKET: frozenset({(200, 1)})}
    world.holders.programs = {200: EXCLUDED}

    def prepare():
        raise KernelError("processes are born faster than they can be taken in")

    with monkeypatch.context() as patch:
        patch.setattr(world.judge, "prepare", prepare)
        take(world)
    assert flow.passes
    take(world)
    assert not flow.passes


async def test_where_nobody_can_look_any_more_flows_end(world):
    """L21."""
    flow = world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET)
    world.live.holders_unknown()
    world.live.holders_unknown()

    assert not flow.passes


async def test_a_mistake_of_ours_over_one_flow_ends_it_and_no_other_is_forgotten(world, monkeypatch, caplog):
    """L21."""
    flows = [
        world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET),
        world.open("10.0.0.2:5001 > 1.1.1.1:443", 50001, OTHER_SOCKET),
    ]
    verdicts = [ZeroDivisionError("by zero")]
    judge = world.judge.judge

    def fail_once(owner):
        if verdicts:
            raise verdicts.pop()
        return judge(owner)

    monkeypatch.setattr(world.judge, "judge", fail_once)
    world.live.rejudge_all()

    assert [False, True] == [flow.passes for flow in flows]
    assert "ZeroDivisionError" in caplog.text
