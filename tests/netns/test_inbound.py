"""What comes in from both sides: who answers there, and who does not (L9, L19, L20, L38)."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.netns.stage import HOST, HOST_TUNNEL, RELAY, SERVER, App, Stage, open_stage, start_app, until, where
from tunsplit.lab import addresses

pytestmark = pytest.mark.netns

SIDES = pytest.mark.parametrize(("name", "side"), [("excluded", "uplink"), ("included", "tunnel")])
# Where the host is asked on each side, and by whom.
ASKED = {"uplink": HOST, "tunnel": HOST_TUNNEL}
PEER = {"uplink": SERVER, "tunnel": {version: one.ip for version, one in addresses.RELAY_TUNNEL.items()}}
OTHER = {"uplink": "tunnel", "tunnel": "uplink"}
SEEN_AS = {"uplink": HOST, "tunnel": RELAY}
PORT = 8080

# In the server. Each of its sockets is bound to every address.
SERVE = """
stream, datagrams = {}, {}
for version, family, every in (4, socket.AF_INET, ''), (6, socket.AF_INET6, '::'):
    stream[version] = socket.create_server((every, port), family=family)
    datagrams[version] = socket.socket(family, socket.SOCK_DGRAM)
    if version == 6:
        datagrams[version].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    datagrams[version].bind((every, port))
    for own in stream[version], datagrams[version]:
        own.settimeout(3)

def answer(version):
    data, peer = datagrams[version].recvfrom(100)
    datagrams[version].sendto(data[::-1], peer)
    return peer[0]
"""


@asynccontextmanager
async def start_client(stage: Stage, side: str) -> AsyncIterator[App]:
    """Run an app that reaches the host by this side: in the internet, or at the relay."""
    if side == "tunnel":  # the relay learns by the host's first packet where it is
        async with stage.app(stage.included) as app:
            await app("ask('udp', ROUTER4)")
    async with start_app({"uplink": stage.lab.internet, "tunnel": stage.lab.relay}[side], stage.included) as client:
        yield client


@pytest.fixture
async def client(stage) -> AsyncIterator[App]:
    """Run an app in the internet."""
    async with start_client(stage, "uplink") as opened:
        yield opened


@SIDES
async def test_a_server_answers_on_its_own_side_and_on_no_other(stage, name, side):
    """L20: TCP and UDP, IPv4 and IPv6; its own side is the control of the other one."""
    other = OTHER[side]
    async with (
        stage.app(getattr(stage, name)) as server,
        start_client(stage, side) as client,
        start_client(stage, other) as stranger,
    ):
        await server(SERVE, port=PORT)
        for version in (4, 6):
            asked, peer = str(ASKED[side][version]), PEER[side][version]
            await client("own = tcp(to, port); own.sendall(b'!olleh')", to=asked, port=PORT)
            await server(
                "accepted, _ = stream[version].accept(); accepted.sendall(accepted.recv(6)[::-1])", version=version
            )
            assert b"hello!" == await client("read_exactly(own, 6)")
            await client("own = udp(to, port); own.send(b'olleh')", to=asked, port=PORT)
            assert str(peer) == await server("answer(version)", version=version)
            assert b"hello" == await client("own.recv(100)")
            assert {side} == await stage.where(payload=b"hello")
            assert {side} == await stage.where(address=peer)
            stage.clear()

            asked, peer = str(ASKED[other][version]), PEER[other][version]
            await stranger("socket.setdefaulttimeout(0.5)")
            with pytest.raises(OSError):  # noqa: PT011 - refused or timed out, the wires tell
                await stranger("tcp(to, port)", to=asked, port=PORT)
            await stranger("own = udp(to, port); own.send(b'olleh')", to=asked, port=PORT)
            assert str(peer) == await server("answer(version)", version=version)
            # What came before is judged.
            assert str(SEEN_AS[side][version]) == await server(f"ask('udp', ROUTER{version})")
            assert {other} == await stage.where(address=peer, direction="in")
            assert set() == await stage.where(destination=peer, direction="out", port=PORT)
            assert set() == await stage.where(payload=b"hello")
            stage.clear()


# Servers of several addresses

SECOND = {4: "192.168.50.3", 6: "2001:db8:50::3"}
# How a server answers: from a socket that is bound to every address, of IPv6 and IPv4 alike; from the same one with the
# packet's own word for it, naming the device too (IP_PKTINFO, IPV6_PKTINFO); from one that is bound to what is asked.
ANSWER = """
def bound(address):
    own = socket.socket(family(address), socket.SOCK_DGRAM)
    own.settimeout(3)
    if address == '::':
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        own.setsockopt(socket.IPPROTO_IPV6, 49, 1)  # IPV6_RECVPKTINFO
        own.setsockopt(socket.IPPROTO_IP, 8, 1)
    own.bind((address, port))
    return own

