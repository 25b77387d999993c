"""The lab's resolvers, well-behaved and odd; dig judges what they say."""

import socket

import pytest
import trio

from tunsplit.lab import addresses, dnsclient, oddresolver, open_lab
from tunsplit.lab.resolvers import Question

pytestmark = pytest.mark.netns


async def dig(lab, resolver, *words):
    """The lines of an answer."""
    command = ["dig", "+short", "+time=2", "+tries=1", f"@{resolver}", *words]
    return (await lab.host.run(command, check=False)).stdout.splitlines()


def to_relay(lab):
    lab.host.ip("route add 10.64.0.0/24 dev wg0\nroute add fd64::/64 dev wg0")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("role", ["relay", "lan", "public", "system"])
async def test_a_resolver_writes_down_by_whom_it_was_asked(lab, role, version):
    to_relay(lab)
    own = addresses.RESOLVERS[role]
    seen_as = (addresses.HOST_TUNNEL if role == "relay" else addresses.HOST)[version].ip

    assert [str(own[4])] == await dig(lab, own[version], "any.thing.who.is", "A")
    assert [str(own[6])] == await dig(lab, own[version], "other.who.is", "AAAA", "+tcp")
    asked = [Question("any.thing.who.is", "A", seen_as), Question("other.who.is", "AAAA", seen_as)]
    assert asked == lab.resolvers[role].questions()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
async def test_the_client_understands_what_the_resolvers_say(lab, protocol, version):
    copy = lab.copy_program("python", "client")
    server = str(addresses.PUBLIC_RESOLVER[version])
    for words, expected in (
        (("x.who.is", "A"), "8.8.8.8"),
        (("x.who.is", "AAAA"), "2001:4860:4860::8888"),
        (("who.is", "TXT"), "public"),
        (("nobody.knows", "A"), "REFUSED"),
    ):
        done = await lab.host.run([copy, "-I", "-S", dnsclient.__file__, protocol, server, *words])
        assert f"{expected}\n" == done.stdout


async def test_a_resolver_that_has_stopped_is_not_there(lab):
    await lab.resolvers["public"].stop()

    copy = lab.copy_program("python", "client")
    done = await lab.host.run([copy, "-I", "-S", dnsclient.__file__, "udp", "8.8.8.8", "who.is"], check=False)
    assert (1, "Connection refused\n") == (done.returncode, done.stderr)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("role", ["relay", "lan", "public"])
async def test_an_odd_resolver_lives_where_it_is_told(lab, role, version):
    to_relay(lab)
    kind = "A" if version == 4 else "AAAA"
    async with lab.odd_resolver(role, "slow", version=version, delay_s=0.01) as odd:
        assert [str(odd.address)] == await dig(lab, odd.address, "X.example", kind)
        assert [str(odd.address)] == await dig(lab, odd.address, "y.example", kind, "+tcp")
    assert ["x.example", "y.example"] == [question.name for question in odd.questions]
    assert [False, True] == [question.over_tcp for question in odd.questions]


async def test_a_silent_resolver_says_nothing(lab):
    async with lab.odd_resolver("public", "silent") as odd:
        assert not any("NOERROR" in line for line in await dig(lab, odd.address, "x.example"))
        assert ["x.example"] == [question.name for question in odd.questions]


async def test_a_failing_resolver_says_so(lab):
    async with lab.odd_resolver("public", "failing") as odd:
        assert "status: SERVFAIL" in "".join(await dig(lab, odd.address, "x.example", "+noshort", "+comments"))


async def test_a_truncating_resolver_has_a_long_answer_by_tcp(lab):
    async with lab.odd_resolver("public", "truncating") as odd:
        assert oddresolver.LONG == len(await dig(lab, odd.address, "x.example"))
        assert [False, True] == [question.over_tcp for question in odd.questions]


async def test_a_lying_resolver_tells_the_truth_last(lab):
    """Four lies and then the truth; who believes the first datagram that comes has been had."""
    question = dnsclient.encode_question(4711, "x.example")
    own = trio.socket.from_stdlib_socket(lab.host.socket(socket.AF_INET, socket.SOCK_DGRAM))
    async with lab.odd_resolver("public", "lying") as odd:
        with own, trio.fail_after(5):
            await own.sendto(question, (str(odd.address), 53))
            told = [await own.recvfrom(2048) for _ in range(5)]
    lie = str(oddresolver.LIE[4])

    assert [False, True, True, True, True] == [(str(odd.address), 53) == sender for _, sender in told]
    assert [True, False, True, True, True] == [question[:2] == message[:2] for message, _ in told]
    assert [True, True, False, True, True] == [question[12:] in message for message, _ in told]
    assert [lie, lie, lie, None, str(odd.address)] == [understand(message) for message, _ in told]


def understand(message):
    try:
        return dnsclient.read_answer(message)
    except ValueError:  # cut off within an address
        return None


async def test_without_observers_nothing_is_written_down():
    async with open_lab(observe=False) as lab:
        assert ["8.8.8.8"] == await dig(lab, "8.8.8.8", "x.who.is")
        assert [] == lab.resolvers["public"].questions()
