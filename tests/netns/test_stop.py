"""The way stays closed where that is wished: stopped, restarted, before the first start (L16, L26)."""

import os
import signal

import pytest

from tests.netns import third as a_third
from tests.netns.stage import HOST, REFUSED, RELAY, SERVER, open_stage, start_app, until, where
from tests.netns.test_life import look_at
from tests.netns.third import open_third, sent
from tunsplit.lab.daemon import COMMAND, make_environment

pytestmark = pytest.mark.netns

CLOSED = {"enabled": True, "on_stop": "block"}

# Tries all that an app can, again and again, and counts.
PERSIST = """
import threading
tries, stopping = 0, False

def persist():
    global tries
    while not stopping:
        for to in (SERVER4, SERVER6):
            for attempt in (lambda: udp(to).send(b'in clear'), lambda: tcp(to).close(), named):
                with contextlib.suppress(OSError):
                    attempt()
        tries += 1
        time.sleep(0.01)

def named():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.setsockopt(0, 50, struct.pack('!i', socket.if_nametoindex('eth0')))
        own.sendto(b'in clear', (SERVER4, 7))

socket.setdefaulttimeout(0.2)
thread = threading.Thread(target=persist, daemon=True)
thread.start()
"""


async def has_tried(app):
    """Wait until an app that persists has been through all it does."""
    tries = await app("tries")

    async def again():
        return await app("tries") > tries + 1

    await until(again, "it has tried")


async def assert_refused(lab, app):
    """It is, at once, on both sides' wires and in both families."""
    for version in (4, 6):
        with pytest.raises(OSError, match=REFUSED):
            await app(f"tcp(SERVER{version})")
        with pytest.raises(OSError, match=REFUSED):
            await app(f"udp(SERVER{version}).send(b'?')")
        assert set() == await where(lab, destination=SERVER[version])


@pytest.fixture
def command(lab):
    """Any verb, in the host, for a configuration that says `on_stop = "block"`."""
    file, socket = lab.write_config(lab.config(firewall=CLOSED))
    environment = make_environment(file, socket)

    async def run(*words, check=True):
        return await lab.host.run([*COMMAND, *words], env=environment, check=check)

    return run


async def test_sigterm_leaves_the_way_closed_until_undo(lab):
    """Contract, `on_stop`: tables, rules and unreachable routes stay; also a third interface stays closed."""
    async with open_third(lab) as third:
        before = await look_at(lab.host)
        async with open_stage(lab, firewall=CLOSED) as stage, stage.app(stage.included) as app:
            await app("own = tcp(SERVER6); read_line(own)")
            assert 0 == await stage.daemon.terminate()
            stage.clear()
            with pytest.raises(OSError, match="abort|reset|Broken pipe|" + REFUSED):
                await app("own.sendall(b'?'); own.recv(1)")
            await assert_refused(lab, app)
            with pytest.raises(OSError, match=REFUSED):
                await app(
                    "own = socket.socket(); own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth1')\n"
                    "own.connect((to, 7))",
                    to=a_third.NEIGHBOUR[4],
                )
            assert [] == await sent(third, destination=a_third.NEIGHBOUR[4])

            assert 0 == (await stage.daemon.command("undo")).returncode
            assert before == await look_at(lab.host)
            assert str(HOST[4]) == await app("ask('tcp', SERVER4)")  # the control: the way was there to be taken


async def test_sigint_always_undoes(lab):
    """Contract, "Fixed meanings"."""
    before = await look_at(lab.host)
    async with open_stage(lab, firewall=CLOSED) as stage:
        os.kill(stage.daemon.pid, signal.SIGINT)
        assert 0 == await stage.daemon.wait()
        assert before == await look_at(lab.host)


async def test_a_reload_changes_what_a_stop_does(lab):
    before = await look_at(lab.host)
    async with open_stage(lab) as stage, stage.app(stage.included) as app:
        await reload(lab, stage, CLOSED)
        assert 0 == await stage.daemon.terminate()
        await assert_refused(lab, app)
        assert 0 == (await stage.daemon.command("undo")).returncode
    async with open_stage(lab, firewall=CLOSED) as stage:
        await reload(lab, stage, {"on_stop": "open"})
        assert 0 == await stage.daemon.terminate()
        assert before == await look_at(lab.host)


async def reload(lab, stage, firewall):
    """Have the daemon read a configuration that differs in this."""
    (file,) = lab.directory.glob(f"tunsplit-{lab._runs}.toml")  # noqa: SLF001 - the last one
    file.write_text(lab.config([stage.excluded], firewall=firewall))
    assert 0 == (await stage.daemon.command("reload")).returncode


