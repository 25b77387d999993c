"""Every cell of every platform's table (L17; SPEC.md, "DNS"), on the wires.

Of each question it is known which resolver answered, on which side it was seen, and that it was seen nowhere else.
The table is the lab's, written down by hand: it judges the program's.
"""

import itertools
from ipaddress import ip_address

import pytest

from tests.netns.fates import (
    Fate,
    Question,
    answered,
    ask,
    ask_and_trace,
    ask_everywhere,
    configure,
    differences,
    start_stub,
    trace,
)
from tests.netns.stage import open_stage, start_app
from tunsplit.lab import dnstrials
from tunsplit.lab.addresses import RESOLVERS
from tunsplit.lab.dnstrials import CUSTOM, TABLE

pytestmark = pytest.mark.netns


def sections(platform, setting, version=4, *, lan=True):
    """Sections of a configuration, as the lab's own, with or without `lan.allow`."""
    return {**dnstrials.configure(platform, setting, version), "lan": {"allow": lan}}


def fate(cell, version=4):
    """What is to become of a question in this cell."""
    return Fate(dnstrials.REFUSED) if cell is None else answered(cell[0], cell[1], version)


@pytest.mark.parametrize("platform", TABLE)
async def test_the_table(lab, platform):
    """L17: by UDP and TCP, IPv4 and IPv6, the app's question and ours; at the LAN, at a public resolver, at nobody."""
    async with (
        open_stage(lab, **sections(platform, "default")) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        for setting, version in itertools.product(CUSTOM, (4, 6)):
            await configure(stage, **sections(platform, setting, version))
            for app, name, cell in zip(
                (normal, excluded), ("normal", "excluded"), TABLE[platform][setting], strict=True
            ):
                questions = ask_everywhere(f"{name}-{setting}-{version}")
                fates = await ask_and_trace(stage, app, questions)
                assert {} == differences(dict.fromkeys(questions, fate(cell, version)), fates)
            stage.clear()


async def test_without_tunsplit_a_question_goes_where_it_is_addressed(lab):
    """The control: it is tunsplit that sends it elsewhere."""
    questions = ask_everywhere("control", ["lan", "public"])
    async with start_app(lab.host, lab.copy_program("python", "app")) as app:
        fates = await trace(lab, questions, await ask(app, questions))

    expected = {
        question: answered("public" if "public" in question.name else "lan", "uplink", question.asked.version)
        for question in questions
    }
    assert {} == differences(expected, fates)


async def test_another_platforms_table_is_told_apart(lab):
    """The control: where two tables differ, what is seen differs."""
    async with open_stage(lab, **sections("linux", "public")) as stage, stage.app(stage.excluded) as excluded:
        questions = ask_everywhere("control")
        fates = await ask_and_trace(stage, excluded, questions)

    for platform in ("windows", "android", "linux-2021", "macos", "per-app"):
        _, cell = TABLE[platform]["public"]
        assert len(questions) == len(differences(dict.fromkeys(questions, fate(cell)), fates))


async def test_a_local_stub_asks_in_its_own_name(lab):
    """Footnote 1: what an excluded app asks a stub goes in the tunnel; what it asks itself, outside."""
    stub = Question("udp", ip_address("127.0.0.53"), "by-the-stub.who.is")
    direct = Question("udp", RESOLVERS["public"][4], "by-itself.who.is")
    async with (
        open_stage(lab, **sections("linux", "public")) as stage,
        stage.app(stage.excluded) as excluded,
        start_stub(lab, RESOLVERS["public"][4]),
    ):
        fates = await ask_and_trace(stage, excluded, [stub, direct])

    assert {stub: answered("public", "tunnel", 4), direct: answered("public", "uplink", 4)} == fates


@pytest.mark.parametrize("lan", [True, False])
async def test_android_reaches_a_private_resolver_only_with_local_network_sharing(lab, lan):
    """Footnote 2."""
    async with (
        open_stage(lab, **sections("android", "private", lan=lan)) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        questions = ask_everywhere("normal")
        expected = answered("lan", "uplink", 4) if lan else Fate("SERVFAIL")
        assert {} == differences(dict.fromkeys(questions, expected), await ask_and_trace(stage, normal, questions))
        questions = ask_everywhere("excluded")
        expected = answered("system", "uplink", 4)
        assert {} == differences(dict.fromkeys(questions, expected), await ask_and_trace(stage, excluded, questions))


async def test_of_a_mixed_list_each_resolver_follows_its_own_row(lab):
    """SPEC.md, "DNS": tried in order; the one that was asked goes first."""
    mixed = sections("linux", "public")
    mixed["dns"]["custom"] = [str(RESOLVERS[role][4]) for role in ("public", "lan")]
    async with (
        open_stage(lab, **mixed) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        for app, name, side in ((normal, "normal", "tunnel"), (excluded, "excluded", "uplink")):
            first = Question("udp", RESOLVERS["public"][6], f"{name}-first.who.is")
            asked = Question("udp", RESOLVERS["lan"][4], f"{name}-asked.who.is")
            assert {
                first: answered("public", side, 4), asked: answered("lan", "uplink", 4)
            } == await ask_and_trace(stage, app, [first, asked])  # fmt: skip

        await lab.resolvers["public"].stop()
        next_one = Question("udp", RESOLVERS["public"][6], "next.who.is")
        fates = await ask_and_trace(stage, normal, [next_one])
    assert ("lan", frozenset(("tunnel", "uplink"))) == (fates[next_one].answer, fates[next_one].sides)
    assert {RESOLVERS["public"][4], RESOLVERS["lan"][4]} == fates[next_one].upstreams


async def test_one_app_never_hears_what_another_sides_resolver_said(lab):
    """L30: the same names, asked by both, in either order."""
    async with (
        open_stage(lab, **sections("per-app", "default")) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        questions = ask_everywhere("same")
        asked = {normal: ["relay"] * len(questions), excluded: ["system"] * len(questions)}
        for apps in ((normal, excluded), (excluded, normal)):
            for app in apps:
                answers = await ask(app, questions)
                assert asked[app] == [fate.answer for fate in (await trace(lab, questions, answers)).values()]
        for observer, role in ((lab.uplink, "system"), (lab.tunnel, "relay")):
            assert {RESOLVERS[role][4]} == {
                seen.destination for seen in observer.seen(port=53) if seen.direction == "out"
            }
