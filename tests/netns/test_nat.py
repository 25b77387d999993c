"""What NAT does to real traffic (L22, L37): nothing that an app could tell, and nothing that a side must not carry."""

import errno

import pytest

from tests.netns.stage import HOST, HOST_TUNNEL, RELAY, ROUTER, SERVER, until
from tunsplit.lab import addresses

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])
SIDES = pytest.mark.parametrize(("name", "side"), [("excluded", "uplink"), ("included", "tunnel")])
OWN = {"uplink": HOST, "tunnel": HOST_TUNNEL}


@pytest.fixture
async def app(stage, name):
    async with stage.app(getattr(stage, name)) as running:
        yield running


def sent(stage, side, version, protocol=None):
    """What went to the server on this side."""
    return getattr(stage.lab, side).seen(protocol, destination=SERVER[version])


def know_path_mtu(stage):
    """Tell the server what it would learn by losing its first large answer to the tunnel: IPv6 routers cut nothing."""
    stage.lab.internet.ip(f"route replace {RELAY[6]} via {addresses.ROUTER_INTERNET[6].ip} mtu {addresses.TUNNEL_MTU}")


def ip_header(frame, side):
    """The packet in a frame of this side, from its IP header on."""
    return frame.frame[14:] if side == "uplink" else frame.frame


@SIDES
@BOTH
async def test_fragments_follow_their_flow_in_both_directions(stage, app, side, version):
    """L22: a datagram of 4000 octets, and one of 4000 octets and more in answer."""
    know_path_mtu(stage)
    await app(f"ask('udp', SERVER{version}, bytes(range(250)) * 16)")

    assert {side} == await stage.where(address=SERVER[version])
    frames = getattr(stage.lab, side).seen(address=SERVER[version])
    for direction in ("out", "in"):
        assert 3 <= sum(frame.fragment for frame in frames if frame.direction == direction)
    assert {OWN[side][version]} == {frame.source for frame in frames if frame.direction == "out"}


@SIDES
@BOTH
async def test_fragmented_echoes_too(stage, app, side, version):
    """L12, L22."""
    know_path_mtu(stage)
    await app(f"ask('echo', SERVER{version}, bytes(range(250)) * 16)")

    assert {side} == await stage.where(address=SERVER[version])
    assert {True} == {frame.fragment for frame in sent(stage, side, version)}


@SIDES
@BOTH
async def test_a_closed_port_of_the_server_is_a_refused_connection(stage, app, side, version):
    """L22: ICMP port unreachable finds its UDP socket, RST its TCP socket."""
    await app(f"own = udp(SERVER{version}, 9); own.send(b'is anybody there')")
    with pytest.raises(ConnectionRefusedError):
        await app("own.recv(100)")
    with pytest.raises(ConnectionRefusedError):
        await app(f"tcp(SERVER{version}, 9)")

    assert {side} == await stage.where(port=9)


@SIDES
async def test_one_socket_to_many_peers_keeps_one_outside_port(stage, app, side):
    """L11, RFC 4787 §4.1 (REQ-1): endpoint-independent mapping."""
    await app("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.bind(('', 0))")
    for peer in (SERVER[4], ROUTER[4]):
        await app("own.sendto(b'here i am', (peer, 7)); own.recv(100)", peer=str(peer))

    assert {side} == await stage.where(payload=b"here i am")
    frames = [frame for frame in getattr(stage.lab, side).seen(payload=b"here i am") if frame.direction == "out"]
    assert {SERVER[4], ROUTER[4]} == {frame.destination for frame in frames}
    assert 1 == len({frame.source_port for frame in frames})


@SIDES
async def test_ipv4_options_stay_behind(stage, app, side):
    """L37: record route would write the tun's address into the packet."""
    options = bytes((7, 11, 4, *bytes(8), 0))
    assert 12 == len(options)
    await app("own = udp(SERVER4)")
    await app(f"own.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, {options!r}); own.send(b'optional')")
    assert b"optional" == await app("own.recv(100).split(b'\\n')[1]")

    assert {side} == await stage.where(address=SERVER[4])
    assert [0x45] == [ip_header(frame, side)[0] for frame in sent(stage, side, 4)]


@SIDES
async def test_ipv6_destination_options_pass(stage, app, side):
    """RFC 8200 §4.6: they are the destination's."""
    await app("own = udp(SERVER6)")
    await app("own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes((0, 0, 1, 4, 0, 0, 0, 0)))")
    await app("own.send(b'optional')")
    assert b"optional" == await app("own.recv(100).split(b'\\n')[1]")

    assert {side} == await stage.where(address=SERVER[6])
    assert [60] == [ip_header(frame, side)[6] for frame in sent(stage, side, 6)]


