"""What is on the wire of a question and of its answer, whoever asks and however."""

import itertools
from collections import Counter

import pytest

from tests.netns.fates import Question, ask, teach
from tests.netns.stage import open_stage
from tests.netns.test_dns_table import sections
from tunsplit.lab import dnsclient
from tunsplit.lab.addresses import NOBODY, RESOLVERS

pytestmark = pytest.mark.netns

QUESTIONS = 60

ASK_BY_MAPPED_ADDRESS = """
with socket.socket(socket.AF_INET6, kind) as own:
    own.connect((f"::ffff:{server}", 53))
    message = encode_question(7, name)
    if kind == socket.SOCK_STREAM:
        own.sendall(struct.pack("!H", len(message)) + message)
        answer = own.recv(2000)[2:]
    else:
        own.send(message)
        answer = own.recv(2000)
"""
ASK_UNCONNECTED = """
with socket.socket(family(servers[0]), socket.SOCK_DGRAM) as own:
    for number, server in enumerate(servers):
        own.sendto(encode_question(number, f"{number}.who.is"), (server, 53))
    told = {}
    while len(told) < len(servers):
        answer, source = own.recvfrom(2000)
        told[source[:2]] = read_answer(answer)
"""


@pytest.mark.parametrize("kind", ["DGRAM", "STREAM"])
async def test_an_ipv4_mapped_address_is_an_ipv4_question(lab, kind):
    """L11."""
    async with open_stage(lab, **sections("per-app", "default")) as stage:
        for program, role, side in ((stage.excluded, "system", "uplink"), (stage.included, "relay", "tunnel")):
            async with stage.app(program) as app:
                await teach(app)
                name = f"{role}-mapped.who.is"
                await app(f"kind = socket.SOCK_{kind}" + ASK_BY_MAPPED_ADDRESS, server=str(NOBODY[4]), name=name)
                assert str(RESOLVERS[role][4]) == await app("read_answer(answer)")
                assert {side} == await stage.where(payload=dnsclient.encode_name(name))


@pytest.mark.parametrize("version", [4, 6])
async def test_each_answer_comes_from_the_address_that_was_asked(lab, version):
    """SPEC.md, "Interception": one unconnected socket, several resolvers."""
    servers = [str(own[version]) for own in (RESOLVERS["lan"], RESOLVERS["public"], RESOLVERS["system"], NOBODY)]
    async with open_stage(lab, **sections("linux", "default")) as stage, stage.app(stage.included) as app:
        await teach(app)
        await app(ASK_UNCONNECTED, servers=servers)
        assert {(server, 53): str(RESOLVERS["relay"][4]) for server in servers} == await app("told")


async def test_source_ports_and_identifiers_are_not_to_be_guessed(lab):
    """SPEC.md, "Proxy quality": nor does an app's own identifier leave."""
    async with open_stage(lab, **sections("linux", "default")) as stage, stage.app(stage.included) as app:
        await ask(app, [Question("udp", NOBODY[4], f"{number}.who.is") for number in range(QUESTIONS)])
        await stage.where()
        sent = lab.tunnel.seen("udp", destination=RESOLVERS["relay"][4], port=53)
    ports = [seen.source_port for seen in sent]
    numbers = [int.from_bytes(seen.payload[:2], "big") for seen in sent]

    assert QUESTIONS == len(sent)
    # Of 60 drawn by lot from 65536, more than a few alike are out of the question.
    assert len(set(numbers)) > QUESTIONS - 5
    assert len({second - first for first, second in itertools.pairwise(numbers)}) > QUESTIONS // 2
    # A port serves a while, and is changed for another before it is worth guessing.
    assert max(Counter(ports).values()) <= 32
    ports = sorted(set(ports))
    assert len(ports) > 2
    assert len({second - first for first, second in itertools.pairwise(ports)}) > 1


async def test_what_links_an_app_to_itself_is_not_passed_on(lab):
    """L30: of what EDNS carries, only that DNSSEC is wanted."""
    dig = lab.copy_program("dig", "excluded-dig")
    words = ["+cookie=0123456789abcdef", "+subnet=203.0.113.0/24", "+nsid", "+dnssec", "+ednsopt=65001:feedface"]
    async with open_stage(lab, [dig], **sections("per-app", "default")) as stage:
        done = await lab.host.run([dig, f"@{NOBODY[4]}", "who.is", "TXT", "+tries=1", *words])
        assert '"system"' in done.stdout
        await stage.where()
        (question,) = lab.uplink.seen(payload=dnsclient.encode_name("who.is"), destination=RESOLVERS["system"][4])
    for secret in ("0123456789abcdef", "cb0071", "feedface"):
        assert bytes.fromhex(secret) not in question.payload
    assert question.payload.endswith(bytes.fromhex("80000000"))  # DO, and no options (RFC 6891 §6.1.3)


async def test_dig_sees_nothing_odd(lab):
    """The stranger's client: EDNS sizes and flags, several questions on one connection."""
    dig = lab.copy_program("dig", "included-dig")
    async with open_stage(lab, **sections("linux", "default")):
        for words in (["+noedns"], ["+bufsize=512"], ["+tcp"], ["+dnssec"], ["+tcp", "+keepopen", "who.is", "TXT"]):
            done = await lab.host.run([dig, f"@{NOBODY[6]}", "+tries=1", "who.is", "TXT", *words])
            assert '"relay"' in done.stdout
            assert "status: NOERROR" in done.stdout
            for complaint in ("WARNING", "Warning", "mismatch", "malformed", "timed out", "failed"):
                assert complaint not in done.stdout
