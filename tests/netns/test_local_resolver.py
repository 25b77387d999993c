"""A local resolver is on no side that one of its clients may not use (L32), with a real dnsmasq on 127.0.0.53."""

import sys
from contextlib import asynccontextmanager

import pytest

from tests.netns.stage import open_stage, until
from tunsplit.lab import addresses

pytestmark = pytest.mark.netns

UPSTREAM = addresses.PUBLIC_RESOLVER[4]
DNS = {"custom": [str(UPSTREAM)]}  # public: included apps ask it in the tunnel, excluded ones outside
ASK = """
def ask_stub(protocol='udp', stub='127.0.0.53'):
    question = b'\\x12\\x34\\x01\\0\\0\\1\\0\\0\\0\\0\\0\\0\\3who\\2is\\0\\0\\x10\\0\\1'
    if protocol == 'tcp':
        with tcp(stub, 53) as own:
            own.send(struct.pack('!H', len(question)) + question)
            size, = struct.unpack('!H', read_exactly(own, 2))
            return read_exactly(own, size)
    with udp(stub, 53) as own:
        own.send(question)
        return own.recv(4096)
"""


@asynccontextmanager
async def stub(lab, program, *options):
    """A dnsmasq on 127.0.0.53 that forwards what it is asked to the public resolver, and keeps nothing."""
    words = [
        "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file=", "--log-facility=-",
        "--no-resolv", "--no-hosts", "--bind-interfaces", "--listen-address=127.0.0.53", "--cache-size=0",
        f"--server={UPSTREAM}", *options,
    ]  # fmt: skip
    async with lab.host.start([program, *words]) as running:
        await running.wait_written("started, version")
        yield running


async def sides_of_questions(stage, app, protocol="udp"):
    """Ask by the stub; on which sides its questions went out."""
    stage.clear()
    await app(ASK)
    assert b"\x06public" in await app("ask_stub(protocol)", protocol=protocol)
    return await stage.where(direction="out", destination=UPSTREAM, protocol=protocol)


@pytest.mark.parametrize(("mode", "side"), [("include", "tunnel"), ("exclude", "tunnel")])
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
async def test_its_questions_go_in_the_tunnel_whoever_asks(lab, mode, side, protocol):
    """L32 and footnote 1: an app on either side asks by the stub; the apps' own flows are the control."""
    dnsmasq = lab.copy_program("dnsmasq", "a-stub")
    async with (
        stub(lab, dnsmasq),
        open_stage(lab, split={"mode": mode}, dns=DNS) as stage,
        stage.app(stage.excluded) as listed,
        stage.app(stage.included) as other,
    ):
        for app in (listed, other):
            assert {side} == await sides_of_questions(stage, app, protocol)
        stage.clear()
        beside = listed if mode == "exclude" else other
        await beside("ask('udp', SERVER4)")
        assert {"uplink"} == await stage.where(destination=lab.server(4))


async def test_in_mode_include_a_stub_that_starts_later_is_known_from_its_first_question(lab):
    """L32: nobody waits for a look around; another program of the same kind is the control."""
    async with open_stage(lab, split={"mode": "include"}, dns=DNS) as stage, stage.app(stage.included) as app:
        for _ in range(5):
            async with stub(lab, lab.copy_program("dnsmasq", "a-stub")):
                assert {"tunnel"} == await sides_of_questions(stage, app)
        await app("ask('udp', SERVER4)")
        assert {"uplink"} == await stage.where(destination=lab.server(4))


