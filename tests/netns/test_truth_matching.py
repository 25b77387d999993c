"""What a rule can name a program by (SPEC.md, "Splitting rules"), in both modes: by the wire, not by the matcher."""

import json
import os
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.netns.family import agent, bear
from tests.netns.sides import is_on, listed
from tests.netns.stage import AGENT, App, Stage, until

pytestmark = pytest.mark.netns

NOBODY = 65534


@asynccontextmanager
async def ruled_stage(lab, *entries, mode="exclude"):
    """A stage whose list is made of these entries."""
    text = "".join(
        "[[app]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items()) for entry in entries
    )
    programs = [lab.copy_program("python", name) for name in ("first", "second")]
    async with lab.tunsplit(lab.config(split={"mode": mode}) + text) as daemon:
        yield Stage(lab, daemon, *programs)


@asynccontextmanager
async def started(stage, *words):
    """An app that a command becomes."""
    async with stage.lab.host.start(words, stdin=-1) as running:
        yield App(running)


SIDES = {"exclude": ("uplink", "tunnel"), "include": ("tunnel", "uplink")}


@pytest.mark.parametrize("mode", SIDES)
async def test_by_name_in_either_mode(lab, mode):
    """A name is the executable's, wherever it lies; with its child, and beside another."""
    async with ruled_stage(lab, {"name": "first"}, mode=mode) as stage:
        elsewhere = lab.directory / "elsewhere"
        elsewhere.mkdir()
        copied = shutil.copy(stage.excluded, elsewhere / "first")
        shutil.copy(stage.excluded.parent / "pyvenv.cfg", elsewhere)
        ours, theirs = SIDES[mode]
        async with stage.app(Path(copied)) as same, stage.app(stage.included) as other:
            assert await is_on(stage, same, ours)
            assert await is_on(stage, await bear(same, agent(stage.included)), ours)
            assert await is_on(stage, other, theirs)


async def test_a_script_by_its_command_line(lab):
    """The interpreter is the same; its arguments tell the scripts apart, and what the script calls itself does not."""
    scripts = [lab.directory / name for name in ("downloader.py", "reader.py")]
    for script in scripts:
        shutil.copy(AGENT, script)
    async with ruled_stage(lab, {"cmdline": r"/downloader\.py$"}) as stage:
        for script, side in zip(scripts, ("uplink", "tunnel"), strict=True):
            async with started(stage, stage.excluded, "-I", "-S", "-u", script) as app:
                assert await is_on(stage, app, side)
                assert (side == "uplink") == bool(await listed(stage, app.pid))


async def test_by_user_and_program_at_once(lab):
    """All keys of an entry must match; who changes the user is judged anew."""
    async with (
        ruled_stage(lab, {"name": "first", "user": NOBODY}) as stage,
        stage.app(stage.excluded) as app,
        stage.app(stage.included) as other,
    ):
        assert await is_on(stage, app, "tunnel")
        await app("own = tcp(SERVER4); line = read_line(own)")
        for one in (app, other):
            await one(f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})")

        async def has_ended():
            try:
                await app("own.send(b'?'); own.recv(1)")
            except OSError:
                return True
            return False

        await until(has_ended, "the connection of the old user has ended")
        assert await is_on(stage, app, "uplink")
        assert await is_on(stage, other, "tunnel")


@pytest.fixture
def control_group():
    """A control group of our own; gone in the end."""
    (mount,) = [words[4] for words in map(str.split, Path("/proc/self/mountinfo").read_text().splitlines())
                if "cgroup2" in words]  # fmt: skip
    path = Path(mount, f"tunsplit-test-{os.getpid()}")
    path.mkdir()
    yield path
    path.rmdir()


async def test_by_control_group(control_group, lab):
    """A process that enters it is an app from then on, and one that leaves it is none any more."""
    async with (
        ruled_stage(lab, {"cgroup": f"/{control_group.name}"}) as stage,
        stage.app(stage.excluded) as app,
    ):
        assert await is_on(stage, app, "tunnel")
        (control_group / "cgroup.procs").write_text(str(app.pid))
        assert await is_on(stage, app, "uplink")
        (control_group.parent / "cgroup.procs").write_text(str(app.pid))
        assert await is_on(stage, app, "tunnel")


