"""L17, L32: what apps ask at port 53 goes by the table, wherever they address it."""

from ipaddress import ip_address

import pytest

from tests.netns.questions import ASKING, NAME
from tests.netns.stage import HOST, REFUSED, ROUTER, open_stage
from tunsplit.lab.addresses import LAN_RESOLVER, PUBLIC_RESOLVER, RELAY_RESOLVER
from tunsplit.lab.resolvers import start

PROTOCOLS = pytest.mark.parametrize("protocol", ["udp", "tcp"])
VERSIONS = pytest.mark.parametrize("version", [4, 6])
APPS = pytest.mark.parametrize("name", ["excluded", "included"])
NOWHERE = {4: "203.0.113.253", 6: "2001:db8:113::253"}
PUBLIC = {"custom": [str(PUBLIC_RESOLVER[4])]}
LAN = {"custom": [str(LAN_RESOLVER[4])]}


@pytest.fixture
async def app(stage, name):
    async with stage.app(getattr(stage, name)) as started:
        await started(ASKING)
        yield started


async def asking(stage, app):
    await app(ASKING)
    return app


@APPS
@VERSIONS
@PROTOCOLS
async def test_whatever_is_addressed_the_relay_answers_in_the_tunnel(stage, app, version, protocol):
    """A public resolver, the router's, the relay's own, and an address that nobody has."""
    for asked in (PUBLIC_RESOLVER[version], ROUTER[version], NOWHERE[version], RELAY_RESOLVER[version]):
        assert "relay" == await app("who(asked, protocol)", asked=str(asked), protocol=protocol)
    assert {"tunnel"} == await stage.where(port=53)
    assert {"tunnel"} == await stage.where(destination=RELAY_RESOLVER[4], port=53)


async def test_without_tunsplit_the_same_questions_leave_where_they_are_addressed(lab):
    """The negative control: the lab's resolvers can all be reached, and tell who they are."""
    async with open_stage(lab) as stage:
        pass
    async with stage.app(stage.included) as app:
        await app(ASKING)
        assert "public" == await app("who(asked)", asked=str(PUBLIC_RESOLVER[4]))
        assert "lan" == await app("who(asked, 'tcp')", asked=str(LAN_RESOLVER[4]))
    assert {"uplink"} == await stage.where(port=53)


@VERSIONS
@PROTOCOLS
async def test_each_app_asks_on_the_route_of_its_row(lab, version, protocol):
    """Platform `linux`, public custom: an excluded app asks outside, all others in the tunnel."""
    async with open_stage(lab, dns=PUBLIC) as stage:
        for name, side in (("excluded", "uplink"), ("included", "tunnel")):
            stage.clear()
            async with stage.app(getattr(stage, name)) as app:
                await app(ASKING)
                assert "public" == await app("who(asked, protocol)", asked=NOWHERE[version], protocol=protocol)
            assert {side} == await stage.where(payload=NAME)
            assert {side} == await stage.where(destination=PUBLIC_RESOLVER[4], port=53)


@PROTOCOLS
async def test_a_private_resolver_is_asked_on_the_local_network_by_everybody(lab, protocol):
    async with open_stage(lab, dns=LAN) as stage:
        for name in ("excluded", "included"):
            stage.clear()
            async with stage.app(getattr(stage, name)) as app:
                await app(ASKING)
                assert "lan" == await app("who(asked, protocol)", asked=str(PUBLIC_RESOLVER[4]), protocol=protocol)
        assert {"uplink"} == await stage.where(port=53)


@PROTOCOLS
async def test_the_routers_resolver_is_no_way_out_where_the_local_network_is_shared(lab, protocol):
    """Port 53 comes before the local network."""
    async with open_stage(lab, lan={"allow": True}) as stage, stage.app(stage.included) as app:
        await app(ASKING)
        assert str(HOST[4]) == await app("ask('udp', ROUTER4)")  # the local network is open, else
        assert "relay" == await app("who(asked, protocol)", asked=str(LAN_RESOLVER[4]), protocol=protocol)
        assert {"tunnel"} == await stage.where(port=53)


@APPS
@VERSIONS
@pytest.mark.parametrize("allow", [True, False], ids=["shared", "closed"])
async def test_a_raw_socket_does_not_slip_past(lab, name, version, allow):
    """KERNEL facts: its look-up has no ports, so the rule about port 53 does not see it."""
    if version == 6:
        lab.host.ip("address add fd50::2/64 dev eth0 nodad")
    target = str(LAN_RESOLVER[version])
    source = {4: str(HOST[4]), 6: "fd50::2"}[version]
    async with open_stage(lab, lan={"allow": allow}) as stage, stage.app(getattr(stage, name)) as app:
        await app(ASKING)
        assert "relay" == await app("told(raw(source, target, question()))", source=source, target=target)
        assert "uplink" not in await stage.where(port=53)


@APPS
@PROTOCOLS
async def test_an_encrypted_question_is_refused_unless_the_table_has_its_resolver(stage, app, protocol):
    """Also on the local network: 853 is no way round."""
    for asked in (PUBLIC_RESOLVER[4], ROUTER[4]):
        with pytest.raises(OSError, match=REFUSED):
            await app("who(asked, protocol, port=853)", asked=str(asked), protocol=protocol)
    assert set() == await stage.where(port=853)


