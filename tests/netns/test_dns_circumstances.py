"""The table under other circumstances: modes, families that a side lacks, shared sockets, a daemon that was killed."""

import pytest

from tests.netns.fates import Fate, Question, answered, ask, ask_and_trace, ask_everywhere, differences, teach, trace
from tests.netns.stage import REFUSED, Stage, open_stage
from tests.netns.test_dns_table import sections
from tunsplit.lab import configuration, dnsclient
from tunsplit.lab.addresses import NOBODY, RESOLVERS

pytestmark = pytest.mark.netns


async def assert_fate(stage, app, name, fate, questions=None):
    """What becomes of an app's questions; all of them alike."""
    questions = questions or ask_everywhere(name)
    fates = await ask_and_trace(stage, app, questions)
    assert {} == differences(dict.fromkeys(questions, fate), fates)


async def test_in_mode_include_the_listed_app_is_the_tables_normal_one(lab):
    """SPEC.md, "Splitting rules"; mode exclude is every other test's."""
    config = {**sections("per-app", "default"), "split": {"mode": "include"}}
    async with (
        open_stage(lab, **config) as stage,
        stage.app(stage.excluded) as listed,
        stage.app(stage.included) as other,
    ):
        await assert_fate(stage, listed, "listed", answered("relay", "tunnel", 4))
        await assert_fate(stage, other, "other", answered("system", "uplink", 4))


async def test_switched_off_splitting_makes_every_app_a_normal_one(lab):
    """L18: and back."""
    async with open_stage(lab, **sections("per-app", "default")) as stage, stage.app(stage.excluded) as app:
        for word, fate in (("off", answered("relay", "tunnel", 4)), ("on", answered("system", "uplink", 4))):
            await stage.daemon.command(word)
            await assert_fate(stage, app, word, fate)


