"""Apps that are switched while they talk (L1, L2, L3, L27): Mullvad's st2 and st3, on both wires."""

import errno

import pytest

from tests.netns import hammer
from tests.netns.stage import HOST, REFUSED, RELAY, SERVER, until

pytestmark = pytest.mark.netns

SEEN_AS = {"uplink": HOST, "tunnel": RELAY}
# A connected UDP socket that is ended is a connected one no more (net/ipv4/udp.c, udp_abort).
ENDED = {errno.ECONNABORTED, errno.ECONNRESET, errno.EPIPE, errno.EDESTADDRREQ}
SWITCHES = pytest.mark.parametrize(
    ("program", "verb", "old", "new"),
    [("included", "add", "tunnel", "uplink"), ("excluded", "remove", "uplink", "tunnel")],
    ids=["st2", "st3"],
)


@SWITCHES
async def test_a_switched_app_ends_on_its_old_side_and_opens_on_the_new_one(stage, program, verb, old, new):
    """L2, L3: when the command has returned, nothing more of an old connection is on either side."""
    path = getattr(stage, program)
    before, after = getattr(stage.lab, old), getattr(stage.lab, new)
    async with stage.app(path) as app:
        await hammer.begin(app)
        await until(lambda: hammer.is_seen(before), "all four talk on their old side")

        await stage.daemon.command("app", verb, str(path))
        last = (await app("list(said)"))[0]
        errors = await hammer.until_ended(app)
        for protocol in ("tcp", "udp"):
            for version in (4, 6):
                seen_as = str(SEEN_AS[new][version])
                assert seen_as == await app(f"ask('{protocol}', SERVER{version}, b'anew')")

    assert set(errors.values()) <= ENDED
    assert {new} == await stage.where(payload=b"anew")
    for word in hammer.CONNECTED:
        assert max(hammer.numbers(before, word)) <= last
        assert [] == hammer.numbers(after, word)
    for version in (4, 6):
        assert 1 <= hammer.resets(before, version)  # its peer heard of it where it knew the app
        assert 0 == hammer.resets(after, version)


@SWITCHES
async def test_a_bystander_does_not_lose_a_packet(stage, program, verb, old, new):
    """L2: flows of others go on, on either side; the switched app's old socket is the control."""
    path = getattr(stage, program)
    other = stage.lab.copy_program("python", "other")
    async with stage.app(path) as app, stage.app(other) as included, stage.app(stage.excluded) as excluded:
        apps = [included] if path == stage.excluded else [included, excluded]
        for one in (app, *apps):
            await one("own = tcp(SERVER4); line = read_line(own); datagrams = udp(SERVER6)")
        for number in range(40):
            for one in apps:
                await one("own.send(b'%04d' % number); datagrams.send(b'%04d' % number)", number=number)
            if number == 20:
                await stage.daemon.command("app", verb, str(path))
        for one in apps:
            assert b"".join(b"%04d" % number for number in range(40)) == await one("read_exactly(own, 160)")
            answers = await one("[datagrams.recv(2048).split(b'\\n')[1] for _ in range(40)]")
            assert [b"%04d" % number for number in range(40)] == answers
        with pytest.raises(OSError, match=r"abort|reset|Broken"):
            await app("own.send(b'?') and own.recv(1)")


@SWITCHES
async def test_a_socket_of_no_peer_goes_on_but_on_the_new_side_only(stage, program, verb, old, new):
    """L11: datagrams of an unconnected socket are judged anew; none that was sent after the command is on the old."""
    path = getattr(stage, program)
    before, after = getattr(stage.lab, old), getattr(stage.lab, new)
    async with stage.app(path) as app:
        await app(hammer.CODE)
        await app(
            "def insist(word, family, target):\n"
            "    class Own:\n"
            "        own = socket.socket(family, socket.SOCK_DGRAM)\n"
            "        def sendto(self, text, target):\n"
            "            with contextlib.suppress(OSError): self.own.sendto(text, target)\n"
            "    hammer(word, Own(), target)\n"
            "insist('free4', socket.AF_INET, (SERVER4, 7))\n"
            "insist('free6', socket.AF_INET6, (SERVER6, 7))\n"
            "insist('mapped', socket.AF_INET6, ('::ffff:' + SERVER4, 7))\n"
        )
        words = ("free4", "free6", "mapped")
        await until(lambda: hammer.is_seen(before, words), "all three talk on their old side")
        await stage.daemon.command("app", verb, str(path))
        last = (await app("list(said)"))[0]
        await until(lambda: hammer.is_seen(after, words), "all three talk on their new side")

    for word in words:
        assert max(hammer.numbers(before, word)) <= last


async def test_a_refused_app_is_not_refused_any_longer_than_it_has_to_be(stage, included):
    """L3: what was refused before a switch is judged anew after it, on the very same ports."""
    await stage.daemon.command("off")
    stage.lab.tunnel_down()
    with pytest.raises(OSError, match=REFUSED):
        await included("tcp(SERVER4, source_port=40000)")
    await stage.daemon.command("on")
    await stage.daemon.command("app", "add", str(stage.included))
    assert str(HOST[4]) == await included("read_line(tcp(SERVER4, source_port=40000)).split()[0]")
    assert {"uplink"} == await stage.where(address=SERVER[4])


async def test_there_and_back_again(stage):
    """L1: unsplit, split, unsplit: a process from before and one from between, each time on one side only."""
    async with stage.app(stage.included) as before:
        assert str(RELAY[4]) == await before("ask('tcp', SERVER4)")
        await stage.daemon.command("app", "add", str(stage.included))
        async with stage.app(stage.included) as between:
            for app in (before, between):
                stage.clear()
                assert str(HOST[6]) == await app("ask('udp', SERVER6)")
                assert {"uplink"} == await stage.where(address=SERVER[6])
            await stage.daemon.command("app", "remove", str(stage.included))
            for app in (before, between):
                stage.clear()
                assert str(RELAY[6]) == await app("ask('udp', SERVER6)")
                assert {"tunnel"} == await stage.where(address=SERVER[6])
