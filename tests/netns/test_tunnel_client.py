"""`[tunnel] client`: without the VPN's own client there is no tunnel, so it has the uplink while that is down (L39)."""

import contextlib
import os
import shutil
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.netns.family import agent, bear
from tests.netns.fates import Question, ask
from tests.netns.sides import is_on, listed
from tests.netns.stage import REFUSED, SERVER, open_stage, until
from tunsplit.lab.addresses import PUBLIC_RESOLVER, RELAY_RESOLVER, SYSTEM_RESOLVER
from tunsplit.lab.daemon import COMMAND

pytestmark = pytest.mark.netns

GONE = "[Rr]eset|abort|[Dd]estination address required|timed out"
STUB = ip_address("127.0.0.54")
SYSTEM = {"system": [str(address) for address in SYSTEM_RESOLVER.values()]}


@asynccontextmanager
async def client_stage(lab, *clients, **overrides):
    """Run tunsplit with these clients, or the program that is called client."""
    client = lab.copy_program("python", "client")
    named = [str(one) for one in clients or [client]]
    dns = {**SYSTEM, "listen": [f"{STUB}:53"]}
    async with open_stage(lab, tunnel={"client": named}, dns=dns, **overrides) as stage, stage.app(client) as app:
        yield stage, app


async def down(stage):
    stage.lab.tunnel_down()
    await tunnel_is(stage, up=False)


async def up(stage):
    stage.lab.tunnel_up()
    await tunnel_is(stage, up=True)


async def tunnel_is(stage, *, up):
    async def is_so():
        return (await stage.daemon.status())["tunnel"]["up"] is up

    await until(is_so, f"the tunnel is {'up' if up else 'down'}")


async def is_refused(stage, app):
    """Whether an app gets nowhere, and is told so at once."""
    stage.clear()
    for version in (4, 6):
        for protocol in ("tcp", "udp"):
            with pytest.raises(OSError, match=REFUSED):
                await app(f"ask('{protocol}', SERVER{version})")
        assert set() == await stage.where(destination=SERVER[version])
    return True


@pytest.mark.parametrize("mode", ["exclude", "include"])
async def test_the_client_has_the_uplink_while_the_tunnel_is_down(lab, mode):
    """Listed or not, in both modes, and also when splitting is off; while the tunnel is up, like any other app."""
    listed_apps = [lab.copy_program("python", name) for name in ("excluded", "client")]
    side = "uplink" if mode == "exclude" else "tunnel"
    async with (
        client_stage(lab, split={"mode": mode}, excluded=listed_apps) as (stage, client),
        stage.app(stage.excluded) as other,
    ):
        assert await is_on(stage, client, side)
        await down(stage)
        assert await is_on(stage, client, "uplink")
        await client("ask('echo', SERVER4)")
        assert mode == "exclude" or await is_refused(stage, other)
        await stage.daemon.command("off")
        assert await is_on(stage, client, "uplink")
        assert await is_refused(stage, other)
        await up(stage)
        assert await is_on(stage, client, "tunnel")


async def test_its_flows_end_when_the_tunnel_comes_and_its_questions_go_on(lab):
    """L1: it is on one side at a time. Its questions go to system DNS, also while there is a tunnel: one may hang."""
    async with client_stage(lab) as (stage, client), stage.app(stage.included) as other:
        question = Question("udp", PUBLIC_RESOLVER[4], "in-the-tunnel.who.is")
        assert await is_on(stage, client, "tunnel")
        assert [str(SYSTEM_RESOLVER[4])] == await ask(client, [question])
        assert [str(RELAY_RESOLVER[4])] == await ask(other, [question])

        await client("held = tcp(SERVER4); read_line(held)")
        await down(stage)
        with pytest.raises(OSError, match=GONE):
            await client("held.send(b'?'); read_line(held)")
        routes = (await stage.daemon.status())["dns"]["routes"]
        assert ["normal", "excluded", "client"] == [route["app"] for route in routes]
        asked = [
            Question("tcp", RELAY_RESOLVER[4], "while-it-is-down.who.is"),
            Question("udp", STUB, "at-our-stub.who.is"),
        ]
        assert [str(SYSTEM_RESOLVER[4])] * 2 == await ask(client, asked)
        assert ["SERVFAIL"] * 2 == await ask(other, asked)
        await client("held = tcp(SERVER4); read_line(held); datagrams = udp(SERVER6); datagrams.send(b'before')")
        assert "tunnel client: " in (await listed(stage, client.pid))[0]
        explained = (await stage.daemon.command("explain", "--pid", str(client.pid))).stdout
        assert "tunnel client" in explained
        stage.clear()
        await up(stage)
        with pytest.raises(OSError, match=GONE):
            await client("held.send(b'after'); read_line(held)")
        with pytest.raises(OSError, match=GONE):
            await client("datagrams.send(b'after'); datagrams.recv(100); datagrams.recv(100)")
        assert "uplink" not in await stage.where(payload=b"after")
        assert await is_on(stage, client, "tunnel")


