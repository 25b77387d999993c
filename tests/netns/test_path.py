"""What the path says to an app reaches it through NAT, on both sides (L22): path MTU discovery, traceroute."""

import errno

import pytest

from tests.netns.stage import ROUTER, SERVER, open_stage, until
from tunsplit.lab import addresses

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])
SIDES = pytest.mark.parametrize(("name", "side"), [("excluded", "uplink"), ("included", "tunnel")])
MTU = 1300  # of the path behind the router; less than either side's own


@pytest.fixture
async def app(stage, name):
    async with stage.app(getattr(stage, name)) as running:
        yield running


@pytest.fixture
def narrow(lab):
    """Make the router forward no more than MTU to the internet."""
    for interface in addresses.ROUTER_INTERNET.values():
        own = "proto kernel scope link" if interface.version == 4 else "proto kernel metric 256"
        lab.router.ip(f"route replace {interface.network} dev inet0 {own} mtu lock {MTU}")


def too_big(stage, side, version):
    """The errors that came in on this side about packets to the server."""
    kind = {4: 3, 6: 2}[version]
    frames = getattr(stage.lab, side).seen({4: "icmp", 6: "icmpv6"}[version])
    return [frame for frame in frames if frame.kind == kind and frame.direction == "in" and frame.quoted is not None]


@SIDES
@BOTH
async def test_a_tcp_transfer_finds_the_path_mtu(lab, narrow, stage, app, side, version):
    """L22: it begins with segments that the router does not forward."""
    await app(
        f"import threading\nown = tcp(SERVER{version}); read_line(own)\ndata = os.urandom(300_000)\n"
        "thread = threading.Thread(target=own.sendall, args=(data,)); thread.start()\n"
        "back = read_exactly(own, len(data)); thread.join()"
    )
    assert await app("back == data")
    # TCP's own view of the path: IP_MTU, IPV6_MTU.
    level, option = {4: ("IPPROTO_IP", 14), 6: ("IPPROTO_IPV6", 24)}[version]
    assert MTU == await app(f"own.getsockopt(socket.{level}, {option})")

    assert {side} == await stage.where(address=SERVER[version])
    assert too_big(stage, side, version)


@SIDES
@BOTH
async def test_a_udp_socket_is_told_the_path_mtu(lab, narrow, stage, app, side, version):
    """L22: the first datagram is lost, the second refused on the spot."""
    level, option, do = {4: ("IPPROTO_IP", 10, 2), 6: ("IPPROTO_IPV6", 23, 2)}[version]  # IP(V6)_MTU_DISCOVER
    await app(f"own = udp(SERVER{version}); own.setsockopt(socket.{level}, {option}, {do}); own.send(bytes(1340))")

    async def is_told():
        try:
            return await app("own.recv(2048)")
        except OSError as error:
            return error.errno == errno.EMSGSIZE

    assert await until(is_told, "the socket has an error") is True
    with pytest.raises(OSError) as failure:  # noqa: PT011 - errno says which
        await app("own.send(bytes(1340))")
    assert errno.EMSGSIZE == failure.value.errno
    largest = MTU - (28 if version == 4 else 48)
    await app(f"own.send(bytes({largest}))")
    assert await app("len(own.recv(2048))") > largest

    assert {side} == await stage.where(address=SERVER[version])
    assert 1 == len(too_big(stage, side, version))


HOPS = {
    ("uplink", 4): [ROUTER[4], SERVER[4]],
    ("uplink", 6): [ROUTER[6], SERVER[6]],
    ("tunnel", 4): [addresses.RELAY_TUNNEL[4].ip, addresses.ROUTER_RELAY[4].ip, SERVER[4]],
    ("tunnel", 6): [addresses.RELAY_TUNNEL[6].ip, addresses.ROUTER_RELAY[6].ip, SERVER[6]],
}


@BOTH
@pytest.mark.parametrize("method", [("--udp", "-p", "33434"), ("--icmp",)], ids=["udp", "icmp"])
async def test_traceroute_shows_the_routers_of_its_own_side(lab, version, method):
    """L22: time exceeded is translated with the packet that it quotes. To port 53, --udp's own, we would answer."""
    programs = {"uplink": lab.copy_program("traceroute", "excluded-traceroute"), "tunnel": "traceroute"}
    async with open_stage(lab, [programs["uplink"]]) as stage:
        for side, program in programs.items():
            # Two probes at once at the most: routers are slow to tell of more.
            words = ["-n", "-q", "1", "-N", "2", "-m", "4", "-w", "2", *method, str(SERVER[version])]
            done = await lab.host.run([program, *words])
            hops = [line.split()[1] for line in done.stdout.splitlines()[1:]]

            assert [str(hop) for hop in HOPS[side, version]] == hops
            assert {side} == await stage.where(destination=SERVER[version])
            stage.clear()
