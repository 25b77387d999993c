"""What the organ of judgement says of the VPN's client, by what the tunnel is."""

import subprocess

import pytest

from tunsplit.engine.attribution import Certainty, Owner
from tunsplit.engine.matchers import NameRule
from tunsplit.engine.policy import Policy, Verdict
from tunsplit.engine.rules import Rule
from tunsplit.kernel.procfs import Processes
from tunsplit.tasks import judge as module
from tunsplit.tasks.judge import Judge

CLIENT = Rule(1, "sleep", (NameRule("sleep"),), inherit=False, client=True)


class NoEvents:
    """A subscription in which nothing ever happens."""

    def read(self):
        return []

    def close(self):
        pass


@pytest.fixture
def sleeper():
    with subprocess.Popen(["/bin/sleep", "60"]) as made:
        yield made
        made.kill()


@pytest.fixture
def judge(sleeper, monkeypatch):
    """Made when the program runs already; its coreutils may be one file of many names."""
    monkeypatch.setattr(module, "ProcessEvents", NoEvents)
    processes = Processes()
    made = Judge(Policy((), clients=(CLIENT,)), processes, None)
    made.prepare()
    yield made
    made.close()
    processes.close()


@pytest.fixture
def owner(judge, sleeper):
    return Owner((judge.look_again(sleeper.pid),))


@pytest.mark.parametrize(
    ("up", "carries", "verdict"),
    [
        (True, False, Verdict.TUNNEL),
        (True, True, Verdict.UPLINK),
        (False, False, Verdict.UPLINK),
        (False, True, Verdict.UPLINK),
    ],
)
def test_the_client_has_the_uplink_while_the_tunnel_is_down_or_its_own(judge, owner, up, carries, verdict):
    asked: list[int] = []

    def carries_tunnel(pid):
        asked.append(pid)
        return carries

    judge.tunnel_up, judge.carries_tunnel = lambda: up, carries_tunnel

    assert verdict is judge.judge(owner).verdict
    assert ([owner.process.pid] if up else []) == asked
    assert judge.is_client(owner)


def test_nobody_else_is_the_client(judge, owner):
    judge.tunnel_up = lambda: False
    (own,) = owner.holders
    stranger = judge.look_again(own.parent)

    assert not judge.is_client(None)
    assert not judge.is_client(Owner((stranger,)))
    assert not judge.is_client(Owner((own, stranger)))
    assert not judge.is_client(owner._replace(certainty=Certainty.AMBIGUOUS))
    judge.is_resolver = lambda *_, **__: True
    assert not judge.is_client(owner)
    assert Verdict.TUNNEL is judge.judge(owner).verdict
    judge.is_resolver = lambda *_, **__: False
    judge.set_policy(Policy(()))
    assert not judge.is_client(owner)
    assert Verdict.TUNNEL is judge.judge(owner).verdict
