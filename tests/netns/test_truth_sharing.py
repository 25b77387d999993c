"""Sockets that are not one app's alone (L11, L13, L27, L28): never guessed, and visible."""

from contextlib import AsyncExitStack
from functools import partial

import pytest

from tests.netns.family import agent, bear, bear_daemon
from tests.netns.sides import is_on
from tests.netns.stage import HOST, REFUSED, start_app, until, where

pytestmark = pytest.mark.netns


async def reasons(stage, port):
    """What is said about the flows from this port."""
    return {(flow["verdict"], flow["reason"]) for flow in await stage.daemon.flows()
            if flow["source"].endswith(f":{port}")}  # fmt: skip


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("first", ["parent", "child"])
async def test_a_socket_that_both_sides_inherited_is_nobodys(stage, included, first, version):
    """L13, L28: parent in the tunnel, child on the uplink: whoever sends, it is blocked, until one of them closes."""
    await included(
        f"own = socket.socket(family(SERVER{version}), socket.SOCK_DGRAM); own.bind(('', 4000))\n"
        f"target = (SERVER{version}, 7)"
    )
    number = await included("own.fileno()")
    heir = await bear(included, agent(stage.excluded), [number])
    await heir(f"own = socket.socket(fileno={number}); target = (SERVER{version}, 7)")
    for app in (included, heir) if first == "parent" else (heir, included):
        await app("own.sendto(b'whose am i', target)")

    async def is_ambiguous():
        return {("block", "ambiguous")} == await reasons(stage, 4000)

    await until(is_ambiguous, "the flow is shown as ambiguous")
    assert set() == await stage.where(payload=b"whose am i")

    await included("own.close()")
    await heir(f"own.sendto(b'mine alone', (ROUTER{version}, 7))")
    await heir("with contextlib.suppress(OSError): own.recv(100)")
    assert {"uplink"} == await stage.where(payload=b"mine alone")


OPEN = """
owns = [socket.socket(family(server), socket.SOCK_DGRAM) for server in (SERVER4, SERVER6)]
for number, own in enumerate(owns): own.bind(('', first + number))
"""
INHERIT = "owns = [socket.socket(fileno=number) for number in numbers]"
SEND = "for own, server in zip(owns, (SERVER4, SERVER6)): own.sendto(b'whose am i', (server, 7))"
CLOSE = "for own in owns: own.close()"


async def both_are_ambiguous(stage, first=4000):
    return [{("block", "ambiguous")}] * 2 == [await reasons(stage, port) for port in (first, first + 1)]


async def test_a_fresh_socket_that_an_orphan_inherited_is_nobodys(stage, included):
    """L6, L28: forked twice, and of the other side's program; who else has the socket opens flows all the time.

    The first time nobody has been looked through since both were born, the second time the orphan alone is new.
    """
    assert await is_on(stage, included, "tunnel")
    for first in (4000, 4100):
        stage.clear()
        await included(OPEN, first=first)
        numbers = await included("[own.fileno() for own in owns]")
        orphan = await bear_daemon(included, stage.included, stage.excluded, numbers)
        assert await orphan("os.getppid()") != included.pid
        await orphan(INHERIT, numbers=numbers)
        await orphan(SEND)

        await until(partial(both_are_ambiguous, stage, first), "both flows are shown as ambiguous")
        assert set() == await stage.where(payload=b"whose am i")

        await included(CLOSE)
        for own in (0, 1):
            await orphan(f"owns[{own}].sendto(b'mine alone', ((ROUTER4, ROUTER6)[{own}], 7))")
            await orphan(f"with contextlib.suppress(OSError): owns[{own}].recv(100)")
        assert {"uplink"} == await stage.where(payload=b"mine alone")
        await orphan.end()


async def test_a_fresh_socket_that_siblings_inherited_is_nobodys(stage, included):
    """L28: of both sides' programs, which have opened flows of their own, from who has closed it since."""
    await included(OPEN, first=4000)
    numbers = await included("[own.fileno() for own in owns]")
    excluded, other = [await bear(included, agent(one), numbers) for one in (stage.excluded, stage.included)]
    await included(CLOSE)
    for sibling, side in ((other, "tunnel"), (excluded, "uplink")):
        await sibling(INHERIT, numbers=numbers)
        assert await is_on(stage, sibling, side)
    await excluded(SEND)

    await until(partial(both_are_ambiguous, stage), "both flows are shown as ambiguous")
    await other(SEND)
    assert set() == await stage.where(payload=b"whose am i")


