"""Our own stub: who asks is judged, before his question goes on and before its answer comes back."""

import socket
from collections import Counter
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest
import trio

from tests.fakes.judges import EXCLUDED, FakeJudge, FakeProxy, as_real, owner, policy
from tests.netns.stage import until
from tunsplit.config import Listener
from tunsplit.engine.attribution import Attribution
from tunsplit.engine.policy import Mode, Policy, Verdict
from tunsplit.errors import KernelError
from tunsplit.tasks import dnsstub
from tunsplit.tasks.dnsstub import Stub


class Source:
    """Knows everybody at once, or finds him by a search, or fails."""

    def __init__(self):
        self.known = Attribution("udp socket", owner(EXCLUDED))
        self.found = None
        self.error = None
        self.asked = []

    def attribute(self, protocol, four_tuple):
        self.asked.append((protocol, four_tuple))
        if self.error:
            raise self.error
        return self.known

    def search(self, flows):
        yield None
        if self.error:
            raise self.error
        for key in flows if self.found else ():
            yield key, self.found

    def user(self, protocol, four_tuple):
        return 1000


class Stage:
    def __init__(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = probe.getsockname()
        self.source, self.proxy = Source(), FakeProxy()
        self.counters: Counter[str] = Counter()
        self.judge = FakeJudge(policy())
        self.hold_s = 1.0
        self.stub = Stub(
            [Listener(ip_address("127.0.0.1"), self.address[1])],
            source=as_real(self.source),
            judge=as_real(self.judge),
            ask=self.proxy.ask,
            hold_s=lambda: self.hold_s,
            counters=self.counters,
        )

    def _has(self, count):
        async def has():
            return len(self.proxy.asked) >= count

        return has

    async def asked(self, count=1):
        """The proxy's questions, once there are so many."""
        await until(self._has(count), f"{count} questions")
        return self.proxy.asked


@asynccontextmanager
async def staged():
    stage = Stage()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.stub.run)
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            await own.connect(stage.address)
            yield stage, own
        nursery.cancel_scope.cancel()
    stage.stub.close()


async def test_a_question_goes_on_in_the_name_of_who_asks():
    async with staged() as (stage, own):
        await own.send(b"question")
        ((message, asker),) = await stage.asked()
        stage.proxy.replies[0](b"answer")

        assert b"answer" == await own.recv(100)
    assert (b"question", Verdict.UPLINK, EXCLUDED, None) == (message, asker.verdict, asker.app.exe, asker.asked)
    ((_, four_tuple),) = stage.source.asked
    assert stage.address[1].to_bytes(2, "big") == four_tuple[-2:]


async def test_the_same_over_a_connection():
    async with staged() as (stage, _):
        stream = await trio.open_tcp_stream(*stage.address)
        await stream.send_all(b"\0\x08question")
        ((message, asker),) = await stage.asked()
        stage.proxy.replies[0](b"answer")

        assert b"\0\x06answer" == await stream.receive_some()
        await stream.aclose()
    assert (b"question", True) == (message, asker.over_tcp)


async def test_who_is_not_known_at_once_is_searched_for():
    async with staged() as (stage, own):
        stage.source.known, stage.source.found = None, Attribution("udp socket", owner(EXCLUDED))
        await own.send(b"question")

        assert Verdict.UPLINK is (await stage.asked())[0][1].verdict


@pytest.mark.parametrize("trouble", ["nobody", "late", "failed", "failed in the search", "full"])
async def test_when_in_doubt_nobody_is_answered_by_any_resolver(trouble, monkeypatch):
    async with staged() as (stage, own):
        stage.source.known = None
        if trouble == "late":
            stage.hold_s = 0.0
            stage.source.found = Attribution("udp socket", owner(EXCLUDED))
        elif trouble == "failed":
            stage.source.error = KernelError("no")
        elif trouble == "failed in the search":
            monkeypatch.setattr(stage.source, "attribute", lambda *_: None)
            stage.source.error = KernelError("no")
        elif trouble == "full":
            monkeypatch.setattr(dnsstub, "MOST_WAITING", 0)
        await own.send(b"question")
        ((_, asker),) = await stage.asked()

        assert Verdict.BLOCK is asker.verdict
        stage.proxy.replies[0](b"refused")
        assert b"refused" == await own.recv(100)


async def test_an_answer_whose_asker_has_changed_sides_is_kept_from_him():
    async with staged() as (stage, own):
        await own.send(b"question")
        await stage.asked()
        stage.judge.policy = Policy((), Mode.EXCLUDE)
        stage.proxy.replies[0](b"late")
        await own.send(b"question")
        await stage.asked(2)
        stage.proxy.replies[1](b"answer")

        assert b"answer" == await own.recv(100)
    assert 1 == stage.counters["dns_answers_late"]


async def test_a_mistake_costs_one_question(monkeypatch):
    async with staged() as (stage, own):
        monkeypatch.setattr(stage.source, "attribute", lambda *_: 1 / 0)
        await own.send(b"question")

        async def counted():
            return stage.counters["failed_ZeroDivisionError"]

        await until(counted, "the mistake is counted")


def test_an_address_that_is_taken_is_said():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
        with pytest.raises(KernelError, match=r"\[dns\] listen: cannot bind 127\.0\.0\.1"):
            Stub(
                [Listener(ip_address("127.0.0.1"), port)],
                source=as_real(None), judge=as_real(None), ask=FakeProxy().ask, hold_s=float, counters=Counter(),
            )  # fmt: skip