def answer(how):
    data, said, _, peer = own.recvmsg(100, 200)
    if how == 'info':
        own.sendmsg([data[::-1]], said, 0, peer)
    else:
        own.sendto(data[::-1], peer)
"""


@pytest.mark.parametrize("how", ["every", "info", "bound"])
async def test_a_server_of_several_addresses_answers_from_the_one_that_was_asked(lab, how):
    """L38, KERNEL facts: the clients are connected, so they hear no other address and no other port."""
    lab.host.ip(f"address add {SECOND[4]}/24 dev eth0\naddress add {SECOND[6]}/64 dev eth0 nodad")
    async with (
        open_stage(lab) as stage,
        stage.app(stage.excluded) as excluded,
        start_client(stage, "uplink") as client,
    ):
        for asked in (*map(str, HOST.values()), *SECOND.values()):
            await excluded(f"{ANSWER}\nown = bound(to)", port=PORT, to=asked if how == "bound" else "::")
            await client("own = udp(to, port)", to=asked, port=PORT)
            for question in ("eno", "owt"):

                async def answered(question=question):
                    await client("own.send(question.encode())", question=question)
                    await excluded("answer(how)", how=how)
                    with contextlib.suppress(OSError):  # its port has just been another socket's: it is asked again
                        return await client("own.recv(100).decode()")

                assert question[::-1] == await until(answered, f"{asked} answers")
            assert {"uplink"} == await stage.where(source=asked, port=PORT, payload=b"two")
            await excluded("own.close()")
    assert {"uplink"} == await stage.where(payload=b"two")


async def test_a_port_that_was_redirected_is_the_one_that_answers(stage, excluded):
    """L38: connection tracking knows which it was."""
    stage.lab.host.nft(
        "table ip elsewhere {\n chain prerouting {\n type nat hook prerouting priority dstnat\n"
        f" udp dport 80 redirect to :{PORT}\n }}\n}}"
    )
    await excluded(f"{ANSWER}\nown = bound('::')", port=PORT)
    async with start_client(stage, "uplink") as client:
        await client("own = udp(to, 80); own.send(b'eno')", to=str(HOST[4]))
        await excluded("answer('every')")
        assert b"one" == await client("own.recv(100)")
    assert {"uplink"} == await stage.where(source=HOST[4], port=80, payload=b"one")


# Connections

LISTEN = "server = socket.create_server(('', port)); server.settimeout(3)"
DOOR = "door = socket.socket(socket.AF_UNIX); door.bind(path); door.listen()"
HAND_OVER = """
with socket.socket(socket.AF_UNIX) as way:
    way.connect(path)
    socket.send_fds(way, [b'!'], [accepted.fileno()])