PASS = "with socket.socket(socket.AF_UNIX) as way: way.connect(path); socket.send_fds(way, [b'!'], [own.fileno()])"
LISTEN = "door = socket.socket(socket.AF_UNIX); door.bind(path); door.listen()"
TAKE = """
way, _ = door.accept()
own = socket.socket(fileno=socket.recv_fds(way, 1, 1)[1][0])
own.settimeout(3)
"""


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_connection_that_is_handed_to_the_other_side_ends(stage, excluded, included, protocol):
    """L27: no event tells of it; it ends at the next look at all holders, whoever of them sends."""
    path = str(stage.lab.directory / "door")
    await excluded(LISTEN, path=path)
    await included(f"own = {protocol}(SERVER4); own.send(b'before'); own.recv(100)")
    await included(f"kept = {protocol}(SERVER4); kept.send(b'kept'); kept.recv(100)")
    await included(PASS, path=path)
    await excluded(TAKE)

    async def has_ended():
        try:
            await excluded("own.send(b'after'), own.recv(1000)")
        except OSError:
            return True
        return False

    await until(has_ended, "the connection has ended")
    stage.clear()
    for app in (excluded, included):
        with pytest.raises(OSError, match="abort|reset|Broken|Destination|" + REFUSED):
            await app("own.send(b'late'); own.recv(1); own.send(b'late')")
    assert set() == await stage.where(payload=b"late")
    assert b"kept" in await included("kept.send(b'kept') and kept.recv(100)")


async def test_a_fresh_socket_that_is_handed_over_is_judged_by_all_who_hold_it(stage, excluded, included):
    """L28: held by both it is ambiguous; closed by the giver, it is the taker's."""
    path = str(stage.lab.directory / "door")
    await excluded(LISTEN, path=path)
    await included("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.bind(('', 4000))")
    await included(PASS, path=path)
    await excluded(TAKE)
    await excluded("own.sendto(b'held by both', (SERVER4, 7))")

    async def is_ambiguous():
        return {("block", "ambiguous")} == await reasons(stage, 4000)

    await until(is_ambiguous, "the flow is shown as ambiguous")
    await included("own.close()")
    await excluded("own.sendto(b'held by one', (ROUTER4, 7))")
    await excluded("with contextlib.suppress(OSError): own.recv(100)")
    assert set() == await stage.where(payload=b"held by both")
    assert {"uplink"} == await stage.where(payload=b"held by one")


BIND = """
owns = []
for _ in range({count}):
    own = socket.socket({family}, socket.SOCK_DGRAM)
    own.setsockopt(socket.SOL_SOCKET, {option}, 1)
    own.bind(('', 4000))
    owns.append(own)
"""
OPTIONS = pytest.mark.parametrize("option", ["socket.SO_REUSEADDR", "socket.SO_REUSEPORT"])
FAMILIES = {4: "socket.AF_INET", 6: "socket.AF_INET6"}


@OPTIONS
@pytest.mark.parametrize("version", [4, 6])
async def test_a_port_of_both_sides_is_ambiguous(stage, excluded, included, option, version):
    """L11, L28: two sockets of each; whichever sends is not guessed. Of one side alone, it is plain."""
    bind = BIND.format(count=2, family=FAMILIES[version], option=option)
    for app in (excluded, included):
        await app(bind)
    for app in (excluded, included):
        await app(f"for own in owns: own.sendto(b'whose am i', (SERVER{version}, 7))")

    async def is_ambiguous():
        return {("block", "ambiguous")} == await reasons(stage, 4000)

    await until(is_ambiguous, "the flow is shown as ambiguous")
    assert set() == await stage.where(payload=b"whose am i")

    await included("for own in owns: own.close()")

    # Another server: what was refused stays so for a while. What comes with the deaths of the others may be theirs.
    async def arrives():
        await excluded(f"for own in owns: own.sendto(b'not theirs', (ROUTER{version}, 7))")
        return len(await excluded("len(select.select(owns, [], [], 1)[0]) * '.'"))

    await until(arrives, "an answer")
    assert {"uplink"} == await stage.where(payload=b"not theirs")


