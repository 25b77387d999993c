"""Resolvers that are down, slow, lying or short of room, many questions at once, and a tunnel that goes meanwhile."""

import pytest
import trio

from tests.netns.fates import (
    Fate,
    Question,
    answered,
    ask,
    ask_and_trace,
    ask_everywhere,
    differences,
    teach,
    trace,
)
from tests.netns.stage import open_stage, until
from tests.netns.test_dns_table import sections
from tunsplit.lab import dnsclient, oddresolver
from tunsplit.lab.addresses import NOBODY, RESOLVERS

pytestmark = pytest.mark.netns

NOWHERE = NOBODY[4]  # what apps ask; the table says who is asked for them


def custom(*servers, platform="linux"):
    """A configuration with these custom resolvers."""
    return {**sections(platform, "default"), "dns": {"platform": platform, "custom": [str(own) for own in servers]}}


def one(name, protocol="udp"):
    return Question(protocol, NOWHERE, name)


async def test_the_next_resolver_is_asked_when_one_is_down(lab):
    """Its port is closed, or there is no such host."""
    absent = lab.server(4) + 200
    async with (
        lab.odd_resolver("public", "slow", delay_s=0) as last,
        open_stage(lab, **custom(absent, RESOLVERS["public"][4], last.address)) as stage,
        stage.app(stage.included) as app,
    ):
        await lab.resolvers["public"].stop()
        assert [str(last.address)] == await ask(app, [one("x.example")])
        assert {"tunnel"} == await stage.where(port=53)


async def test_no_resolver_left_is_servfail(lab):
    async with open_stage(lab, **custom(RESOLVERS["public"][4])) as stage, stage.app(stage.excluded) as app:
        await lab.resolvers["public"].stop()
        assert ["SERVFAIL", "SERVFAIL"] == await ask(app, [one("x.example"), one("y.example", "tcp")])
        assert {"uplink"} == await stage.where(port=53)


async def test_a_resolver_that_fails_is_not_believed_while_there_is_another(lab):
    async with (
        lab.odd_resolver("public", "failing") as failing,
        open_stage(lab, **custom(failing.address, RESOLVERS["public"][4])) as stage,
        stage.app(stage.included) as app,
    ):
        assert [str(RESOLVERS["public"][4])] == await ask(app, [one("x.who.is")])
        assert ["x.who.is"] == [question.name for question in failing.questions]


@pytest.mark.parametrize("version", [4, 6])
async def test_a_slow_resolver_is_waited_for(lab, version):
    async with (
        lab.odd_resolver("public", "slow", version=version, delay_s=0.7) as slow,
        open_stage(lab, **custom(slow.address)) as stage,
        stage.app(stage.included) as app,
    ):
        await teach(app)
        kind = "A" if version == 4 else "AAAA"
        for protocol in ("udp", "tcp"):
            command = f"ask_resolver('{protocol}', server, '{protocol}.example', '{kind}')"
            assert str(slow.address) == await app(command, server=str(NOWHERE))
        assert {"tunnel"} == await stage.where(destination=slow.address, port=53)


@pytest.mark.attack(
    "forged answers to questions for names",
    "a client that checks less believes them",
    "port, identifier, question are checked",
)
@pytest.mark.parametrize("version", [4, 6])
async def test_a_lying_resolver_is_not_believed_until_it_tells_the_truth(lab, version):
    """A wrong port, a wrong ID, another question, half an answer: listening goes on."""
    async with (
        lab.odd_resolver("public", "lying", version=version) as lying,
        open_stage(lab, **custom(lying.address)) as stage,
        stage.app(stage.included) as app,
    ):
        await teach(app)
        kind = "A" if version == 4 else "AAAA"
        names = [f"{number}.example" for number in range(10)]
        told = await app(
            f"[ask_resolver('udp', server, name, '{kind}') for name in names]", server=str(NOWHERE), names=names
        )
        assert [str(lying.address)] * len(names) == told
        assert await stage.where(payload=oddresolver.LIE[version].packed)


async def test_an_answer_that_is_too_long_is_had_by_tcp(lab):
    """RFC 7766 §5: the app is told by UDP that there is more, and gets all of it by TCP."""
    async with (
        lab.odd_resolver("public", "truncating") as short,
        open_stage(lab, **custom(short.address)) as stage,
        stage.app(stage.included) as app,
    ):
        assert ["TRUNCATED"] == await ask(app, [one("long.example")])
        (answer,) = await ask(app, [one("long.example", "tcp")])
        assert [str(short.address)] * oddresolver.LONG == answer.split()
        assert [False, True] == [question.over_tcp for question in short.questions][:2]
        assert {"tunnel"} == await stage.where(address=short.address)


