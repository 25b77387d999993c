"""Under full load on both sides at once: no exception, no leak, no leftover (issue, "Must reach")."""

import json

import pytest
import trio

from tests.netns.stage import SERVER, open_stage
from tests.netns.test_life import look_at
from tunsplit.lab import addresses

pytestmark = pytest.mark.netns

SECONDS = "5"
PORTS = {"uplink": addresses.IPERF_PORT, "tunnel": addresses.IPERF_PORT + 1}

# Too much passes for an observer to see all of it: the machines behind both wires count, in the kernel.
COUNT = """
table inet seen {{
    chain seen {{
        type filter hook prerouting priority -500
        iifname {device} tcp dport {uplink} counter comment "uplink"
        iifname {device} tcp dport {tunnel} counter comment "tunnel"
    }}
}}
"""


async def count(namespace):
    """How many packets of each side's iperf3 came in there."""
    shown = json.loads((await namespace.run(["nft", "-j", "list", "table", "inet", "seen"])).stdout)
    rules = [entry["rule"] for entry in shown["nftables"] if "rule" in entry]
    return {rule["comment"]: rule["expr"][-1]["counter"]["packets"] for rule in rules}


@pytest.mark.lab(observe=False)
async def test_both_sides_hammered_at_once(lab):
    """Eight streams each way on each side: only its own iperf3 was ever on a wire, and nothing is left."""
    excluded = lab.copy_program("iperf3", "excluded-iperf3")
    for namespace, device in ((lab.router, "lan0"), (lab.relay, addresses.TUNNEL_DEVICE)):
        namespace.nft(COUNT.format(device=device, **PORTS))
    before = await look_at(lab.host)
    outcome = {}

    async def hammer(side, program, version):
        words = ["-c", str(SERVER[version]), "-p", str(PORTS[side]), "-P", "8", "--bidir", "-t", SECONDS]
        outcome[side] = await lab.host.run([program, *words])

    async with open_stage(lab, [excluded]) as stage:
        async with (
            lab.iperf_server(port=PORTS["uplink"]),
            lab.iperf_server(port=PORTS["tunnel"]),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(hammer, "uplink", excluded, 6)
            nursery.start_soon(hammer, "tunnel", "iperf3", 4)
        counters = (await stage.daemon.status())["counters"]
        flows = await stage.daemon.flows()
        uplink, tunnel = await count(lab.router), await count(lab.relay)
        rejected = (await lab.host.run(["nft", "list", "counter", "inet", "tunsplit", "rejected"])).stdout

    assert uplink["uplink"] > 1000
    assert tunnel["tunnel"] > 1000
    assert (0, 0) == (uplink["tunnel"], tunnel["uplink"])
    for side, port in PORTS.items():
        assert "iperf Done" in outcome[side].stdout
        # A control connection and eight streams each way.
        assert 17 == len([flow for flow in flows if flow["destination"].endswith(f":{port}")])
        assert {side} == {flow["verdict"] for flow in flows if flow["destination"].endswith(f":{port}")}
    assert 0 == counters["held_flows"]
    assert 0 == counters.get("judgement_failed", 0)
    assert "packets 0" in rejected
    assert before == await look_at(lab.host)