@SIDES
async def test_a_udp_checksum_of_zero_stays_zero(stage, app, side):
    """RFC 768: none was computed, and none is made up."""
    await app("own = udp(SERVER4); own.setsockopt(socket.SOL_SOCKET, 11, 1); own.send(b'unchecked')")  # SO_NO_CHECK
    assert b"unchecked" == await app("own.recv(100).split(b'\\n')[1]")

    assert {side} == await stage.where(address=SERVER[4])
    assert [bytes(2)] == [ip_header(frame, side)[26:28] for frame in sent(stage, side, 4)]


@SIDES
@BOTH
async def test_a_super_packet_of_datagrams_arrives_as_datagrams(stage, app, side, version):
    """UDP_SEGMENT, as QUIC sends."""
    await app(f"own = udp(SERVER{version}); own.setsockopt(socket.SOL_UDP, 103, 1000)")
    await app("own.send(b''.join(bytes([65 + number]) * 1000 for number in range(7)) + b'end')")
    answers = await app("[own.recv(2048).split(b'\\n')[1] for _ in range(8)]")

    assert [*(bytes([65 + number]) * 1000 for number in range(7)), b"end"] == answers
    assert {side} == await stage.where(address=SERVER[version])


@SIDES
@BOTH
async def test_a_large_transfer_arrives_as_it_was_sent(stage, app, side, version):
    """Super-packets in both directions."""
    await app(
        f"import hashlib, threading\nown = tcp(SERVER{version}); read_line(own)\ndata = os.urandom(2_000_000)\n"
        "thread = threading.Thread(target=own.sendall, args=(data,)); thread.start()\n"
        "back = read_exactly(own, len(data)); thread.join()"
    )
    assert await app("back == data")
    assert {side} == await stage.where(address=SERVER[version])


@SIDES
@BOTH
async def test_the_server_s_end_of_a_connection_is_the_app_s_too(stage, app, side, version):
    """RFC 5382 §4: FIN passes both ways, and the port rests then."""
    await app(f"own = tcp(SERVER{version}, 80); own.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')")
    seen = {"uplink": HOST, "tunnel": RELAY}[side][version]
    assert (await app("own.makefile().read()")).endswith(f"\n{seen}\n")
    assert "closing" != (await stage.flow_of(app))["state"]
    await app("own.close()")

    async def is_closed():
        return [flow for flow in await stage.daemon.flows() if flow["state"] == "closing"]

    assert await until(is_closed, "both ends are closed")
    assert {side} == await stage.where(address=SERVER[version])


@SIDES
@BOTH
async def test_a_reset_reaches_the_server(stage, app, side, version):
    """RFC 5382 §4."""
    await app(f"own = tcp(SERVER{version}); read_line(own)")
    await app("own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); own.close()")

    async def is_closed():
        return [flow for flow in await stage.daemon.flows() if flow["state"] == "closing"]

    await until(is_closed, "the flow is closed")
    assert {side} == await stage.where(address=SERVER[version])
    at = (20 if version == 4 else 40) + 13
    assert ip_header(sent(stage, side, version, "tcp")[-1], side)[at] & 4


@BOTH
async def test_a_destination_on_the_link_is_sent_frames_of_its_own(stage, excluded, version):
    """L25: not by way of the gateway."""
    neighbour = {4: "192.168.50.77", 6: "2001:db8:50::77"}[version]
    stage.lab.host.ip(f"neighbour replace {neighbour} lladdr 02:00:00:00:00:77 dev eth0")
    await excluded("own = udp(neighbour); own.send(b'hello neighbour')", neighbour=neighbour)

    async def seen():
        return await stage.where(payload=b"hello neighbour")

    assert {"uplink"} == await until(seen, "the datagram has left")
    (frame,) = stage.lab.uplink.seen(payload=b"hello neighbour")
    assert "020000000077" == frame.frame[:6].hex()


@BOTH
async def test_a_neighbour_that_is_not_there_is_unreachable(stage, excluded, version):
    """L14 "no hanging": the app is told as soon as the kernel has given up."""
    neighbour = {4: "192.168.50.99", 6: "2001:db8:50::99"}[version]
    stage.lab.host.sysctl({f"net/ipv{version}/neigh/eth0/retrans_time_ms": 100})
    with pytest.raises(OSError) as failure:  # noqa: PT011 - errno says which
        await excluded("tcp(neighbour)", neighbour=neighbour)

    assert errno.EHOSTUNREACH == failure.value.errno
    assert {"uplink"} == await stage.where(destination=neighbour)  # asked for by ARP or NDP
    assert [] == stage.lab.uplink.seen("tcp", destination=neighbour)
