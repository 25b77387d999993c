"""Questions of apps, each by a name of its own, and what became of them: who answered, and where each was seen."""

import subprocess
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.netns.stage import AGENT, App, Stage
from tunsplit.lab import Lab, dnsclient
from tunsplit.lab.addresses import NOBODY, RESOLVERS, Address
from tunsplit.lab.dnstrials import ROLE, asks_for

CLIENT = Path(dnsclient.__file__).read_text().partition("\nif __name__")[0]

# In the app: all questions of a list, one after the other.
ASK_ALL = """
def ask_all(questions):
    answers = []
    for protocol, server, name in questions:
        try:
            answers.append(ask_resolver(protocol, server, name))
        except OSError as error:
            answers.append(type(error).__name__)
    return answers
"""


class Question(NamedTuple):
    """One question of an app: how and at which address it asks, and for which name."""

    protocol: str
    asked: Address
    name: str

    def __str__(self) -> str:
        return f"{self.name} by {self.protocol} at {self.asked}"


@dataclass(frozen=True)
class Fate:
    """What became of a question.

    Attributes:
        answer: the role of the resolver that answered; or the answer's code, or the name of an exception.
        sides: where its name was seen.
        upstreams: to which addresses, on whichever side.
    """

    answer: str
    sides: frozenset[str] = frozenset()
    upstreams: frozenset[Address] = frozenset()


def answered(role: str, side: str, version: int) -> Fate:
    """One resolver was asked, at its address of this family, on one side, and answered."""
    return Fate(role, frozenset({side}), frozenset({RESOLVERS[role][version]}))


def ask_everywhere(label: str, places: Iterable[str] = ("lan", "public", "nobody")) -> list[Question]:
    """Questions by UDP and TCP, IPv4 and IPv6, at the LAN's resolver, at a public one, and where nobody is."""
    return [
        Question(
            protocol, {**RESOLVERS, "nobody": NOBODY}[place][version], f"{label}-{place}{version}-{protocol}.who.is"
        )
        for place in places
        for version in (4, 6)
        for protocol in ("udp", "tcp")
    ]


async def teach(app: App, code: str = "") -> None:
    """Make the lab's client known to an app, and some more code."""
    await app(f"{CLIENT}\n{code}")


async def ask(app: App, questions: Iterable[Question], code: str = "") -> list[str]:
    """Have an app ask all of them; what it was told, each. `code` is run before."""
    await teach(app, ASK_ALL + code)
    told = [(question.protocol, str(question.asked), question.name) for question in questions]
    answers: list[str] = await app("ask_all(questions)", questions=told)
    return answers


async def trace(lab: Lab, questions: Iterable[Question], answers: Iterable[str]) -> dict[Question, Fate]:
    """What became of these questions."""
    for observer in (lab.uplink, lab.tunnel):
        await observer.settle()
        assert observer.dropped == 0
    sent = [
        (observer.name, seen)
        for observer in (lab.uplink, lab.tunnel)
        for seen in observer.seen()
        if seen.direction == "out"
    ]
    fates = {}
    for question, answer in zip(questions, answers, strict=True):
        mine = [(side, frame) for side, frame in sent if asks_for(frame, question.name)]
        fates[question] = Fate(
            ROLE.get(answer, answer),
            frozenset(side for side, _ in mine),
            frozenset(frame.destination for _, frame in mine if frame.destination is not None),
        )
    return fates


async def ask_and_trace(stage: Stage, app: App, questions: list[Question], code: str = "") -> dict[Question, Fate]:
    """Both."""
    return await trace(stage.lab, questions, await ask(app, questions, code))


def differences(expected: Mapping[Question, Fate], fates: Mapping[Question, Fate]) -> dict[str, tuple[Any, Any]]:
    """The questions of which something else became: what was expected, and what was."""
    return {str(question): (expected[question], fate) for question, fate in fates.items() if fate != expected[question]}


async def configure(stage: Stage, **overrides: Mapping[str, Any]) -> None:
    """Give the daemon another configuration, as a user does who edits the file."""
    stage.lab.rewrite_config(stage.lab.config([stage.excluded], **overrides))
    await stage.daemon.command("reload")


@asynccontextmanager
async def start_stub(lab: Lab, server: Address, address: str = "127.0.0.53") -> AsyncIterator[None]:
    """Run a local stub resolver in the host, as many distributions have one: dnsmasq, which asks this server."""
    options = [
        "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=", "--log-facility=-",
        "--no-resolv", "--no-hosts", "--no-poll", "--bind-interfaces", "--cache-size=0",
        f"--listen-address={address}", f"--server={server}",
    ]  # fmt: skip
    async with lab.host.start(["dnsmasq", *options]) as program:
        await program.wait_written("started, version")
        yield


@asynccontextmanager
async def start_app_with_resolver(lab: Lab, program: Path, resolver: Address | str) -> AsyncIterator[App]:
    """Run an app for which /etc/resolv.conf names this resolver."""
    file = lab.directory / f"resolv-{resolver}.conf"
    file.write_text(f"nameserver {resolver}\n")
    command = ["unshare", "--mount", "sh", "-c", 'mount --bind "$1" /etc/resolv.conf; shift; exec "$@"', "sh"]
    async with lab.host.start([*command, file, program, "-I", "-S", "-u", AGENT], stdin=subprocess.PIPE) as running:
        yield App(running)