@pytest.mark.parametrize("firewall", [CLOSED, {"on_stop": "open"}], ids=["block", "open"])
async def test_a_restart_has_no_gap(lab, firewall):
    """L16: an included app that never stops trying; with "open", the control, it gets through."""
    config = lab.config(firewall=firewall)
    async with lab.tunsplit(config) as daemon, start_app(lab.host, lab.copy_program("python", "app")) as app:
        assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")
        await app(PERSIST)
        await has_tried(app)
        assert 0 == await daemon.terminate()
        await has_tried(app)
        async with lab.tunsplit(config):
            await has_tried(app)
            await app("stopping = True; thread.join(); socket.setdefaulttimeout(3)")
            seen = await where(lab, destination=SERVER[4]) | await where(lab, destination=SERVER[6])
            assert ({"tunnel"} if firewall == CLOSED else {"tunnel", "uplink"}) == seen
            assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")


async def test_block_closes_the_way_without_a_daemon(lab, command):
    """Contract, `tunsplit block`: for all apps; a start takes over, and puts back what was before it all."""
    before = await look_at(lab.host)
    async with start_app(lab.host, lab.copy_program("python", "app")) as app:
        assert str(HOST[4]) == await app("ask('tcp', SERVER4)")  # the control
        lab.uplink.clear()
        await app(PERSIST)
        assert "closed" in (await command("block")).stdout
        await has_tried(app)
        lab.uplink.clear()
        await has_tried(app)
        assert set() == await where(lab, destination=SERVER[4])
        assert set() == await where(lab, payload=b"in clear")
        await app("stopping = True; thread.join(); socket.setdefaulttimeout(3)")
        await assert_refused(lab, app)
        await command("block")  # may be repeated
        await assert_refused(lab, app)

        await command("undo")
        assert before == await look_at(lab.host)
        assert str(HOST[6]) == await app("ask('tcp', SERVER6)")

        await command("block")
        async with open_stage(lab, firewall={"on_stop": "open"}) as stage, stage.app(stage.excluded) as excluded:
            assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")
            assert str(HOST[4]) == await excluded("ask('tcp', SERVER4)")
        assert before == await look_at(lab.host)


@pytest.mark.lab(tunnel=None, uplink=())
async def test_block_works_before_there_is_any_network(lab, command):
    """L26, boot: what comes up later is closed from its first moment."""
    async with open_third(lab, plugged=False) as third, start_app(lab.host, lab.copy_program("python", "app")) as app:
        await command("block")
        a_third.plug(lab)
        lab.host.ip(f"address add {HOST[4]}/24 dev eth0\nroute add default via 192.168.50.1")
        for version in (4, 6):
            with pytest.raises(OSError, match=REFUSED):
                await app(f"tcp(SERVER{version})")
            with pytest.raises(OSError, match=REFUSED):
                await app("udp(to).send(b'?')", to=a_third.NEIGHBOUR[version])
            assert [] == await sent(third, destination=a_third.NEIGHBOUR[version])
        assert set() == await where(lab, destination=SERVER[4])
        await command("undo")
        assert str(HOST[4]) == await app("ask('tcp', SERVER4)")


async def test_block_leaves_the_vpn_s_own_way_open(lab, command):
    """L39: what carries its mark to its endpoint passes, and nothing else that carries it."""
    await command("block")
    async with start_app(lab.host, lab.copy_program("python", "vpn")) as vpn:
        await vpn("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.setsockopt(1, 36, 51820)")
        await vpn("own.sendto(b'its own', (to, 51820))", to=str(RELAY[4]))
        with pytest.raises(OSError, match=REFUSED):
            await vpn("own.sendto(b'its own', (SERVER4, 7))")
    await lab.uplink.settle()
    assert {RELAY[4]} == {seen.destination for seen in lab.uplink.seen("udp", payload=b"its own")}
    await command("undo")


async def test_block_leaves_a_running_daemon_alone(lab, command):
    async with open_stage(lab) as stage, stage.app(stage.included) as app:
        before = await look_at(lab.host)
        failed = await command("block", check=False)
        assert (1, True) == (failed.returncode, "another tunsplit is at work" in failed.stderr)
        assert before == await look_at(lab.host)
        assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")


async def test_killed_while_it_was_closed_it_stays_closed(lab):
    """L15, L26: a crash at any step."""
    async with open_stage(lab, firewall=CLOSED) as stage, stage.app(stage.included) as app:
        assert 0 == await stage.daemon.terminate()
        async with lab.tunsplit(lab.config(firewall=CLOSED)) as again:
            await again.kill()
            lab.uplink.clear()
            lab.tunnel.clear()
            await assert_refused(lab, app)
    async with start_app(lab.host, lab.copy_program("python", "included")) as app:
        assert str(HOST[4]) == await app("ask('tcp', SERVER4)")  # which `undo` has opened