@pytest.mark.parametrize("version", [4, 6])
async def test_four_users_share_a_port(stage, version):
    """L28: SO_REUSEADDR asks nobody; two users' apps of each side are ambiguous until one side's are gone."""
    bind = BIND.format(count=1, family=FAMILIES[version], option="socket.SO_REUSEADDR")
    programs = {"excluded": stage.excluded, "included": stage.included}
    async with AsyncExitStack() as stack:
        apps = []
        for number, name in enumerate(["excluded", "included"] * 2):
            app = await stack.enter_async_context(stage.app(programs[name]))
            await app(f"os.setgroups([]); os.setgid({2000 + number}); os.setuid({2000 + number})")
            await app(bind)
            apps.append(app)
        for app in apps:
            await app(f"owns[0].sendto(b'whose am i', (SERVER{version}, 7))")

        async def is_ambiguous():
            return {("block", "ambiguous")} == await reasons(stage, 4000)

        await until(is_ambiguous, "the flow is shown as ambiguous")
        assert set() == await stage.where(payload=b"whose am i")
        for app in apps[::2]:
            await app("owns[0].close()")
        for app in apps[1::2]:
            stage.clear()

            async def has_passed(app=app):
                # Again: what waits in the tun while a socket of the other side dies may be that one's, and is dropped.
                await app(f"owns[0].sendto(b'not theirs', (ROUTER{version}, 7))")
                return "tunnel" in await stage.where(payload=b"not theirs")

            await until(has_passed, "it is in the tunnel")
            assert {"tunnel"} == await stage.where(payload=b"not theirs")


@pytest.mark.parametrize(("name", "side"), [("excluded", "uplink"), ("included", "tunnel")])
async def test_one_socket_to_a_thousand_peers(stage, name, side):
    """L11: each of them hears of it on its side, and from one and the same port."""
    async with stage.app(getattr(stage, name)) as app:
        await app(
            "own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for port in range(10_000, 11_000):\n"
            "    own.sendto(b'one of many', (SERVER4, port))\n"
            "    if port % 50 == 0: own.sendto(b'?', (SERVER4, 7)), own.recv(100)"
        )

        async def are_all_there():
            return 1000 <= len({frame.destination_port for frame in sent()})

        def sent():
            frames = getattr(stage.lab, side).seen("udp", payload=b"one of many")
            return [frame for frame in frames if frame.direction == "out"]

        await until(are_all_there, "a thousand peers were sent to")
        assert {side} == await stage.where(payload=b"one of many")
        assert 1 == len({frame.source_port for frame in sent()})


@OPTIONS
async def test_a_port_of_one_side_is_plain_whoever_of_it_sends(stage, included, option):
    """L11, L28: two processes, two sockets; whichever is said to be the sender, the side is the same."""
    bind = BIND.format(count=2, family="socket.AF_INET", option=option)
    async with stage.app(stage.lab.copy_program("python", "other")) as other:
        for app in (included, other):
            await app(bind)
            await app("for own in owns: own.sendto(b'one of four', (SERVER4, 7))")

        async def has_passed():
            return len(stage.lab.tunnel.seen("udp", payload=b"one of four")) >= 4

        await until(has_passed, "all four are in the tunnel")
        assert {"tunnel"} == await stage.where(payload=b"one of four")


async def test_without_tunsplit_the_observers_see_who_shares(lab):
    """The control: what is blocked above leaves by the uplink when nobody judges it."""
    async with start_app(lab.host, lab.copy_program("python", "app")) as app:
        await app(BIND.format(count=2, family="socket.AF_INET", option="socket.SO_REUSEADDR"))
        await app("for own in owns: own.sendto(b'whose am i', (SERVER4, 7))")
        assert {"uplink"} == await where(lab, payload=b"whose am i")
        assert HOST[4] == lab.uplink.seen(payload=b"whose am i")[0].source


async def test_after_all_that_everybody_is_on_their_side(stage, excluded, included):
    """The other control."""
    assert await is_on(stage, excluded, "uplink")
    assert await is_on(stage, included, "tunnel")
