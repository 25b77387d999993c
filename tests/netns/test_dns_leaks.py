"""Questions by any way that an app may try: by the table, or not at all (L10, L32, L36).

As in Mullvad's own leak test, an app asks by sockets that are bound to either side, at resolvers that it may use and at
others; and as that test does not, by devices, raw packets, encrypted, and by way of the system's resolver.
"""

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
    start_app_with_resolver,
    teach,
    trace,
)
from tests.netns.stage import HOST, HOST_TUNNEL, REFUSED, open_stage, until
from tests.netns.test_dns_table import sections
from tunsplit.lab import dnsclient
from tunsplit.lab.addresses import RESOLVERS

pytestmark = pytest.mark.netns

PUBLIC, LAN = RESOLVERS["public"], RESOLVERS["lan"]
ROWS = {  # setting → normal app, excluded app, on platform linux
    "default": (("relay", "tunnel"), ("relay", "tunnel")),
    "private": (("lan", "uplink"), ("lan", "uplink")),
    "public": (("public", "tunnel"), ("public", "uplink")),
}
SETTINGS = pytest.mark.parametrize("setting", ROWS)

# In the app: every socket that `open_socket` gives is prepared so before it is connected.
PREPARE = """
socket_class = socket.socket
def prepared(*arguments):
    own = socket_class(*arguments)
    {code}
    return own
class socket_module:
    def __getattr__(self, name):
        return prepared if name == "socket" else getattr(real_socket, name)
import socket as real_socket
socket = socket_module()
"""
BY_ADDRESS = "own.bind((sources[6 if own.family == real_socket.AF_INET6 else 4], 0))"
BY_DEVICE = "own.setsockopt(real_socket.SOL_SOCKET, real_socket.SO_BINDTODEVICE, device.encode())"
# As systemd-resolved does for the resolvers of a link (KERNEL: IP_UNICAST_IF is 50, IPV6_UNICAST_IF 76).
BY_HINT = """index = struct.pack("!I", real_socket.if_nametoindex(device))
    own.setsockopt(*((41, 76) if own.family == real_socket.AF_INET6 else (0, 50)), index)"""


@SETTINGS
@pytest.mark.parametrize("sources", [HOST, HOST_TUNNEL], ids=["uplink", "tunnel"])
async def test_a_bound_address_does_not_move_a_question(lab, setting, sources):
    """L10."""
    await assert_the_table_holds(
        lab, setting, PREPARE.format(code=BY_ADDRESS) + f"sources = { {key: str(own) for key, own in sources.items()} }"
    )


@SETTINGS
@pytest.mark.parametrize("device", ["eth0", "wg0"])
async def test_a_device_that_is_hinted_at_does_not_move_a_question(lab, setting, device):
    """L10: this is how systemd-resolved asks."""
    await assert_the_table_holds(lab, setting, PREPARE.format(code=BY_HINT) + f"device = {device!r}")


