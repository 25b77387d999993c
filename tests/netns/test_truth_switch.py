"""Apps that are switched while they talk (L1, L2, L3, L27): Mullvad's st2 and st3, on both wires."""

import errno

import pytest

from tests.netns import hammer
from tests.netns.stage import HOST, REFUSED, RELAY, SERVER, start_app, until

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


TAKE = """
import threading
ended, taken = {}, {}
def take(version):
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    listener = socket.create_server(("", 7070), family=family)
    def serve(own):
        who = own.recv(1)
        taken[version, who] = 0
        try:
            while octets := own.recv(65536):
                taken[version, who] += len(octets)
            ended[version, who] = 0
        except OSError as error:
            ended[version, who] = error.errno
    def accept():
        while True:
            own, _ = listener.accept()
            own.settimeout(None)
            threading.Thread(target=serve, args=(own,), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
for version in (4, 6): take(version)
"""
POUR = """
import threading
def pour(own):
    own.settimeout(None)
    with contextlib.suppress(OSError):
        while True: own.sendall(bytes(65536))
for own in open_to: threading.Thread(target=pour, args=(own,), daemon=True).start()
"""


@SWITCHES
async def test_a_server_hears_of_a_connection_that_a_switch_ends(stage, program, verb, old, new):
    """L2, L3: also if it does not believe the first RST (RFC 5961 §3.2); a bystander goes on."""
    path = getattr(stage, program)
    async with (
        start_app(stage.lab.internet, stage.included) as server,
        stage.app(path) as app,
        stage.app(stage.lab.copy_program("python", "other")) as other,
    ):
        await server(TAKE)
        # All are open before the first stream leaves little time for a look at who opens another.
        for number, one in enumerate((app, other)):
            await one("open_to = [tcp(server, 7070) for server in (SERVER4, SERVER6)]")
            await one("for own in open_to: own.sendall(b'%d' % number)", number=number)
        for one in (app, other):
            await one(POUR)

        async def all_pour():
            taken = await server("taken")
            return 4 == len(taken) and all(taken.values()) and taken

        await until(all_pour, "all four connections are under way")
        await stage.daemon.command("app", verb, str(path))
        before = await server("taken")

        async def has_ended():
            return 2 == len(await server("ended"))

        await until(has_ended, "the server has heard of both ends")
        assert {(version, b"0"): errno.ECONNRESET for version in (4, 6)} == await server("ended")

        async def goes_on():
            taken = await server("taken")
            return all(taken[version, b"1"] > before[version, b"1"] for version in (4, 6))

        await until(goes_on, "who was not switched goes on")
        assert 2 == len(await server("ended"))


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