async def test_an_encrypted_question_leaves_on_the_side_of_its_row(lab):
    """Nobody answers there: it is the router's and the relay's refusal that comes back, from that side."""
    async with open_stage(lab, dns=PUBLIC) as stage:
        for name, side in (("excluded", "uplink"), ("included", "tunnel")):
            stage.clear()
            async with stage.app(getattr(stage, name)) as app:
                with pytest.raises(ConnectionRefusedError):
                    await app("tcp(asked, 853)", asked=str(PUBLIC_RESOLVER[4]))
            assert {side} == await stage.where(port=853)


@PROTOCOLS
async def test_only_listed_resolvers_are_taken_if_so_configured(lab, protocol):
    async with open_stage(lab, dns={"intercept": "listed"}) as stage:
        async with stage.app(stage.included) as app:
            await app(ASKING)
            assert "relay" == await app("who(asked, protocol)", asked=str(RELAY_RESOLVER[4]), protocol=protocol)
            with pytest.raises(OSError, match=REFUSED):
                await app("who(asked, protocol)", asked=str(PUBLIC_RESOLVER[4]), protocol=protocol)
        assert {"tunnel"} == await stage.where(port=53)
        stage.clear()
        async with stage.app(stage.excluded) as app:
            await app(ASKING)
            assert "public" == await app("who(asked, protocol)", asked=str(PUBLIC_RESOLVER[4]), protocol=protocol)
        assert {"uplink"} == await stage.where(destination=PUBLIC_RESOLVER[4])


@PROTOCOLS
async def test_with_the_tunnel_down_a_question_fails_at_once(stage, excluded, included, protocol):
    stage.lab.tunnel_down()
    for app in (await asking(stage, excluded), await asking(stage, included)):
        assert "SERVFAIL" == await app("who(asked, protocol)", asked=str(PUBLIC_RESOLVER[4]), protocol=protocol)
    assert set() == await stage.where(port=53)


async def test_several_questions_share_a_connection(stage, included):
    """RFC 7766: asked in one go, answered in whatever order."""
    await included(ASKING)
    await included("own = tcp(asked, 53)", asked=str(PUBLIC_RESOLVER[4]))
    await included("own.sendall(b''.join(framed(question(number)) for number in range(1000)))")
    numbers = await included("[int.from_bytes(unframed(own)[:2], 'big') for _ in range(1000)]")
    assert list(range(1000)) == sorted(numbers)


async def test_one_socket_asks_many(stage, included):
    """The answer comes from whom it was asked of."""
    await included(ASKING)
    await included("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    await included("peers = [f'198.51.100.{number}' for number in range(1, 65)]")
    await included("for number, peer in enumerate(peers): own.sendto(question(number), (peer, 53))")
    answers = await included("[(own.recvfrom(4096)) for _ in peers]")
    heard = {int.from_bytes(answer[:2], "big"): sender for answer, sender in answers}
    assert {number: (f"198.51.100.{number + 1}", 53) for number in range(64)} == heard
    assert {"tunnel"} == await stage.where(port=53)


NAME_A_DEVICE = {
    # IP_UNICAST_IF, as systemd-resolved sets it for the resolvers of a link; IP_PKTINFO.
    "unicast": "own.setsockopt(0, 50, struct.pack('!i', index)); own.sendto(question(), (asked, 53))",
    "info": "own.sendmsg([question()], [(0, 8, struct.pack('=i8x', index))], 0, (asked, 53))",
}


@APPS
@pytest.mark.parametrize("device", ["eth0", "wg0"])
@pytest.mark.parametrize("option", ["unicast", "info"])
async def test_a_question_that_names_a_device_is_answered_all_the_same(stage, app, device, option):
    """L36: a stock systemd-resolved keeps working; the device that it names does not decide."""
    await app(
        "index = socket.if_nametoindex(device); own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", device=device
    )
    await app(NAME_A_DEVICE[option], asked=str(LAN_RESOLVER[4]))
    assert "relay" == await app("told(own.recv(4096))")
    assert {"tunnel"} == await stage.where(port=53)


@pytest.mark.parametrize("device", ["eth0", "wg0"])
async def test_a_question_of_a_socket_bound_to_a_device_is_refused(stage, excluded, device):
    await excluded(ASKING)
    await excluded("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    await excluded("own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())", device=device)
    with pytest.raises(OSError, match=REFUSED):
        await excluded("own.connect((asked, 53)); own.send(question()); own.recv(4096)", asked=str(LAN_RESOLVER[4]))
    assert set() == await stage.where(port=53)


@PROTOCOLS
async def test_what_is_asked_on_loopback_is_not_ours(stage, included, excluded, protocol):
    """L9: a resolver of the host's own answers by itself."""
    async with start(stage.lab.host, "own", [ip_address("127.0.0.1")]):
        assert "own" == await (await asking(stage, included))("who('127.0.0.1', protocol)", protocol=protocol)
        assert "own" == await (await asking(stage, excluded))("who('127.0.0.1', protocol)", protocol=protocol)
    assert 0 == await stage.counter("dns_questions")


async def test_our_own_way_out_is_nobody_elses(stage, excluded):
    """L33: the mark of a side lets the daemon's user alone pass; who is another is steered into the tun."""
    await excluded(ASKING)
    # A socket is its creator's, whoever marks it (SO_MARK).
    await excluded("os.seteuid(65534); own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); os.seteuid(0)")
    await excluded("own.setsockopt(socket.SOL_SOCKET, 36, 0x7501)")
    await excluded("own.sendto(question(), (asked, 53))", asked=str(LAN_RESOLVER[4]))
    assert "relay" == await excluded("told(own.recv(4096))")
    assert {"tunnel"} == await stage.where(port=53)
