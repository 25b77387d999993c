"""L11, L27: what changes hands is judged anew: a port within milliseconds, a connection by inheritance."""

import contextlib
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import trio

from tests.netns.family import agent, bear
from tests.netns.stage import start_app, until, where

pytestmark = pytest.mark.netns
ROUNDS = 1000
FAMILIES = {4: "socket.AF_INET", 6: "socket.AF_INET6"}


@pytest.mark.parametrize("version", [4, 6])
async def test_a_connection_that_the_other_side_inherits_ends(stage, included, version):
    """L27: an exec is an event, so not a packet of the heir is seen anywhere."""
    await included(f"own = tcp(SERVER{version}); line = read_line(own); other = tcp(SERVER{version}); read_line(other)")
    heir = await bear(included, agent(stage.excluded), [await included("own.fileno()")])
    with pytest.raises(OSError, match=r"abort|reset|Broken|timed out"):
        await heir("own = socket.socket(fileno=number); own.send(b'heir'); own.recv(1); own.send(b'heir')",
                   number=await included("own.fileno()"))  # fmt: skip
    assert set() == await stage.where(payload=b"heir")
    assert b"not inherited" == await included("other.send(b'not inherited') and read_exactly(other, 13)")
    assert {"tunnel"} == await stage.where(payload=b"not inherited")


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_what_is_sent_right_after_a_change_of_user_is_judged_by_it(lab, protocol):
    """L27: the event is queued before the packet is, and taken in before that passes."""
    config = lab.config([lab.copy_program("python", "app")]).replace("[[app]]", "[[app]]\nuser = 0")
    begin = {"udp": "own = udp(SERVER4)", "tcp": "own = tcp(SERVER4); read_line(own)"}[protocol]
    async with lab.tunsplit(config), start_app(lab.host, lab.directory / "bin/app") as app:
        for number in range(40):
            await app(f"os.seteuid(0); {begin}; own.send(b'as root'); own.recv(100); time.sleep(0.002)")
            with contextlib.suppress(OSError):  # its socket is destroyed, before or after
                await app(f"os.seteuid(1000); own.send(b'as another {number:02}'); own.recv(100)")
    assert {"uplink"} == await where(lab, payload=b"as root")

    assert "uplink" not in await where(lab, payload=b"as another")


@contextlib.contextmanager
def programs_come_and_go():
    """Nothing but programs that start and end, one after the other, twice."""
    program = "import os\nwhile True: os.spawnv(os.P_WAIT, '/bin/true', ['true'])"
    storms = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    try:
        yield
    finally:
        for storm in storms:
            storm.kill()
            storm.wait()


async def test_what_is_sent_right_after_a_change_of_user_is_judged_by_it_also_while_others_change(lab):
    """L27: while the tun is emptied, of what was sent before others ended, its sender's change is heard as well."""
    config = lab.config([lab.copy_program("python", "app")]).replace("[[app]]", "[[app]]\nuser = 0")
    async with lab.tunsplit(config), start_app(lab.host, lab.directory / "bin/app") as app:
        with programs_come_and_go():
            for number in range(500):
                await app("os.seteuid(0); own = tcp(SERVER4); read_line(own); own.send(b'as root'); own.recv(100)")
                with contextlib.suppress(OSError):  # as above
                    await app(f"time.sleep(0.002); os.seteuid(1000); own.send(b'as another {number:03}'); own.recv(9)")
    assert {"uplink"} == await where(lab, payload=b"as root")

    assert "uplink" not in await where(lab, payload=b"as another")