async def test_live_flows_end_when_their_app_changes_its_control_group(control_group, lab):
    """L21: no event tells, and it opens no other flow by which that would show."""
    async with (
        ruled_stage(lab, {"cgroup": f"/{control_group.name}"}) as stage,
        stage.app(stage.excluded) as app,
        stage.app(stage.included) as other,
    ):
        for one in (app, other):
            await one("staying = tcp(SERVER6); line = read_line(staying)")
        for group, before in ((control_group, "tunnel"), (control_group.parent, "uplink")):
            await app("stream = tcp(SERVER4); line = read_line(stream)")
            await app("dgram = udp(SERVER6); dgram.send(b'?'); dgram.recv(100)")
            stage.clear()
            await app("stream.send(b'before')")
            (group / "cgroup.procs").write_text(str(app.pid))
            for waiting in ("stream", "dgram"):
                with pytest.raises(OSError, match="abort"):
                    await app(f"[{waiting}.recv(9) for _ in range(9)]")
            assert {before} == await stage.where(payload=b"before")
        with pytest.raises(OSError, match="abort"):
            await app("staying.recv(1)")
        assert b"not moved" == await other("staying.send(b'not moved') and read_exactly(staying, 9)")


async def verdict_over(stage, program):
    """What would become of a program if it were started now."""
    return json.loads((await stage.daemon.command("explain", "--json", "--exe", program)).stdout)["verdict"]


async def test_a_symlink_is_followed_again_when_it_has_got_another_end(lab):
    """SPEC.md, "Splitting rules"; whoever runs what was at its end before is like any other."""
    link = lab.directory / "current"
    link.symlink_to(lab.directory / "bin/first")
    async with (
        ruled_stage(lab, {"path": str(link)}) as stage,
        stage.app(stage.excluded) as first,
        stage.app(stage.included) as second,
    ):
        assert await is_on(stage, first, "uplink")
        assert await is_on(stage, second, "tunnel")
        await first("own = tcp(SERVER4); line = read_line(own)")
        link.with_name("next").symlink_to(stage.included)
        link.with_name("next").replace(link)
        with pytest.raises(OSError, match="abort"):
            await first("own.recv(1)")
        assert await is_on(stage, second, "uplink")
        assert await is_on(stage, first, "tunnel")
        async with stage.app(stage.included) as started_since:
            assert await is_on(stage, started_since, "uplink")


async def test_what_was_the_file_of_a_path_is_any_file_once_it_was_replaced(lab):
    """Its inode number may be given to any program of its owner."""
    async with ruled_stage(lab, {"path": str(lab.directory / "bin/first")}) as stage:
        other = stage.excluded.with_name("other")
        other.hardlink_to(stage.excluded)
        async with stage.app(other) as app:
            assert await is_on(stage, app, "uplink")
        new = stage.excluded.with_name("new")
        shutil.copy(stage.included, new)
        new.replace(stage.excluded)

        async def is_any():
            return "tunnel" == await verdict_over(stage, other)

        await until(is_any, "the path names its new file")
        async with stage.app(other) as app:
            assert await is_on(stage, app, "tunnel")
        async with stage.app(stage.excluded) as app:
            assert await is_on(stage, app, "uplink")


async def test_an_executable_that_was_replaced_still_matches(lab):
    """SPEC.md: an upgraded executable; the running one, the new one, and one that was there by another name."""
    async with (
        ruled_stage(lab, {"path": str(lab.directory / "bin/first")}) as stage,
        stage.app(stage.excluded) as running,
        stage.app(stage.included) as other,
    ):
        assert await is_on(stage, running, "uplink")
        new = stage.excluded.with_name("new")
        shutil.copy(stage.excluded, new)
        new.replace(stage.excluded)
        assert "(deleted)" in await running("os.readlink('/proc/self/exe')")
        assert await is_on(stage, running, "uplink")
        async with stage.app(stage.excluded) as upgraded:
            assert await is_on(stage, upgraded, "uplink")
        assert await is_on(stage, other, "tunnel")
