"""What comes in: a server answers on the side where its app lives, and nowhere else (L9, L19, L20, L35, L38)."""

from collections.abc import AsyncIterator

import pytest

from tests.netns.stage import HOST, HOST_TUNNEL, SERVER, App, start_app, until, where

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
async def test_an_included_server_does_not_answer_on_the_uplink(stage, included, client, version):
    """L20: not a packet; a closed port does not answer there either."""
    await included(listen(version, 8080))
    await client("socket.setdefaulttimeout(1)")
    for port in (8080, 8081):
        with pytest.raises(OSError):  # noqa: PT011 - refused or timed out, the wire tells
            await client("tcp(host, port)", host=str(HOST[version]), port=port)

    assert {"uplink"} == await stage.where(address=SERVER[version])  # the question
    assert [] == went_out(stage, "uplink", version)


@BOTH
async def test_without_tunsplit_the_same_server_answers(lab, version):
    """The control."""
    program = lab.copy_program("python", "app")
    async with start_app(lab.host, program) as server, start_app(lab.internet, program) as client:
        await server(listen(version, 8080))
        await client("own = tcp(host, 8080)", host=str(HOST[version]))
        assert {"uplink"} == await where(lab, address=SERVER[version])


@BOTH
@pytest.mark.parametrize(("name", "side"), [("excluded", "uplink"), ("included", "tunnel")])
async def test_a_udp_server_answers_on_its_own_side(stage, client, version, name, side):
    """L20: an included one that is asked on the uplink says nothing there."""
    async with stage.app(getattr(stage, name)) as server:
        family, every = {4: ("AF_INET", ""), 6: ("AF_INET6", "::")}[version]
        await server(f"own = socket.socket(socket.{family}, socket.SOCK_DGRAM); own.bind(('{every}', 8080))")
        await client("own = udp(host, 8080); own.send(b'question')", host=str(HOST[version]))
        await server("data, peer = own.recvfrom(100); own.sendto(b'answer', peer)")

        async def has_left():
            return await stage.where(payload=b"answer", protocol="udp")

        assert {side} == await until(has_left, "the answer has left")
    assert {"uplink"} == await stage.where(payload=b"question")


@BOTH
async def test_a_udp_answer_leaves_from_the_address_and_port_that_were_asked(stage, excluded, client, version):
    """L38: the server is bound to every address, the client connected: it hears no other port."""
    family, every = {4: ("AF_INET", ""), 6: ("AF_INET6", "::")}[version]
    await excluded(f"own = socket.socket(socket.{family}, socket.SOCK_DGRAM); own.bind(('{every}', 8080))")
    await client("own = udp(host, 8080)", host=str(HOST[version]))
    for question in ("one", "two"):
        await client("own.send(question.encode())", question=question)
        await excluded("data, peer = own.recvfrom(100); own.sendto(data[::-1], peer)")
        assert question[::-1] == await client("own.recv(100).decode()")

    assert {"uplink"} == await stage.where(address=SERVER[version])


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
async def test_a_port_scan_costs_no_attribution(stage, client, version):
    """KERNEL facts: the kernel's own resets come into the tun; those of no flow are dropped unjudged."""
    await client(
        "for port in range(9000, 9050):\n"
        "    own = socket.socket(family(host), socket.SOCK_STREAM); own.setblocking(False)\n"
        "    own.connect_ex((host, port)); own.close()",
        host=str(HOST[version]),
    )

    async def all_are_dropped():
        return await stage.counter("reset_of_no_flow") >= 50

    await until(all_are_dropped, "every reset has been dropped")
    assert {} == {
        name: count
        for name, count in (await stage.daemon.status())["counters"].items()
        if name.startswith("attributed_") and count
    }
    assert [] == went_out(stage, "uplink", version)
