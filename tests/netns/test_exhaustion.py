"""No descriptor is left to the daemon: it cannot look at anybody, so it blocks, and guesses nobody's side (L21)."""

import resource

import pytest

from tests.netns.stage import HOST, REFUSED, RELAY, SERVER, Stage, until

pytestmark = pytest.mark.netns


@pytest.fixture
async def stage(lab):
    """Run tunsplit; its log may tell of errors, but of no mistake."""
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    async with lab.tunsplit(lab.config(programs[:1])) as daemon:
        yield Stage(lab, daemon, *programs)
        assert "Traceback" not in daemon.log, daemon.log


async def test_without_a_descriptor_left_nothing_is_guessed_and_it_recovers(lab, stage):
    """Unknown apps are refused, and so is what needs a side opened; nftables are flushed meanwhile, too."""
    async with (
        stage.app(stage.included) as included,
        stage.app(stage.excluded) as one,
        stage.app(stage.included) as other,
    ):
        await included("own = tcp(SERVER4); read_line(own)")
        limits = resource.prlimit(stage.daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(stage.daemon.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        stage.clear()
        for app in (one, other):
            for version in (4, 6):
                with pytest.raises(OSError, match=REFUSED):
                    await app(f"tcp(SERVER{version})")
        await lab.host.run(["nft", "flush", "ruleset"])
        lab.tunnel_down()
        lab.tunnel_up()
        with pytest.raises(OSError, match=f"{REFUSED}|timed out|reset|abort"):
            await included("own.sendall(b'old'); own.recv(10); tcp(SERVER4)")
        for version in (4, 6):
            assert set() == await stage.where(destination=SERVER[version], payload=b"?")
            assert set() == await stage.where(destination=SERVER[version], protocol="arp")
        assert not lab.uplink.seen(destination=SERVER[4])
        assert not lab.uplink.seen(destination=SERVER[6])

        resource.prlimit(stage.daemon.pid, resource.RLIMIT_NOFILE, limits)

        async def works():
            try:
                return [await app(f"ask('tcp', SERVER{version})") for app in (one, other) for version in (4, 6)]
            except OSError:
                return None

        expected = [str(side[version]) for side in (HOST, RELAY) for version in (4, 6)]
        assert expected == await until(works, "both apps have their side again")  # the control
        assert await stage.counter("judgement_failed")
