"""What routers say to an app reaches it through NAT, on both sides (L22): traceroute."""

import pytest

from tests.netns.stage import ROUTER, SERVER, open_stage
from tunsplit.lab import addresses

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])

HOPS = {
    ("uplink", 4): [ROUTER[4], SERVER[4]],
    ("uplink", 6): [ROUTER[6], SERVER[6]],
    ("tunnel", 4): [addresses.RELAY_TUNNEL[4].ip, addresses.ROUTER_RELAY[4].ip, SERVER[4]],
    ("tunnel", 6): [addresses.RELAY_TUNNEL[6].ip, addresses.ROUTER_RELAY[6].ip, SERVER[6]],
}


@BOTH
@pytest.mark.parametrize("method", [("--udp", "-p", "33434"), ("--icmp",)], ids=["udp", "icmp"])
@pytest.mark.parametrize("side", ["uplink", "tunnel"])
async def test_traceroute_shows_the_routers_of_its_own_side(lab, side, version, method):
    """L22: time exceeded is translated with the packet that it quotes. To port 53, --udp's own, we would answer."""
    program = lab.copy_program("traceroute", "own-traceroute")
    async with open_stage(lab, [program] if side == "uplink" else []) as stage:
        # Two probes at once at the most: routers are slow to tell of more.
        words = ["-n", "-q", "1", "-N", "2", "-m", "4", "-w", "2", *method, str(SERVER[version])]
        done = await lab.host.run([program, *words])
        hops = [line.split()[1] for line in done.stdout.splitlines()[1:]]

        assert [str(hop) for hop in HOPS[side, version]] == hops
        assert {side} == await stage.where(destination=SERVER[version])
