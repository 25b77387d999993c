"""Who asks for an address on another network than its own learns nothing (L19, L20, L37; CVE-2019-14899)."""

import pytest

from tests import craft
from tests.craft import ACK, FIN, RST, SYN
from tests.netns.stage import HOST, HOST_TUNNEL, SERVER, App, open_stage, start_app, until, where
from tunsplit.lab import addresses

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])
TUN = {4: "10.128.0.1", 6: "2001:2:0:5::1"}
OPEN, CLOSED, ECHO = 8080, 8081, 7
ETHERTYPE = {4: "0800", 6: "86dd"}
TUNNEL_MAC = "020000000001"  # of both ends of a tunnel that is a veth pair

SERVE = """
server = socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True); server.settimeout(1)
datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); datagrams.settimeout(1)
datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0); datagrams.bind(('::', port))
"""
FORGE = """
def forge(device, frames):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((device, 0))
        for frame in frames:
            wire.send(bytes.fromhex(frame))
"""


def name(address, port=None):
    """An address as craft's notation has it."""
    host = f"[{address}]" if ":" in str(address) else str(address)
    return host if port is None else f"{host}:{port}"


def probes(source, victim, live=()):
    """Packets in the server's name: to ports that are open, closed, and in use by connections with it."""
    found = [craft.echo(f"{source} > {victim}", 77)]
    for port in (OPEN, CLOSED, *live):
        ends = f"{name(source, ECHO)} > {name(victim, port)}"
        found += [craft.tcp(ends, flags=flags) for flags in (SYN, SYN | ACK, ACK, FIN | ACK, RST)]
        found += [craft.tcp(ends, b"forged"), craft.udp(ends, b"forged")]
    return found


async def send(forger: App, device: str, packets, destination_mac: str, version: int) -> None:
    header = destination_mac + "020000000099" + ETHERTYPE[version]
    await forger("forge(device, frames)", device=device, frames=[header + packet.hex() for packet in packets])


@pytest.mark.attack(
    "segments to the tunnel's address (CVE-2019-14899)", "an answer shows who has it", "answered nowhere"
)
@BOTH
async def test_forged_packets_to_the_tunnels_and_the_tuns_address_are_answered_nowhere(lab, version):
    """L19: on the uplink, nor in the tunnel, where a neighbour would see that something was sent."""
    server, programs = SERVER[version], [lab.copy_program("python", one) for one in ("server", "neighbour")]
    async with start_app(lab.host, programs[0]) as app, start_app(lab.router, programs[1]) as forger:
        await app(SERVE, port=OPEN)
        await forger(FORGE)
        async with open_stage(lab, programs[:1]) as stage, stage.app(stage.included) as included:
            mac = (await stage.mac()).hex()
            await included(SERVE, port=OPEN + 2)
            await included(f"own = tcp(SERVER{version}); read_line(own)")
            (flow,) = [one for one in await stage.daemon.flows() if one["app"]["pid"] == included.pid]
            live = [int(flow[end].rpartition(":")[2]) for end in ("nat", "source")]
            stage.clear()
            for victim in (str(HOST_TUNNEL[version]), TUN[version]):
                packets = probes(server, victim, (*live, OPEN + 2))
                await send(forger, "lan0", packets, mac, version)
                await lab.uplink.settle()
                assert len(packets) == len(lab.uplink.seen(destination=victim))
                assert set() == await stage.where(address=server, direction="out")
                assert set() == await stage.where(source=victim)
            await included("own.sendall(b'unharmed')")
            assert b"unharmed" == await included("read_exactly(own, 8)")

            # The controls: the uplink's own address is answered for, and so is the tunnel's without tunsplit.
            await send(forger, "lan0", probes(server, HOST[version]), mac, version)
            await until(lambda: where(lab, source=HOST[version], direction="out", port=OPEN), "there is an answer")
        stage.clear()
        await send(forger, "lan0", probes(server, HOST_TUNNEL[version]), mac, version)
        assert {"uplink"} == await where(lab, source=HOST_TUNNEL[version], destination=server)


@pytest.mark.attack("the VPN's side asks for the uplink's address", "a server answers by the uplink", "not heard")
@BOTH
@pytest.mark.lab(tunnel_kind="veth")
async def test_the_uplinks_address_cannot_be_asked_for_by_the_tunnel(lab, version):
    """L20, L37: an excluded server would answer beside the tunnel who has asked in it. Without tunsplit it does."""
    lab.relay.ip(f"route add {HOST[version]} dev wg0")
    program = lab.copy_program("python", "server")
    asked = f"{name(addresses.RELAY_TUNNEL[version].ip, 9)} > {name(HOST[version], OPEN)}"
    packets = [craft.tcp(asked, flags=SYN), craft.udp(asked, b"forged")]
    async with start_app(lab.host, program) as server, start_app(lab.relay, program) as forger:
        await server(SERVE, port=OPEN)
        await forger(FORGE)
        async with open_stage(lab, [program]) as stage:
            await send(forger, "wg0", packets, TUNNEL_MAC, version)
            await lab.tunnel.settle()
            assert 2 == len(lab.tunnel.seen(destination=HOST[version]))
            with pytest.raises(OSError, match="timed out"):
                await server("datagrams.recvfrom(100)")
            assert set() == await stage.where(port=OPEN, direction="out")
        await send(forger, "wg0", packets, TUNNEL_MAC, version)
        assert b"forged" == await server("datagrams.recvfrom(100)[0]")
        assert {"uplink"} == await where(lab, port=OPEN, direction="out")


@pytest.mark.attack("the VPN's side speaks in a neighbour's name", "the answer leaves on the uplink", "not heard")
@pytest.mark.lab(tunnel_kind="veth")
async def test_the_tunnel_cannot_speak_in_the_local_networks_name(lab):
    """L20, L25: what an included server answers to that would leave on the uplink, where the network is shared."""
    neighbour, stranger = str(addresses.ROUTER_LAN[4].ip), "10.64.0.9"
    async with (
        open_stage(lab, lan={"allow": True}) as stage,
        stage.app(stage.included) as server,
        start_app(lab.relay, stage.included) as forger,
    ):
        await server(SERVE, port=OPEN)
        await forger(FORGE)
        asked = f"{name(HOST_TUNNEL[4], OPEN)}"
        await send(forger, "wg0", [craft.udp(f"{neighbour}:9 > {asked}", b"forged")], TUNNEL_MAC, 4)
        await send(forger, "wg0", [craft.udp(f"{stranger}:9 > {asked}", b"honest")], TUNNEL_MAC, 4)
        assert b"honest" == await server("datagrams.recvfrom(100)[0]")
        await server("datagrams.sendto(b'to the neighbour', (to, 9))", to=f"::ffff:{neighbour}")
        assert {"uplink"} == await stage.where(payload=b"to the neighbour")  # the control: such an answer does leave
        assert {"tunnel"} == await stage.where(payload=b"forged")