accepted.close()
"""
TAKE = "way, _ = door.accept(); own = socket.socket(fileno=socket.recv_fds(way, 1, 1)[1][0]); own.settimeout(1)"


@SIDES
async def test_a_connection_is_judged_by_who_takes_it_not_by_its_listener(stage, name, side):
    """L27, L38: a server that hands a connection on before a word is said; the next connection is the control."""
    path = str(stage.lab.directory / "door")
    taker_name = "included" if name == "excluded" else "excluded"
    async with (
        stage.app(getattr(stage, name)) as server,
        stage.app(getattr(stage, taker_name)) as taker,
        start_client(stage, side) as client,
    ):
        await server(LISTEN, port=PORT)
        await taker(DOOR, path=path)
        await client("own = tcp(to, port)", to=str(ASKED[side][4]), port=PORT)
        await server(f"accepted, _ = server.accept()\n{HAND_OVER}", path=path)
        await taker(TAKE)
        with pytest.raises(OSError):  # noqa: PT011 - refused in whatever words
            await taker("own.sendall(b'whose am i'); own.recv(1); own.sendall(b'whose am i'); own.recv(1)")
        assert set() == await stage.where(payload=b"whose am i")

        await client("own = tcp(to, port)", to=str(ASKED[side][4]), port=PORT)
        await server("accepted, _ = server.accept(); accepted.sendall(b'mine')")
        assert b"mine" == await client("read_exactly(own, 4)")
        assert {side} == await stage.where(payload=b"mine")
        (flow,) = [flow for flow in await stage.daemon.flows() if flow["app"]["pid"] == server.pid]
        assert ("open", "exact") == (flow["state"], flow["attribution"])
        await server("accepted.close()")
        await client("own.recv(1); own.close()")
        (flow,) = [flow for flow in await stage.daemon.flows() if flow["app"]["pid"] == server.pid]
        assert "closing" == flow["state"]


async def test_a_server_may_be_gone_before_its_words_have_left(stage, client):
    """L38: a program that takes one connection, says something and ends is known by its listener."""
    code = (
        "import socket, sys; server = socket.create_server(('', 8080)); print('listens', flush=True)\n"
        "one, _ = server.accept(); server.close(); one.sendall(b'short'); one.close()"
    )
    for _ in range(5):
        async with stage.lab.host.start([stage.excluded, "-I", "-S", "-c", code]) as program:
            await program.wait_written("listens")
            await client("own = tcp(to, port)", to=str(HOST[4]), port=PORT)
            assert b"short" == await client("read_exactly(own, 5)")
            assert b"" == await client("own.recv(1)")
    assert {"uplink"} == await stage.where(payload=b"short")


SWITCHES = pytest.mark.parametrize(
    ("name", "verb", "old", "new", "version"),
    [("included", "add", "tunnel", "uplink", 4), ("excluded", "remove", "uplink", "tunnel", 6)],
)


@SWITCHES
async def test_a_switched_servers_connections_end_on_their_side(stage, name, verb, old, new, version):
    """L2, L3, L20: one that was accepted, one that still waits for that, and who asks by datagrams."""
    path = getattr(stage, name)
    async with (
        stage.app(path) as server,
        start_client(stage, old) as client,
        start_client(stage, new) as other,
    ):
        await server(SERVE, port=PORT)
        asked, peer = str(ASKED[old][version]), PEER[old][version]
        await client("own = tcp(to, port); waiting = tcp(to, port); other = udp(to, port)", to=asked, port=PORT)
        await client("own.sendall(b'before'); other.send(b'erofeb')")
        await server("accepted, _ = stream[version].accept(); accepted.sendall(accepted.recv(6))", version=version)
        await server("answer(version)")
        assert [b"before"] * 2 == await client("[read_exactly(own, 6), other.recv(100)]")

        await stage.daemon.command("app", verb, str(path))
        stage.clear()
        with pytest.raises(OSError, match=r"abort|reset|Broken pipe"):
            await server("accepted.sendall(b'after'); accepted.sendall(b'after')")
        for connection in ("own", "waiting"):  # both have heard of it, on the old side
            with pytest.raises(OSError, match="reset"):
                await client(f"{connection}.recv(1)")
        await client("other.send(b'retfa')")
        assert str(peer) == await server("answer(version)")
        await other("own = tcp(to, port)", to=str(ASKED[new][version]), port=PORT)
        with pytest.raises(OSError, match=r"abort|reset|Broken pipe"):
            await server("accepted, _ = stream[version].accept(); accepted.sendall(b'after')")
        await server("accepted, _ = stream[version].accept(); accepted.sendall(b'anew')")
        assert b"anew" == await other("read_exactly(own, 4)")
        assert {new} == await stage.where(payload=b"anew")
        assert set() == await stage.where(payload=b"after")
        assert set() == await stage.where(destination=peer, direction="out", port=PORT)


# Neighbours

LOCAL = {4: "192.168.50.2", 6: "fd50::2"}
NEIGHBOUR = {4: "192.168.50.1", 6: "fd50::1"}
ECHO_REPLY = {4: ("icmp", 0), 6: ("icmpv6", 129)}


# What a client and its server say to each other, each in its way.
TALK = {
    "tcp": ("own = tcp(to, port)", "accepted, _ = stream[version].accept(); accepted.sendall(b'!')"),
    "udp": ("own = udp(to, port); own.send(b'!')", "answer(version)"),
}


async def is_answered(client: App, server: App, way: str, to: object, port: int, *, patience_s: float) -> bool:
    """Whether a client reaches a server of the host in this way, or the host by an echo request."""
    try:
        if way == "echo":
            await client(f"socket.setdefaulttimeout({patience_s}); ask('echo', to)", to=str(to))
        else:
            asks, answers = TALK[way]
            await client(f"socket.setdefaulttimeout({patience_s}); {asks}", to=str(to), port=port)
            await server(answers, version=6 if ":" in str(to) else 4)
            await client("own.recv(1)")
    except OSError:
        return False
    return True


@pytest.mark.parametrize("allow", [False, True])
async def test_a_neighbour_reaches_an_included_server_where_the_local_network_is_shared(lab, allow):
    """L20, L25: by TCP, UDP and ping; an excluded server always, and nobody from farther away an included one."""
    lab.host.ip(f"address add {LOCAL[6]}/64 dev eth0 nodad")
    lab.router.ip(f"address add {NEIGHBOUR[6]}/64 dev lan0 nodad")
    async with (
        open_stage(lab, lan={"allow": allow}) as stage,
        stage.app(stage.included) as included,
        stage.app(stage.excluded) as excluded,
        start_app(lab.router, stage.included) as neighbour,
        start_client(stage, "uplink") as stranger,
    ):
        await included(SERVE, port=PORT)
        await excluded(SERVE, port=PORT + 1)

        async def answers(client, to):
            """Who answers: each server in each way, and the kernel."""
            ways = {(server, way): port for server, port in ((included, PORT), (excluded, PORT + 1)) for way in TALK}
            ways[excluded, "echo"] = 0
            found = set()
            for (server, way), port in ways.items():
                patience_s = 3 if (server, way) in hoped[client] else 0.3
                if await is_answered(client, server, way, to, port, patience_s=patience_s):
                    found.add((server, way))
            return found

        everybody = {(included, "tcp"), (included, "udp"), (excluded, "tcp"), (excluded, "udp"), (excluded, "echo")}
        listed = {(excluded, "tcp"), (excluded, "udp")}
        hoped = {neighbour: everybody if allow else listed, stranger: listed}
        for version in (4, 6):
            assert hoped[neighbour] == await answers(neighbour, LOCAL[version])
            assert ({"uplink"} if allow else set()) == await stage.where(source=LOCAL[version], port=PORT)
            assert hoped[stranger] == await answers(stranger, HOST[version])
            assert set() == await stage.where(destination=SERVER[version], direction="out", port=PORT)


@pytest.mark.attack("a ping, to find the host", "answered", "not answered")
async def test_the_host_answers_nobodys_ping(lab):
    """KERNEL facts: the kernel's own answers are of no app. Without tunsplit the uplink's address is answered for."""

    async def pinged(app, to):
        """Whether there is an answer on either wire."""
        with contextlib.suppress(OSError):
            await app("socket.setdefaulttimeout(0.3); ask('echo', to)", to=str(to))
        await where(lab)
        protocol, reply = ECHO_REPLY[to.version]
        seen = lab.uplink.seen(protocol) + lab.tunnel.seen(protocol)
        assert [one for one in seen if (one.direction, one.destination) == ("in", to)]
        return any((one.kind, one.direction) == (reply, "out") for one in seen)

    async with open_stage(lab) as stage, start_client(stage, "uplink") as far, start_client(stage, "tunnel") as relay:
        stage.clear()
        for version in (4, 6):
            assert not await pinged(far, HOST[version])
            assert not await pinged(relay, HOST_TUNNEL[version])
        await stage.daemon.terminate()
        for version in (4, 6):
            assert await pinged(far, HOST[version])