async def test_a_rule_that_covers_one_is_refused_without_force(lab):
    """L32, by `app add`: refused it leaves nothing behind, in the file either; forced, it goes beside the tunnel."""
    dnsmasq = lab.copy_program("dnsmasq", "a-stub")
    async with stub(lab, dnsmasq) as running, open_stage(lab, dns=DNS) as stage, stage.app(stage.included) as app:
        file = lab.directory / "tunsplit-1.toml"
        before = file.read_text()
        for path in (str(dnsmasq), f"{dnsmasq.parent}/a-s*"):
            refused = await stage.daemon.command("app", "add", "--save", path, check=False)
            assert 2 == refused.returncode
            assert f"covers a-stub (pid {running.pid}, 127.0.0.53), a local resolver" in refused.stderr
            assert "--force" in refused.stderr
        assert before == file.read_text()
        assert {"tunnel"} == await sides_of_questions(stage, app)

        forced = await stage.daemon.command("app", "add", "--force", "--save", str(dnsmasq))
        assert f"a-stub (pid {running.pid}, 127.0.0.53) is beside the tunnel" in forced.stderr
        assert f'[[app]]\npath = "{dnsmasq}"\nforce = true\n' in file.read_text()
        assert {"uplink"} == await sides_of_questions(stage, app)
        await stage.daemon.command("reload")

        await stage.daemon.command("app", "remove", "--save", str(dnsmasq))
        assert before == file.read_text()
        assert {"tunnel"} == await sides_of_questions(stage, app)


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
async def test_one_that_is_beside_the_tunnel_by_force_asks_whom_it_likes(lab, protocol):
    """Issue, item 2: by the table its questions would go to the relay's resolver; that is the control."""
    dnsmasq = lab.copy_program("dnsmasq", "a-stub")
    async with stub(lab, dnsmasq), open_stage(lab) as stage, stage.app(stage.included) as app:
        await app(ASK)
        assert b"\x05relay" in await app("ask_stub(protocol)", protocol=protocol)
        assert set() == await stage.where(destination=UPSTREAM)
        await stage.daemon.command("app", "add", "--force", str(dnsmasq))
        assert {"uplink"} == await sides_of_questions(stage, app, protocol)


async def test_a_file_that_covers_one_is_refused_at_the_start_and_at_a_reload(lab):
    """L32: `run` ends with 2, a reload changes nothing."""
    dnsmasq = lab.copy_program("dnsmasq", "a-stub")
    async with stub(lab, dnsmasq), open_stage(lab, dns=DNS) as stage, stage.app(stage.included) as app:
        file = lab.directory / "tunsplit-1.toml"
        wrong = lab.config([stage.excluded, dnsmasq], dns=DNS)
        file.write_text(wrong)
        refused = await stage.daemon.command("reload", check=False)
        assert (2, True) == (refused.returncode, "[[app]] #2" in refused.stderr)
        assert {"tunnel"} == await sides_of_questions(stage, app)
    async with stub(lab, dnsmasq):
        for verb in ("run", "check"):
            refused = await lab.host.run([sys.executable, "-m", "tunsplit", verb, "-c", file], check=False)
            assert (2, True) == (refused.returncode, "[[app]] #2" in refused.stderr)


async def test_a_rule_that_covers_one_that_starts_later_holds_by_force_only(lab):
    """L32: the rule was there first, so nothing could be refused: its questions go in the tunnel."""
    dnsmasq = lab.copy_program("dnsmasq", "a-stub")
    async with (
        open_stage(lab, excluded=[dnsmasq], dns=DNS) as stage,
        stage.app(stage.included) as app,
        stub(lab, dnsmasq),
    ):
        assert {"tunnel"} == await sides_of_questions(stage, app)
        explained = await stage.daemon.flows()
        assert "local resolver" in {flow["reason"] for flow in explained}


async def test_users_are_told_of_it(lab):
    """Issue: whose names are resolved where; a resolver of another network namespace is not ours to tell of."""
    dnsmasq = lab.copy_program("dnsmasq", "a-stub")
    async with stub(lab, dnsmasq) as running, open_stage(lab, dns=DNS) as stage:
        hint = (
            f"the local resolver a-stub (pid {running.pid}, 127.0.0.53) asks in the name of excluded apps too: "
            "their names are resolved in the tunnel"
        )

        async def is_told():
            return [hint] == (await stage.daemon.status())["hints"]

        await until(is_told, "status has the hint, and no other")
        assert f"note     {hint}" in (await stage.daemon.command("status")).stdout
        added = await stage.daemon.command("app", "add", "/bin/true")
        assert f"tunsplit: note: {hint}" in added.stderr
