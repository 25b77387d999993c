"""What comes in on the uplink: a server that answers, addresses that do not show, ports that are closed (L19, L35)."""

from collections.abc import AsyncIterator

import pytest

from tests.netns.stage import HOST, HOST_TUNNEL, SERVER, App, start_app, until

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])
PORTS = pytest.mark.parametrize("port", [8080, 50_000])  # the second one is in NAT's range
TUN = {4: "10.128.0.1", 6: "2001:2:0:5::1"}
LISTEN = "server = socket.create_server(('{any}', {port}), family={family}); server.settimeout(3)"


@pytest.fixture
async def client(stage) -> AsyncIterator[App]:
    """Run an app in the internet."""
    async with start_app(stage.lab.internet, stage.included) as app:
        yield app


def listen(version, port):
    family = {4: "socket.AF_INET", 6: "socket.AF_INET6"}[version]
    return LISTEN.format(any="" if version == 4 else "::", port=port, family=family)


def went_out(stage, side, version):
    """What left by this side for the client."""
    frames = getattr(stage.lab, side).seen(destination=SERVER[version])
    return [frame for frame in frames if frame.direction == "out"]


@BOTH
@PORTS
async def test_an_excluded_server_answers_on_the_uplink(stage, excluded, client, version, port):
    """L20, L35: also on a port of NAT's range, which is taken from the kernel only while NAT uses it."""
    await excluded(listen(version, port))
    await client("own = tcp(host, port); own.sendall(b'question')", host=str(HOST[version]), port=port)
    await excluded("accepted, peer = server.accept(); accepted.settimeout(3)")
    assert b"question" == await excluded("accepted.recv(100)")
    await excluded("accepted.sendall(b'answer' * 10000); accepted.close()")
    assert b"answer" * 10000 == await client("read_exactly(own, 60000)")
    assert b"" == await client("own.recv(1)")

    assert str(SERVER[version]) == await excluded("peer[0]")
    assert {"uplink"} == await stage.where(address=SERVER[version])
    assert {HOST[version]} == {frame.source for frame in went_out(stage, "uplink", version)}


@BOTH
async def test_the_tunnels_and_the_tuns_addresses_do_not_show_on_the_uplink(stage, excluded, version):
    """L19 (CVE-2019-14899): a neighbour that asks for them, or forges a SYN to them, gets no answer."""
    await excluded(listen(version, 8080))
    lab = stage.lab
    for address in (str(HOST_TUNNEL[version]), TUN[version]):
        lab.router.ip(f"route replace {address} dev lan0\n")
        async with start_app(lab.router, stage.included) as neighbour:
            await neighbour("socket.setdefaulttimeout(0.5)")
            with pytest.raises(OSError):  # noqa: PT011 - nobody there
                await neighbour("tcp(host, 8080)", host=address)
            # Told where it lives, it is not answered all the same.
            mac = (await stage.mac()).hex(":")
            lab.router.ip(f"neighbour replace {address} lladdr {mac} dev lan0")
            with pytest.raises(OSError):  # noqa: PT011 - nobody there
                await neighbour("tcp(host, 8080)", host=address)

        await stage.where()
        assert [] == [frame for frame in lab.uplink.seen(source=address) if frame.direction == "out"]


@BOTH
async def test_what_the_kernel_answers_to_strangers_never_comes_into_the_tun(stage, excluded, client, version):
    """A neighbour's SYN and pings, thousands a second, would crowd apps' packets out of it. No address shows either."""
    scan = (
        "for port in range(9000, 9050):\n"
        "    own = socket.socket(family(host), socket.SOCK_STREAM); own.setblocking(False)\n"
        "    own.connect_ex((host, port)); own.close()\n"
        "own = ping(host)\n"
        "own.send(struct.pack('!BBHHH', 128 if ':' in host else 8, 0, 0, 0, 1))"
    )
    await client(scan, host=str(HOST[version]))

    async def all_are_dropped():
        listed = (await stage.lab.host.run(["nft", "list", "counter", "inet", "tunsplit", "answered_nobody"])).stdout
        return int(listed.split("packets", 1)[1].split()[0]) >= 51

    await until(all_are_dropped, "every reset and the echo reply have been dropped")
    counters = (await stage.daemon.status())["counters"]
    seen = ("attributed_", "reset_of_no_flow", "icmp_of_no_flow")
    assert {} == {name: count for name, count in counters.items() if name.startswith(seen) and count}
    assert [] == went_out(stage, "uplink", version)

    # An app's own reset goes where its connection is.
    await excluded(listen(version, 8080))
    await client("own = tcp(host, 8080); own.sendall(b'question')", host=str(HOST[version]))
    await excluded(
        "accepted, peer = server.accept(); accepted.settimeout(3); accepted.recv(100)\n"
        "accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); accepted.close()"
    )
    with pytest.raises(ConnectionResetError):
        await client("own.recv(1)")
    assert {"uplink"} == await stage.where(address=SERVER[version])
