"""What outlives tunsplit's death (L6, L15, L29): who was excluded stays so."""

import pytest

from tests.netns.family import agent, bear, bear_daemon
from tests.netns.sides import is_on, listed, look
from tests.netns.stage import REFUSED, Stage, start_app, until
from tunsplit.tasks import treefile

pytestmark = pytest.mark.netns


async def until_saved(lab):
    """Wait until the tree was written with all that has happened so far."""
    file = await lab.host.call(treefile.path_here)

    def written():
        status = file.stat() if file.exists() else None
        return status and (status.st_ino, status.st_mtime)

    for _ in range(2):  # the one that is under way may be older than what has just happened
        before = written()

        async def is_written(before=before):
            return written() != before

        await until(is_written, "the tree is written")


@pytest.mark.parametrize("how", ["kill", "terminate"])
async def test_an_orphan_is_still_excluded_after_a_new_start(lab, how):
    """L29: its ancestor is gone when tunsplit ends; what was said by hand is remembered as well."""
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    config, (third, fourth) = (
        lab.config(programs[:1]),
        (lab.copy_program("python", name) for name in ("third", "fourth")),
    )
    async with (
        start_app(lab.host, programs[1]) as relay,
        start_app(lab.host, third) as marked,
        lab.tunsplit(config) as daemon,
    ):
        stage = Stage(lab, daemon, *programs)
        orphan = await bear_daemon(relay, programs[0], fourth, wait_known=look(daemon))
        await daemon.command("pid", "add", str(marked.pid))
        child = await bear(marked, agent(third))
        for app in (orphan, marked, child):
            assert await is_on(stage, app, "uplink")
        assert await is_on(stage, relay, "tunnel")
        await until_saved(lab)
        if how == "kill":
            await daemon.kill()
            with pytest.raises(OSError, match=REFUSED):  # L15
                await relay("tcp(SERVER4)")
        else:
            await daemon.terminate()
        async with lab.tunsplit(config) as again:
            stage = Stage(lab, again, *programs)
            for app in (orphan, marked, child):
                assert await is_on(stage, app, "uplink")
            assert await is_on(stage, relay, "tunnel")
            (line,) = await listed(stage, orphan.pid)
            assert f"({programs[0]}), which has exited" in line
            (line,) = await listed(stage, marked.pid)
            assert line.endswith("by hand")


async def test_an_orphan_from_before_the_first_start_is_not_known(lab):
    """The control: it is tunsplit's memory that knows, /proc does not tell any more."""
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    async with start_app(lab.host, programs[1]) as relay:
        orphan = await bear_daemon(relay, programs[0], lab.copy_program("python", "third"))
        async with lab.tunsplit(lab.config(programs[:1])) as daemon:
            stage = Stage(lab, daemon, *programs)
            assert await is_on(stage, orphan, "tunnel")
            assert [] == await listed(stage, orphan.pid)


async def test_who_was_born_while_nobody_looked_is_not_guessed(lab):
    """L29: of unknown birth after a kill, it is blocked and visible; a rule of its own still finds it."""
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    config = lab.config(programs[:1])
    async with start_app(lab.host, programs[0]) as before, lab.tunsplit(config) as daemon:
        assert await is_on(Stage(lab, daemon, *programs), before, "uplink")
        await until_saved(lab)
        await daemon.kill()
        async with (
            start_app(lab.host, programs[0]) as ours,
            start_app(lab.host, programs[1]) as unknown,
            lab.tunsplit(config) as again,
        ):
            stage = Stage(lab, again, *programs)
            assert await is_on(stage, ours, "uplink")
            stage.clear()
            with pytest.raises(OSError, match=REFUSED):
                await unknown("tcp(SERVER4)")
            flows = [flow for flow in await again.flows() if flow["app"] and flow["app"]["pid"] == unknown.pid]
            assert {("block", "unattributed")} == {(flow["verdict"], flow["reason"]) for flow in flows}
            assert set() == await stage.where(destination="198.51.100.1")
            async with stage.app(programs[1]) as young:
                assert await is_on(stage, young, "tunnel")
