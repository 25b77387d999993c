"""Our tables are taken away and the daemon is killed before it has put them back: the way stays closed (L15, L34)."""

import os
import signal
from dataclasses import replace

import pytest

from tests.netns.stage import HOST, REFUSED, RELAY, SERVER, open_stage
from tests.netns.test_life import look_at

pytestmark = pytest.mark.netns

GUARD, TABLES = "table inet tunsplit_guard", {f"table {family} tunsplit" for family in ("inet", "arp", "netdev")}

# What no routing rule stops: a datagram whose socket is bound to the uplink.
BOUND = (
    "own = socket.socket(socket.AF_INET6 if ':' in to else socket.AF_INET, socket.SOCK_DGRAM)\n"
    "own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0'); own.sendto(b'in clear', (to, 7))"
)


async def flush_and_kill(stage):
    """Empty nftables while the daemon cannot see it, and kill it."""
    os.kill(stage.daemon.pid, signal.SIGSTOP)
    await stage.lab.host.run(["nft", "flush", "ruleset"])
    await stage.daemon.kill()


async def tables(lab):
    return set((await lab.host.run(["nft", "list", "tables"])).stdout.splitlines())


async def on_uplink(lab, version):
    """What the uplink has shown of the server, ARP and neighbour discovery included."""
    await lab.uplink.settle()
    assert lab.uplink.dropped == 0
    return [seen.protocol for seen in lab.uplink.seen(address=SERVER[version])]


@pytest.mark.attack("nftables flushed, then SIGKILL", "sockets bound to the uplink send in clear", "refused")
async def test_killed_before_what_was_flushed_is_back_it_leaves_the_way_closed(lab):
    """The tunnel needs what was flushed, so it shows nothing until the next start, which takes the guard over.

    The guard knows what to put back, too.
    """
    before = await look_at(lab.host)
    async with open_stage(lab) as stage, stage.app(stage.included) as app:
        await flush_and_kill(stage)
        assert {GUARD} == await tables(lab)
        stage.clear()
        for version in (4, 6):
            with pytest.raises(OSError, match=REFUSED):
                await app(BOUND, to=str(SERVER[version]))
            assert [] == await on_uplink(lab, version)

        config = lab.config([stage.excluded])
        async with lab.tunsplit(config) as daemon, stage.app(stage.excluded) as excluded:
            again = replace(stage, daemon=daemon)
            assert {GUARD, *TABLES} == await tables(lab)
            for version in (4, 6):
                assert str(HOST[version]) == await excluded(f"ask('tcp', SERVER{version})")
                assert str(RELAY[version]) == await app(f"ask('tcp', SERVER{version})")
            assert {"uplink", "tunnel"} == await again.where(address=SERVER[4])
            await flush_and_kill(again)
            assert {GUARD} == await tables(lab)
            assert 0 == (await stage.daemon.command("undo")).returncode
            assert before == await look_at(lab.host)
            stage.clear()
            # The control: it is the way that this takes.
            for version in (4, 6):
                await app(BOUND, to=str(SERVER[version]))
                assert [] != await on_uplink(lab, version)