async def test_only_the_client_itself_is_the_client(lab):
    """L24, L33: its children, another's run of its program, a copy of that, and a local resolver are none."""
    async with (
        client_stage(lab) as (stage, client),
        stage.app(stage.lab.directory / "bin/client") as other_users,
        stage.app(stage.lab.directory / "bin/client") as resolver,
        stage.app(lab.copy_program("python", "copy")) as copy,
    ):
        child = await bear(client, agent(stage.included))
        await other_users("os.seteuid(1000)")
        await resolver("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.bind(('127.0.0.1', 53))")
        await down(stage)
        for app in (child, other_users, resolver, copy):
            assert await is_refused(stage, app)
        await other_users("os.seteuid(0)")
        assert await is_on(stage, other_users, "uplink")
        await resolver("own.close()")
        await until(lambda: _is_on(stage, resolver), "who is no resolver any more is the client")
        assert await is_on(stage, client, "uplink")
        await other_users("held = udp(SERVER4); held.send(b'?'); held.recv(100)")
        with contextlib.suppress(OSError):  # already, or with the next one
            await other_users("os.seteuid(1000); held.send(b'as another')")
        assert await is_refused(stage, other_users)
        assert set() == await stage.where(payload=b"as another")


async def _is_on(stage, app):
    try:
        return await is_on(stage, app, "uplink")
    except OSError:
        return False


@pytest.fixture
def unit():
    """A control group as systemd makes one for a service, and one of that name below another service."""
    (mount,) = [words[4] for words in map(str.split, Path("/proc/self/mountinfo").read_text().splitlines())
                if "cgroup2" in words]  # fmt: skip
    name = f"tunsplit-test-{os.getpid()}.service"
    groups = [Path(mount, name), Path(mount, f"other-{name}"), Path(mount, f"other-{name}", name)]
    for group in groups:
        group.mkdir()
    yield groups[0], groups[2]
    for group in reversed(groups):
        group.rmdir()


async def test_a_unit_may_be_the_client(unit, lab):
    """Whoever is in its control group, of whatever user; no group of that name that somebody else made."""
    own, others = unit
    async with client_stage(lab, own.name) as (stage, client):
        await client("os.seteuid(1000)")
        await down(stage)
        assert await is_refused(stage, client)
        (own / "cgroup.procs").write_text(str(client.pid))
        assert await is_on(stage, client, "uplink")
        (others / "cgroup.procs").write_text(str(client.pid))
        assert await is_refused(stage, client)
        (own.parent / "cgroup.procs").write_text(str(client.pid))


async def test_a_program_that_others_can_replace_is_no_client(lab):
    """Refused at the start, by `check`, and by a reload, which leaves everything as it is."""
    theirs = lab.copy_program("python", "theirs")
    shutil.chown(theirs, 1000)
    wrong = lab.config(tunnel={"client": [str(theirs)]})
    file, _ = lab.write_config(wrong)
    words = f"[tunnel] client #1: found {theirs}, which is not root's alone: it belongs to uid 1000"
    done = await lab.host.run([*COMMAND, "run", "-c", file], check=False)
    assert 2 == done.returncode
    assert words in done.stderr
    async with client_stage(lab) as (stage, client):
        await down(stage)
        stage.lab.rewrite_config(wrong)
        done = await stage.daemon.command("reload", check=False)
        assert words in done.stderr
        assert 2 == done.returncode
        assert await is_on(stage, client, "uplink")
        done = await stage.daemon.command("check", check=False)
        assert 2 == done.returncode
        assert f"{theirs} is not root's alone" in done.stderr
        stage.lab.rewrite_config(stage.lab.config(dns=SYSTEM))
        await stage.daemon.command("reload")
        assert await is_refused(stage, client)
