"""A reload that fails halfway; paths that come to lead elsewhere."""

import pytest
import trio

from tests.fakes.judges import FakeJudge, as_real, policy
from tunsplit.config import Config, parse
from tunsplit.engine.policy import Policy
from tunsplit.errors import KernelError
from tunsplit.tasks import switch as module
from tunsplit.tasks.settings import followed, policy_of
from tunsplit.tasks.switch import Switch

CONFIG = '[tunnel]\ninterface = "wg0"\nfwmark = 51820\n'


class Judge(FakeJudge):
    """With nothing in its tree."""

    @property
    def tree(self) -> "Judge":
        return self

    def lineage(self, *_: object) -> list[object]:
        return []

    def changed(self) -> None:
        pass

    def set_policy(self, policy: Policy) -> None:
        pass

    def save_now(self) -> None:
        pass


class Others:
    """The other organs: content with everything, but for the network, which cannot be steered."""

    def hold_for(self, _: float) -> None:
        pass

    def rejudge_all(self) -> None:
        pass

    def refuse_covering(self, *_: object) -> None:
        pass

    def steer(self, _: object) -> None:
        raise KernelError("nft: no memory")


def test_where_steering_fails_dns_follows_all_the_same(tmp_path):
    """Both sides are closed then; when they come back, it must not be with the table of the configuration before."""
    file = tmp_path / "tunsplit.toml"
    told: list[Config] = []
    file.write_text(CONFIG)
    others = as_real(Others())
    switch = Switch(
        parse(CONFIG, str(file)), str(file), judge=as_real(Judge(policy())), live=others, admit=others,
        explainer=others, processes=others, network=others, resolvers=others,
    )  # fmt: skip
    switch.on_config = told.append
    file.write_text(f'{CONFIG}[dns]\nplatform = "android"\n')

    with pytest.raises(KernelError, match="nft: no memory"):
        switch.reload()

    assert ["android"] == [config.dns.platform for config in told]
    assert [switch.config] == told


class Obeying(Judge):
    """Judges by what it was told last."""

    def set_policy(self, policy: Policy) -> None:
        self.policy = policy


class Following:
    """A switch that follows the path of a program; `looks` counts, `rejudged` notes by which policies."""

    def __init__(self, program, monkeypatch):
        self.program = program
        self.replace()
        self.judge = Obeying(policy_of(parse(f'{CONFIG}[[app]]\npath = "{program}"')))
        self.looks = 0
        self.rejudged: list[Policy] = []
        others = as_real(Others())
        others.rejudge_all = lambda: self.rejudged.append(self.judge.policy)
        self.switch = Switch(
            parse(CONFIG), "", judge=as_real(self.judge), live=others, admit=others, explainer=others,
            processes=others, network=others, resolvers=others,
        )  # fmt: skip
        self.meanwhile = lambda: None

        def look(policy):
            by_now = followed(policy)
            self.looks += 1
            self.meanwhile()
            return by_now

        monkeypatch.setattr(module, "followed", look)
        monkeypatch.setattr(module, "PATHS_S", 0.001)

    def replace(self):
        new = self.program.with_name("new")
        new.write_bytes(b"")
        new.replace(self.program)

    async def looked(self, times=2):
        """That many more looks have been taken, and what they saw is in force."""
        until = self.looks + times
        with trio.fail_after(10):
            while self.looks < until:  # noqa: ASYNC110 -- nobody tells
                await trio.sleep(0.001)


@pytest.fixture
def following(tmp_path, monkeypatch, nursery):
    made = Following(tmp_path / "program", monkeypatch)
    nursery.start_soon(made.switch.follow_paths)
    yield made
    nursery.cancel_scope.cancel()


async def test_a_path_that_leads_elsewhere_is_judged_by_once(following):
    before = following.judge.policy
    await following.looked()
    assert [] == following.rejudged

    following.replace()
    await following.looked(4)
    assert [following.judge.policy] == following.rejudged != [before]


async def test_while_processes_cannot_be_followed_neither_are_paths(following):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "prepare", fail)
        following.replace()
        await following.looked(4)
        assert [] == following.rejudged
    await following.looked(4)
    assert 1 == len(following.rejudged)


async def test_what_is_said_while_paths_are_looked_at_holds(following):
    """The look is by another thread, and what it saw is of the list before."""
    said = policy()

    def say():
        following.judge.policy = said

    following.replace()
    following.meanwhile = say
    await following.looked(4)

    assert said is following.judge.policy
    assert [] == following.rejudged


def fail(_):
    raise KernelError("processes are born faster than they can be taken in")
