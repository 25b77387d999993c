"""`tunsplit explain` says what happens, and why, before it happens; nothing is sent for it."""

import json

import pytest

from tests.netns.family import agent, bear, bear_daemon
from tests.netns.sides import is_on, look
from tests.netns.stage import HOST, SERVER, open_stage, until
from tunsplit.lab.addresses import PUBLIC_RESOLVER

pytestmark = pytest.mark.netns


async def explained(stage, *words):
    """What `tunsplit explain --json` says."""
    return json.loads((await stage.daemon.command("explain", *words, "--json")).stdout)


async def test_a_browsers_whole_tree_is_explained(lab):
    """L4, L6: launcher, main, three children, one of them given to init; as the wire has it afterwards."""
    names = ("launcher", "main", "content", "gpu", "updater", "between")
    launcher, main, content, gpu, updater, between = (lab.copy_program("python", name) for name in names)
    async with (
        open_stage(lab, [launcher]) as stage,
        stage.app(launcher) as launched,
        stage.app(main) as stranger,
    ):
        browser = await bear(launched, agent(main))
        children = [await bear(browser, agent(program)) for program in (content, gpu)]
        children.append(await bear_daemon(browser, between, updater, wait_known=look(stage.daemon)))
        reason = f"inherited from {launched.pid} ({launcher})"

        own = await explained(stage, "--pid", str(launched.pid))
        assert ("uplink", [f"rule 1: {launcher}"]) == (own["verdict"], own["holders"][0]["reasons"])
        other = await explained(stage, "--pid", str(stranger.pid))
        assert ("tunnel", "default", []) == (other["verdict"], other["reason"], other["holders"][0]["reasons"])

        lines = {child.pid: [browser.pid, launched.pid] for child in children[:2]}
        lines[browser.pid] = [launched.pid]
        for child in (browser, *children):
            told = await explained(stage, "--pid", str(child.pid))
            (holder,) = told["holders"]
            assert ("uplink", reason, [reason]) == (told["verdict"], told["reason"], holder["reasons"])
            parents = [parent["pid"] for parent in holder["parents"]]
            assert len(set(parents)) == len(parents)
            if line := lines.get(child.pid):
                assert line == parents[: len(line)]
            else:  # what /proc calls its parent is not whom it was born of
                assert 1 == await child("os.getppid()")
                assert str(between) in {parent["exe"] for parent in holder["parents"]}
                assert [browser.pid, launched.pid] == [pid for pid in parents if pid in {browser.pid, launched.pid}]
        assert set() == await stage.where(address="198.51.100.1")

        for app, side in ((launched, "uplink"), (stranger, "tunnel"), *((child, "uplink") for child in children)):
            assert await is_on(stage, app, side)


async def test_a_flow_is_explained_by_its_socket(stage, excluded, included):
    """L13: one that is there, one that could be, one that is nobody's; by whom it was found and where it would go."""
    stage.clear()
    for version, host, server in ((4, "{}", "198.51.100.1"), (6, "[{}]", "2001:db8:100::1")):
        for app, side in ((excluded, "uplink"), (included, "tunnel")):
            await app(f"own = udp(SERVER{version})")
            address, port = await app("own.getsockname()[:2]")
            ends = ["--src", f"{host.format(address)}:{port}", "--dst", f"{host.format(server)}:7"]
            told = await explained(stage, "--proto", "udp", *ends)
            assert (side, app.pid, "exact") == (told["verdict"], told["app"]["pid"], told["certainty"])
            assert (side, None, None) == (told["way"]["side"], told["flow"], told["hindrance"])
            if side == "uplink":
                assert str(HOST[version]) == told["way"]["source"]
            assert set() == await stage.where(address=server)
            await app("own.send(b'?'); own.recv(100)")
            assert side == (await explained(stage, "--proto", "udp", *ends))["flow"]["side"]
            stage.clear()
    told = await explained(stage, "--proto", "tcp", "--src", "10.128.0.1:9", "--dst", "198.51.100.1:9")
    assert ("block", "unattributed", None) == (told["verdict"], told["reason"], told["app"])
    assert told["hindrance"] is None


@pytest.mark.parametrize(
    ("who", "because"), [("included", "the tunnel has no way there"), ("excluded", "a policy of IPsec claims it")]
)
async def test_what_hinders_a_flow_is_explained(stage, excluded, included, who, because):
    app = excluded if who == "excluded" else included
    await app("own = udp(SERVER4)")
    address, port = await app("own.getsockname()")
    flow = ("--proto", "udp", "--src", f"{address}:{port}", "--dst", f"{SERVER[4]}:7")
    assert (await explained(stage, *flow))["hindrance"] is None
    if who == "included":
        await stage.lab.host.run(["ip", "link", "set", "wg0", "down"])
    else:
        policy = ("src", f"{HOST[4]}", "dst", f"{SERVER[4]}", "dir", "out", "tmpl", "proto", "esp", "mode", "transport")
        await stage.lab.host.run(["ip", "xfrm", "policy", "add", *policy])

    async def is_explained():
        return because == (await explained(stage, *flow))["hindrance"]

    assert await until(is_explained, because)


async def test_where_names_are_resolved_is_explained_too(lab):
    """By the table's row: of a question to a resolver on the LAN, and of an app."""
    async with (
        open_stage(lab, dns={"custom": [str(PUBLIC_RESOLVER[4])]}) as stage,
        stage.app(stage.excluded) as excluded,
        stage.app(stage.included) as included,
    ):
        for app, route, words in ((excluded, "outside", "excluded app"), (included, "tunnel", "normal app")):
            row = f"linux · public custom · {words}"
            own = await explained(stage, "--pid", str(app.pid))
            assert (route, row) == (own["dns"]["route"], own["dns"]["row"])
            assert [{"address": str(PUBLIC_RESOLVER[4]), "route": route}] == own["dns"]["resolvers"]
            await app("own = udp('192.168.50.53', 53)")
            address, port = await app("own.getsockname()")
            told = await explained(stage, "--proto", "udp", "--src", f"{address}:{port}", "--dst", "192.168.50.53:53")
            assert ("answer", None) == (told["dns"]["handling"], told["way"])
            assert row == told["dns"]["row"]
            told = await explained(stage, "--proto", "udp", "--src", f"{address}:{port}", "--dst", "192.168.50.53:853")
            assert ("refuse", None) == (told["dns"]["handling"], told["way"])
            assert "dns" not in await explained(
                stage, "--proto", "udp", "--src", f"{address}:{port}", "--dst", "192.168.50.53:7"
            )
        assert set() == await stage.where(address=PUBLIC_RESOLVER[4])


async def test_a_program_is_explained_before_anybody_starts_it(stage):
    """What the rules say of it; a program that is not there is a clear error."""
    for program, side in ((stage.excluded, "uplink"), (stage.included, "tunnel")):
        assert side == (await explained(stage, "--exe", str(program)))["verdict"]
    done = await stage.daemon.command("explain", "--exe", "/nowhere", check=False)
    assert 1 == done.returncode
    assert "/nowhere" in done.stderr
