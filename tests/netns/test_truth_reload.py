"""A configuration that is edited while tunsplit runs (L1, L16, L18): reload, SIGHUP, and what --save writes."""

import os
import signal
from contextlib import asynccontextmanager

import pytest

from tests.netns import hammer
from tests.netns.sides import is_on
from tests.netns.stage import Stage, complaints, until

pytestmark = pytest.mark.netns

COMMENT = "# what the lab needs\n"


@asynccontextmanager
async def edited_stage(lab):
    """A stage, and the file that its daemon was started with."""
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    async with lab.tunsplit(COMMENT + lab.config(programs[:1])) as daemon:
        yield Stage(lab, daemon, *programs), lab.directory / "tunsplit-1.toml"


@pytest.mark.parametrize("how", ["reload", "SIGHUP"])
async def test_an_edited_list_holds_from_then_on(lab, how):
    """L2, L3: the two change places; what either had open ends, and is seen on neither side any more."""
    async with edited_stage(lab) as (stage, file):
        first, second = stage.excluded, stage.included
        async with stage.app(first) as excluded, stage.app(second) as included:
            await hammer.begin(excluded)
            await hammer.begin(included)
            await until(lambda: hammer.is_seen(lab.uplink), "the excluded one talks")
            await until(lambda: hammer.is_seen(lab.tunnel), "the included one talks")
            file.write_text(file.read_text().replace(str(first), str(second)))
            if how == "SIGHUP":
                os.kill(stage.daemon.pid, signal.SIGHUP)
                await hammer.until_ended(excluded)
            else:
                done = await stage.daemon.command("reload")
                assert [f"[[app]] added: {second}", f"[[app]] removed: {first}"] == done.stdout.splitlines()
            await hammer.until_ended(excluded)
            await hammer.until_ended(included)
            for _ in range(2):
                assert await is_on(stage, excluded, "tunnel")
                assert await is_on(stage, included, "uplink")
            for word in hammer.CONNECTED:
                assert [] == hammer.numbers(lab.uplink, word) + hammer.numbers(lab.tunnel, word)
        assert [] == complaints(stage.daemon.log)


async def test_a_wrong_file_leaves_everything_as_it_was(lab):
    """SPEC.md, "Robustness": one clear message that names file and key; running connections do not notice."""
    async with edited_stage(lab) as (stage, file), stage.app(stage.excluded) as excluded:
        await excluded("own = tcp(SERVER4); line = read_line(own)")
        file.write_text(file.read_text() + "nonsense = true\n")
        done = await stage.daemon.command("reload", check=False)
        assert 2 == done.returncode
        assert str(file) in done.stderr
        assert "nonsense" in done.stderr
        os.kill(stage.daemon.pid, signal.SIGHUP)

        async def is_told():
            return "reload failed" in stage.daemon.log

        await until(is_told, "the log tells of the failed reload")
        assert b"still here" == await excluded("own.send(b'still here') and read_exactly(own, 10)")
        assert await is_on(stage, excluded, "uplink")


async def test_what_is_said_at_run_time_outlives_a_reload_and_what_is_saved_a_restart(lab):
    """SPEC.md, "Splitting rules": --save writes to the file, whose comments stay."""
    third = lab.copy_program("python", "third")
    async with edited_stage(lab) as (stage, file):
        await stage.daemon.command("app", "add", str(third))
        await stage.daemon.command("app", "add", str(stage.included), "--save")
        await stage.daemon.command("app", "remove", str(stage.excluded), "--save")
        await stage.daemon.command("reload")
        async with stage.app(third) as app, stage.app(stage.included) as saved, stage.app(stage.excluded) as removed:
            assert await is_on(stage, app, "uplink")
            assert await is_on(stage, saved, "uplink")
            assert await is_on(stage, removed, "tunnel")
    text = file.read_text()
    assert text.startswith(COMMENT)
    assert str(third) not in text
    async with lab.tunsplit(text) as daemon:
        stage = Stage(lab, daemon, stage.excluded, stage.included)
        async with stage.app(third) as app, stage.app(stage.included) as saved, stage.app(stage.excluded) as removed:
            assert await is_on(stage, app, "tunnel")
            assert await is_on(stage, saved, "uplink")
            assert await is_on(stage, removed, "tunnel")


async def test_another_mode_turns_everybody_round(lab):
    """L1: by a reload of `mode`, with connections open on both sides."""
    async with (
        edited_stage(lab) as (stage, file),
        stage.app(stage.excluded) as listed,
        stage.app(stage.included) as other,
    ):
        for app in (listed, other):
            await app("own = [tcp(SERVER4), udp(SERVER6)]; own[1].send(b'?'); [one.recv(100) for one in own]")
        file.write_text(file.read_text() + '[split]\nmode = "include"\n')
        assert "[split] mode" in (await stage.daemon.command("reload")).stdout
        for app, side in ((listed, "tunnel"), (other, "uplink")):
            for number in (0, 1):
                with pytest.raises(OSError, match=r"abort|reset|Broken|Destination address"):
                    await app(f"own[{number}].send(b'?'); own[{number}].recv(100); own[{number}].send(b'?')")
            assert await is_on(stage, app, side)