async def assert_the_table_holds(lab, setting, code):
    async with (
        open_stage(lab, **sections("linux", setting)) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        for app, name, cell in zip((normal, excluded), ("normal", "excluded"), ROWS[setting], strict=True):
            questions = ask_everywhere(name)
            fates = await ask_and_trace(stage, app, questions, code)
            assert {} == differences(dict.fromkeys(questions, answered(*cell, 4)), fates)


@pytest.mark.parametrize("device", ["eth0", "wg0"])
async def test_a_question_bound_to_a_device_goes_nowhere(lab, device):
    """L10, L36: nor does ARP tell whom it was for."""
    async with (
        open_stage(lab, **sections("linux", "public")) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        for app, name in ((normal, "normal"), (excluded, "excluded")):
            questions = ask_everywhere(name)
            code = PREPARE.format(code=BY_DEVICE) + f"device = {device!r}"
            for fate in (await ask_and_trace(stage, app, questions, code)).values():
                assert "Error" in fate.answer
                assert not fate.sides
        for version in (4, 6):
            assert set() == await stage.where(destination=LAN[version])
        assert set() == await stage.where(port=53)


async def test_the_control_a_device_does_move_a_question_without_tunsplit(lab):
    async with start_app_with_resolver(lab, lab.copy_program("python", "app"), LAN[4]) as app:
        questions = [Question("udp", LAN[4], "control.who.is")]
        code = PREPARE.format(code=BY_DEVICE) + "device = 'eth0'"
        assert {questions[0]: answered("lan", "uplink", 4)} == await trace(
            lab, questions, await ask(app, questions, code)
        )


@SETTINGS
async def test_with_intercept_listed_other_resolvers_are_refused_or_on_the_uplink(lab, setting):
    """SPEC.md, "DNS": an included app's questions to others go nowhere, an excluded app's out as they are."""
    config = sections("linux", setting)
    config["dns"]["intercept"] = "listed"
    async with (
        open_stage(lab, **config) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        for app, name, cell in zip((normal, excluded), ("normal", "excluded"), ROWS[setting], strict=True):
            others = [role for role in ("lan", "public") if role != cell[0]]
            questions = [question for question in ask_everywhere(name, [cell[0]]) if question.asked.version == 4]
            fates = await ask_and_trace(stage, app, questions)
            assert {} == differences(dict.fromkeys(questions, answered(*cell, 4)), fates)
            for role in others:
                questions = ask_everywhere(name, [role])
                for question, fate in (await ask_and_trace(stage, app, questions)).items():
                    if app is excluded:
                        assert answered(role, "uplink", question.asked.version) == fate
                    else:
                        assert "Error" in fate.answer
                        assert not fate.sides


# A whole IPv4 packet with a UDP datagram; the kernel adds the checksum and nothing else.
SEND_RAW = """
datagram = struct.pack("!4H", 4444, 53, 8 + len(question), 0) + question
head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0, bytes(4), socket.inet_aton(server))
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as own:
    own.sendto(head + datagram, (server, 0))
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as own:
    own.sendto(datagram, (server, 0))
with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_UDP) as own:
    own.setsockopt(socket.IPPROTO_IPV6, 7, 6)  # IPV6_CHECKSUM
    own.sendto(datagram, (server6, 0))
"""


async def see(stage, **wanted):
    """What was seen on both sides."""
    await stage.where()
    return [str(seen) for observer in (stage.lab.uplink, stage.lab.tunnel) for seen in observer.seen(**wanted)]


@pytest.mark.parametrize("unattributed", ["block", "tunnel", "uplink"])
async def test_a_raw_packet_does_not_slip_past_the_table(lab, unattributed):
    """L32: nor out by the LAN's route; its rule look-up knows no ports."""
    async with (
        open_stage(lab, **sections("linux", "default"), split={"unattributed": unattributed}) as stage,
        stage.app(stage.included) as app,
    ):
        await teach(app)
        for resolver in (LAN, PUBLIC):
            await app(
                f"question = encode_question(7, 'raw-{resolver[4]}.who.is'){SEND_RAW}",
                server=str(resolver[4]), server6=str(resolver[6]),
            )  # fmt: skip
        # Asked in order: what was sent before has been dealt with.
        assert [str(RESOLVERS["relay"][4])] == await ask(app, [Question("udp", LAN[4], "after.who.is")])
        for resolver in (LAN, PUBLIC):
            for version in (4, 6):
                assert [] == await see(stage, destination=resolver[version])
        assert {"tunnel"} == await stage.where(port=53)
    asked = {role: {question.name for question in own.questions()} for role, own in lab.resolvers.items()}
    assert [set(), set(), set()] == [asked[role] for role in ("lan", "public", "system")]
    assert asked["relay"] - {"after.who.is"} <= {f"raw-{resolver[4]}.who.is" for resolver in (LAN, PUBLIC)}


@pytest.mark.parametrize("version", [4, 6])
async def test_an_answer_that_nobody_waits_for_is_not_told_to_the_lan(lab, version):
    """L32: the kernel's ICMP error goes to the LAN's resolver, and quotes the answer."""
    source = {4: HOST[4], 6: "fd50::2"}[version]
    if version == 6:
        lab.host.ip(f"address add {source}/64 dev eth0")
    config = sections("linux", "default")
    async with lab.odd_resolver("relay", "slow", delay_s=0.3) as relay:
        config["tunnel"]["dns"] = [str(relay.address)]
        async with open_stage(lab, **config) as stage, stage.app(stage.included) as app:
            await teach(app)
            await app(
                "own = socket.socket(family(server), socket.SOCK_DGRAM); own.bind((source, 0))\n"
                "own.sendto(encode_question(7, 'given-up.example'), (server, 53))",
                server=str(LAN[version]), source=str(source),
            )  # fmt: skip

            async def is_asked():
                return relay.questions

            await until(is_asked, "the relay's resolver is asked")
            await app("own.close()")
            # Asked later, so answered later.
            assert [str(relay.address)] == await ask(app, [Question("udp", LAN[4], "after.example")])
            assert ["given-up.example", "after.example"] == [question.name for question in relay.questions]
            assert [] == [told for told in await see(stage, destination=LAN[version]) if "ndp" not in told]


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
@pytest.mark.parametrize("version", [4, 6])
async def test_encrypted_dns_follows_the_table_or_goes_nowhere(lab, protocol, version):
    """L32: port 853, the LAN's included."""
    async with (
        open_stage(lab, **sections("linux", "public", version)) as stage,
        stage.app(stage.included) as normal,
        stage.app(stage.excluded) as excluded,
    ):
        for app, side in ((normal, "tunnel"), (excluded, "uplink")):
            await teach(app)
            for server, sides in ((PUBLIC[version], {side}), (LAN[version], set()), (lab.server(version), set())):
                stage.clear()
                with pytest.raises(OSError, match=f"{REFUSED}|reset"):
                    await app(f"exchange('{protocol}', server, bytes(12), port=853)", server=str(server))
                assert sides == await stage.where(destination=server)


@pytest.mark.parametrize("platform", ["linux", "per-app"])
async def test_getaddrinfo_by_our_own_stub_asks_for_the_app(lab, platform):
    """SPEC.md, "DNS": what the host's resolv.conf names is our stub, which knows who asks."""
    config = sections(platform, "public")
    config["dns"]["listen"] = ["127.0.0.54:53"]
    _, expected = {"linux": (None, "public"), "per-app": (None, "system")}[platform]
    async with open_stage(lab, **config) as stage:
        for program, role, side in ((stage.included, "public", "tunnel"), (stage.excluded, expected, "uplink")):
            async with start_app_with_resolver(lab, program, "127.0.0.54") as app:
                name = f"{program.name}.who.is"
                found = await app("sorted({entry[4][0] for entry in socket.getaddrinfo(name, 80)})", name=name)
                assert sorted(map(str, RESOLVERS[role].values())) == found
                assert {side} == await stage.where(payload=dnsclient.encode_name(name))


async def test_a_reload_changes_the_table_at_once(lab):
    """L16: from one platform to another, with both apps running."""
    async with open_stage(lab, **sections("linux", "public")) as stage, stage.app(stage.excluded) as app:
        for platform, role, side in (("windows", "public", "tunnel"), ("android", "system", "uplink")):
            await configure(stage, **sections(platform, "public"))
            questions = ask_everywhere(platform)
            fates = await ask_and_trace(stage, app, questions)
            assert {} == differences(dict.fromkeys(questions, answered(role, side, 4)), fates)


async def test_a_switched_apps_questions_go_its_new_way(lab):
    """L2, L3: the same names again, so that no cache speaks for the other side."""
    async with open_stage(lab, **sections("per-app", "default")) as stage, stage.app(stage.excluded) as app:
        questions = ask_everywhere("switched")
        for words, role in (((), "system"), (("app", "remove"), "relay"), (("app", "add"), "system")):
            if words:
                await stage.daemon.command(*words, str(stage.excluded))
            fates = await trace(lab, questions, await ask(app, questions))
            assert dict.fromkeys(questions, role) == {question: fate.answer for question, fate in fates.items()}


async def test_a_tables_refusal_is_no_way_out(lab):
    """On macOS there is no private custom resolver: nobody is asked."""
    async with open_stage(lab, **sections("macos", "private")) as stage, stage.app(stage.excluded) as app:
        questions = ask_everywhere("refused")
        fates = await ask_and_trace(stage, app, questions)
        assert {} == differences(dict.fromkeys(questions, Fate("REFUSED")), fates)
        assert set() == await stage.where(port=53)