@pytest.mark.lab(tunnel=(4,))
@pytest.mark.parametrize("filtered", [True, False])
async def test_an_app_whose_side_has_no_ipv6_is_given_no_ipv6_addresses(lab, filtered):
    """SPEC.md, "Proxy quality": if so configured."""
    config = sections("per-app", "default")
    config["dns"]["filter_aaaa"] = filtered
    async with (
        open_stage(lab, **config) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        for app, role, kept in ((normal, "relay", not filtered), (excluded, "system", True)):
            await teach(app)
            for kind, expected in (
                ("A", str(RESOLVERS[role][4])),
                ("AAAA", str(RESOLVERS[role][6]) if kept else "NOERROR"),
            ):
                for protocol in ("udp", "tcp"):
                    told = await app(
                        f"ask_resolver('{protocol}', server, name, '{kind}')", server=str(NOBODY[4]), name="x.who.is"
                    )
                    assert expected == told


@pytest.mark.lab(tunnel=(4,))
async def test_a_resolver_of_a_family_that_its_side_lacks_is_passed_over(lab):
    """L8: and is never asked on the other side."""
    config = sections("linux", "default")
    config["tunnel"]["dns"] = [str(RESOLVERS["relay"][version]) for version in (6, 4)]
    async with open_stage(lab, **config) as stage, stage.app(stage.included) as app:
        questions = ask_everywhere("two", ["nobody"])[:2]  # IPv6 has no way to the tun's proxy then: IPv4
        await assert_fate(stage, app, "two", answered("relay", "tunnel", 4), questions)
    config["tunnel"]["dns"] = [str(RESOLVERS["relay"][6])]
    async with open_stage(lab, **config) as stage, stage.app(stage.included) as app:
        questions = ask_everywhere("none", ["nobody", "lan"])
        questions = [question for question in questions if question.asked.version == 4]
        await assert_fate(stage, app, "none", Fate("SERVFAIL"), questions)


async def test_a_socket_of_apps_of_both_sides_asks_nobody(lab):
    """L13: ambiguous, so blocked; not even the stranger's half of the table is asked."""
    inherit = {"path": str(lab.directory / "bin/excluded"), "inherit": False}
    config = lab.config([], **sections("per-app", "default")) + configuration.render({"[app]": inherit}, {}, [])
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    async with lab.tunsplit(config) as daemon:
        stage = Stage(lab, daemon, *programs)
        async with stage.app(stage.excluded) as app:
            await teach(app)
            await app(
                "shared = open_socket(socket.SOCK_DGRAM, server)\n"
                "child = subprocess.Popen([other, '-I', '-S', '-c', 'import sys; print(flush=True); sys.stdin.read()'],"
                " pass_fds=[shared.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
                "child.stdout.readline()\n"
                "shared.send(encode_question(7, 'shared.who.is'))",
                server=str(NOBODY[4]), other=str(stage.included),
            )  # fmt: skip
            with pytest.raises(OSError, match=REFUSED):
                await app("shared.recv(512)")
            assert set() == await stage.where(port=53)
            await app("child.communicate()")


async def test_what_is_addressed_to_all_is_answered_to_nobody_or_by_the_table(lab):
    """Broadcast and multicast: no neighbour hears the question."""
    async with open_stage(lab, **sections("linux", "default")) as stage, stage.app(stage.included) as app:
        await teach(app)
        for address in ("255.255.255.255", "192.168.50.255", "224.0.0.251", "ff02::fb", "fe80::1%eth0"):
            name = f"{address.replace(':', '-').replace('.', '-').replace('%', '-')}.example"
            await app(
                "with socket.socket(family(server), socket.SOCK_DGRAM) as own, contextlib.suppress(OSError):\n"
                "    own.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)\n"
                "    own.sendto(encode_question(7, name), socket.getaddrinfo(server, 53)[0][4])",
                server=address, name=name,
            )  # fmt: skip
        after = Question("udp", NOBODY[4], "after.who.is")
        await assert_fate(stage, app, "after", answered("relay", "tunnel", 4), [after])
        assert "uplink" not in await stage.where(port=53)
        assert [] == [seen for seen in lab.uplink.seen("udp") if b"example" in seen.payload]


async def test_a_killed_daemon_answers_nobody_and_nothing_leaves(lab):
    """L15."""
    async with (
        open_stage(lab, **sections("linux", "public")) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        await assert_fate(stage, normal, "before", answered("public", "tunnel", 4))
        await stage.daemon.kill()
        for app, name in ((normal, "normal"), (excluded, "excluded")):
            for fate in (await ask_and_trace(stage, app, ask_everywhere(name))).values():
                assert "Error" in fate.answer
                assert not fate.sides


@pytest.mark.parametrize("version", [4, 6])
async def test_our_listener_is_nobodys_to_talk_to(lab, version):
    """KERNEL facts: TCP questions come back into the tun; who connects there by himself is not answered."""
    async with open_stage(lab, **sections("linux", "default")) as stage, stage.app(stage.included) as app:
        shown = (await lab.host.run(["ss", "-Hltn", f"-{version}"])).stdout
        (local,) = {line.split()[3] for line in shown.splitlines()}
        address, _, port = local.rpartition(":")
        await teach(app)
        with pytest.raises(OSError, match=f"{REFUSED}|reset|closed|timed out"):
            await app(
                "exchange('tcp', server, encode_question(7, 'direct.who.is'), port)",
                server=address.partition("%")[0].strip("[]"), port=int(port),
            )  # fmt: skip
        assert set() == await stage.where(payload=dnsclient.encode_name("direct.who.is"))


async def test_without_system_dns_an_excluded_apps_question_is_servfail(lab):
    """Android's table, and nothing found: not the relay's, nor a guess."""
    config = sections("android", "default")
    config["dns"]["system"] = [str(lab.server(4) + 200)]  # there is no such host
    async with open_stage(lab, **config) as stage, stage.app(stage.excluded) as app:
        answers = await ask(app, [Question("udp", RESOLVERS["relay"][4], "nobody-there.who.is")])
        fates = await trace(lab, [Question("udp", RESOLVERS["relay"][4], "nobody-there.who.is")], answers)
    (fate,) = fates.values()
    assert ("SERVFAIL", frozenset()) == (fate.answer, fate.sides - {"uplink"})