# In the app: questions all at once by one socket, those that get lost once more; what each was told.
ASK_AT_ONCE = """
def ask_at_once(server, names):
    told = {}
    with open_socket(socket.SOCK_DGRAM, server) as own:
        own.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        own.settimeout(1)  # the tun's queue holds 500 packets, and drops what is beyond
        for _ in range(10):
            for number, name in enumerate(names):
                if number not in told:
                    own.send(encode_question(number, name))
            with contextlib.suppress(TimeoutError):
                while len(told) < len(names):
                    answer = own.recv(65536)
                    told[int.from_bytes(answer[:2], "big")] = read_answer(answer)
    return [told.get(number, "nothing") for number in range(len(names))]
"""


async def test_a_thousand_questions_at_once(lab):
    """Five hundred of either app; no answer is mistaken for another's, and no question is on the wrong side."""
    names = {name: [f"{name}-{number}.who.is" for number in range(500)] for name in ("normal", "excluded")}
    async with (
        open_stage(lab, **sections("per-app", "default")) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        apps = {"normal": normal, "excluded": excluded}
        for app in apps.values():
            await teach(app, ASK_AT_ONCE)
        told: dict[str, list[str]] = {}

        async def ask_all(name):
            told[name] = await apps[name]("ask_at_once(server, names)", server=str(NOWHERE), names=names[name])

        async with trio.open_nursery() as nursery:
            for name in apps:
                nursery.start_soon(ask_all, name)
        assert {
            name: [str(RESOLVERS[role][4])] * 500 for name, role in (("normal", "relay"), ("excluded", "system"))
        } == told
        asked = {role: {question.name for question in lab.resolvers[role].questions()} for role in ("relay", "system")}
        assert {"relay": set(names["normal"]), "system": set(names["excluded"])} == asked
        assert [] == lab.resolvers["lan"].questions() + lab.resolvers["public"].questions()


ASK_AND_WAIT = """
waiting = open_socket(socket.SOCK_DGRAM, server)
waiting.send(encode_question(4711, name))
"""


async def test_a_tunnel_that_goes_down_ends_its_questions_and_no_others(lab):
    """L14: SERVFAIL at once; what has gone unanswered in the tunnel is not asked anywhere else."""
    async with lab.odd_resolver("relay", "silent") as relay, lab.odd_resolver("lan", "silent") as system:
        config = sections("per-app", "default")
        config["tunnel"]["dns"], config["dns"]["system"] = [str(relay.address)], [str(system.address)]
        async with (
            open_stage(lab, **config) as stage,
            stage.app(stage.included) as normal,
            stage.app(stage.excluded) as excluded,
        ):
            for app, name in ((normal, "normal.example"), (excluded, "excluded.example")):
                await teach(app)
                await app(ASK_AND_WAIT, server=str(NOWHERE), name=name)

            async def are_asked():
                return relay.questions and system.questions

            await until(are_asked, "both questions are under way")
            stage.clear()
            lab.tunnel_down()
            assert "SERVFAIL" == await normal("read_answer(waiting.recv(512))")
            with pytest.raises(BlockingIOError):  # its question is not over yet: it is not patience that has ended
                await excluded("waiting.setblocking(False); waiting.recv(512)")

            questions = [one("later.example"), one("later-too.example", "tcp")]
            assert {} == differences(
                dict.fromkeys(questions, Fate("SERVFAIL")), await ask_and_trace(stage, normal, questions)
            )
            assert set() == await stage.where(payload=dnsclient.encode_name("normal.example"))

            relay.behaviour = "slow"
            lab.tunnel_up()

            async def is_answered():
                return [str(relay.address)] == await ask(normal, [one("up-again.example")])

            await until(is_answered, "the tunnel is used again")


@pytest.mark.parametrize("fallback", [False, True])
async def test_without_a_tunnel_what_is_to_go_there_fails_or_falls_back(lab, fallback):
    """L14: SERVFAIL for both, and nothing is seen; with dns.fallback the excluded app's go to system DNS."""
    config = sections("windows", "default")
    config["dns"]["fallback"] = fallback
    async with (
        open_stage(lab, **config) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        lab.tunnel_down()
        await until(lambda: _is_down(stage), "the tunnel is known to be down")
        for app, name, fate in (
            (normal, "normal", Fate("SERVFAIL")),
            (excluded, "excluded", answered("system", "uplink", 4) if fallback else Fate("SERVFAIL")),
        ):
            questions = ask_everywhere(name)
            answers = await ask(app, questions)
            assert {} == differences(dict.fromkeys(questions, fate), await trace(lab, questions, answers))


async def _is_down(stage):
    return not (await stage.daemon.status())["tunnel"]["up"]