@pytest.mark.parametrize("version", [4, 6])
async def test_a_port_that_changes_hands_is_asked_for_again(stage, excluded, included, version):
    """L11, L27: a thousand rounds of close, bind and send, each side in turn, to the same server.

    Where the last socket's death is told only when the next one's datagram is there, that is dropped: it asks again.
    """
    turn = (
        f"own = socket.socket({FAMILIES[version]}, socket.SOCK_DGRAM)\n"
        "own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\nown.bind(('', 4000))\n"
        "own.settimeout(0.2)\nanswer = b''\n"
        "for _ in range(20):\n"
        f"    own.sendto(b'%s %03d' % (name, number), (SERVER{version}, 7))\n"
        "    with contextlib.suppress(TimeoutError):\n"
        "        answer = own.recv(100).split(b'\\n')[1]\n"
        "        break\n"
        "own.close()"
    )  # fmt: skip
    for app, name in ((excluded, "excluded"), (included, "included")):
        await app(f"name = b'{name}'")
    arrived = 0
    for number in range(ROUNDS // 2):
        for app in (excluded, included):
            await app(turn.replace("number)", f"{number})"))
            arrived += f" {number:03}".encode() in await app("answer")
    assert ROUNDS == arrived
    assert {"uplink"} == await stage.where(payload=b"excluded ")
    assert {"tunnel"} == await stage.where(payload=b"included ")


@contextlib.contextmanager
def standing_still(stage):
    """The daemon reads nothing meanwhile."""
    os.kill(stage.daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(stage.daemon.pid, signal.SIGCONT)


@pytest.mark.parametrize("version", [4, 6])
async def test_what_waited_for_a_daemon_that_stood_still_is_not_the_next_sockets(stage, excluded, included, version):
    """L11, L27: its sender is gone when a datagram is read, and the other side's app has the port."""
    bind = f"own = socket.socket({FAMILIES[version]}, socket.SOCK_DGRAM); own.bind(('', port))"
    send = f"own.sendto(word, (SERVER{version}, 7))"
    answer = "own.recv(100).split(b'\\n')[1].decode()"
    # The news of sockets that died (SKNLGRP_INET_UDP_DESTROY and INET6_UDP), which may take a moment under load.
    hear = "news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4); news.bind((0, 1 << 1 | 1 << 3))"
    wait = "while int.from_bytes(news.recv(4096)[20:22], 'big') != port: pass"
    for app in (excluded, included):
        await app(f"{hear}; held = udp(SERVER{version}); held.send(b'?'); held.recv(100)")
    sides = ((included, "included", excluded, "excluded"), (excluded, "excluded", included, "included"))
    for number, (giver, by_giver, taker, by_taker) in enumerate(sides, 1):
        before = await stage.counter("port_changed_hands")
        with standing_still(stage):
            await giver(f"port = {40000 + number}; {bind}; word = b'{by_giver} gone'; {send}; own.close()")
            await taker(f"port = {40000 + number}; {bind}")
            await taker(wait)

        async def is_dropped(before=before):
            return before < await stage.counter("port_changed_hands")

        await until(is_dropped, "a datagram is dropped")
        await taker(f"word = b'{by_taker}'")

        async def is_answered(taker=taker):
            # Until the tun is seen empty, the first one may be taken for one of who had the port before.
            try:
                return await taker(f"own.settimeout(1) or {send} and {answer}")
            except TimeoutError:
                return None

        assert by_taker == await until(is_answered, "who has the port now is answered")
        with standing_still(stage):  # nothing is lost that changes no hands
            await giver(f"port = {41000 + number}; {bind}; word = b'{by_giver} waited'; {send}")
        assert f"{by_giver} waited" == await giver(answer)
    assert set() == await stage.where(payload=b" gone")
    assert {"uplink"} == await stage.where(payload=b"excluded")
    assert {"tunnel"} == await stage.where(payload=b"included")


async def is_counted(stage, number):
    return number == await stage.counter("socket_changed_hands")


@pytest.fixture
def ends():
    """What is to be done in the end."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("version", [4, 6])
async def test_what_waited_for_a_daemon_that_stood_still_is_not_another_programs(stage, included, ends, version):
    """L27: giver and heir of a socket are of two sides, and who has sent is gone when a datagram is read."""
    give = f"own = udp(SERVER{version}); own.set_inheritable(True); own.send(word.encode())"
    ask = "own.send(word.encode()); answer = own.recv(100)"
    # A child that runs the other side's program, sends and ends.
    run = "subprocess.run([program, '-I', '-S', '-c', code, str(own.fileno()), word], close_fds=False, check=True)"
    send = "import os, sys; os.write(int(sys.argv[1]), sys.argv[2].encode())"
    gives = await bear(included, agent(stage.included))
    await gives("'runs'")
    with standing_still(stage):
        await gives(give, word="giver is gone")
        heir = await bear(gives, agent(stage.excluded), [await gives("own.fileno()")])
        await heir("'runs'")
        await heir.tell("time.sleep(60)")  # what it is told comes from the giver: it would end with it
        ends.callback(os.kill, heir.pid, signal.SIGKILL)
        await gives.tell("os._exit(0)")
        await included("children[name].wait()", name=gives._name)  # noqa: SLF001 - as in tests/netns/family.py
    await until(partial(is_counted, stage, 1), "the giver's is dropped")
    await included(f"own = udp(SERVER{version}); own.set_inheritable(True); {ask}", word="?")
    with standing_still(stage):
        await included(run, program=str(stage.excluded), code=send, word="heir is gone")
    await until(partial(is_counted, stage, 2), "the heir's is dropped")
    # What closes on exec is nobody else's: then nothing is lost.
    await included(f"own = udp(SERVER{version}); {ask}", word="?")
    with standing_still(stage):
        await included(run, program=str(stage.excluded), code="", word="")
        await included("own.send(word.encode())", word="included goes on")
    assert b"included goes on" in await included("own.recv(100)")
    assert 2 == await stage.counter("socket_changed_hands")
    assert set() == await stage.where(payload=b"is gone")
    assert {"tunnel"} == await stage.where(payload=b"included goes on")


async def test_sockets_that_come_and_go_lose_nothing(stage, excluded, included):
    """As resolvers do: a port each, many at a time, and closed as soon as the answer is there."""
    # Of 320 ports which the kernel chooses, two are at times the same, one soon after the other.
    ask = (
        "answers = 0\nfor turn in range(20):\n"
        "    many = [udp(SERVER4, source_port=first + turn * 8 + number) for number in range(8)]\n"
        "    for own in many: own.send(b'?')\n"
        "    for own in many: answers += bool(own.recv(100)); own.close()"
    )
    async with trio.open_nursery() as nursery:
        for app, first in ((excluded, 20000), (included, 21000)):
            nursery.start_soon(partial(app, ask, first=first))
    assert [160, 160] == [await app("answers") for app in (excluded, included)]
    assert 0 == await stage.counter("port_changed_hands")
