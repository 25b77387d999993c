"""Live flows whose verdict changes, or cannot be had."""

from collections.abc import Iterator

import pytest
import trio

from tests.fakes.devices import Side, nat, opened
from tests.fakes.judges import EXCLUDED, INCLUDED, FakeJudge, as_real, owner, policy, process
from tunsplit.engine.attribution import Owner
from tunsplit.engine.flow import Flow
from tunsplit.engine.policy import Judgement
from tunsplit.errors import KernelError
from tunsplit.process import Process
from tunsplit.tasks import liveflows
from tunsplit.tasks.liveflows import LiveFlows
from tunsplit.tasks.refusals import Refusal, Refusals

SOCKET, OTHER_SOCKET = 4711, 4712


class Judge(FakeJudge):
    """Judges by programs, unless the sockets cannot be asked for."""

    error: KernelError | None = None

    def judge(self, owner: Owner | None) -> Judgement:
        if self.error:
            raise self.error
        return super().judge(owner)


class Holders:
    """What /proc shows: who holds which socket, and who these are."""

    def __init__(self) -> None:
        self.held: dict[int, frozenset[tuple[int, int]]] = {}
        self.programs: dict[int, str | KernelError] = {}

    def scan_all(self, inodes: set[int]) -> Iterator[tuple[int, frozenset[tuple[int, int]]]]:
        yield from ((inode, self.held[inode]) for inode in sorted(inodes))

    def held_of(self, pid: int, inodes: set[int]) -> set[int]:
        return {inode for inode in inodes if (pid, 1) in self.held.get(inode, ())}

    def read(self, pid: int) -> Process:
        program = self.programs[pid]
        if isinstance(program, KernelError):
            raise program
        return process(program, pid)


class Diag:
    def destroy(self, *_: object) -> bool:
        return True


class World:
    def __init__(self) -> None:
        self.nat, self.judge, self.holders, self.tunnel = nat(), Judge(policy()), Holders(), Side("tunnel")
        self.refused = Refusals()
        self.live = LiveFlows(
            judge=as_real(self.judge), nat=self.nat, refused=self.refused, diag=as_real(Diag()),
            processes=as_real(self.holders), carry=lambda: 0,
        )  # fmt: skip

    def open(self, text: str, port: int, inode: int) -> Flow:
        """A flow of the included app in the tunnel."""
        flow = opened(self.nat, text, self.tunnel.way(), port=port)
        flow.verdict, flow.owner, flow.sockets = "tunnel", owner(INCLUDED), (inode,)
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


async def test_a_look_that_fails_halfway_leaves_nothing_unseen(world, nursery, autojump_clock, monkeypatch):
    """Both sockets have been passed to the excluded app; the look at the second one's holder fails, once."""
    flows = [
        world.open("10.0.0.2:5000 > 1.1.1.1:443", 50000, SOCKET),
        world.open("10.0.0.2:5001 > 1.1.1.1:443", 50001, OTHER_SOCKET),
    ]
    world.holders.held = {SOCKET: frozenset({(200, 1)}), OTHER_SOCKET: frozenset({(201, 1)})}
    world.holders.programs = {200: EXCLUDED, 201: KernelError("too many open files")}
    nursery.start_soon(world.live.watch_holders)
    await trio.sleep(liveflows.HOLDERS_S * 1.5)
    world.holders.programs[201] = EXCLUDED
    await trio.sleep(liveflows.HOLDERS_S)

    assert [False, False] == [flow.passes for flow in flows]
