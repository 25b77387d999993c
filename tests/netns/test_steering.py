"""Nothing but the app decides on the side: no address, device, route, rule or filter (L9, L10, L25, L36)."""

import contextlib

import pytest

from tests.netns.stage import HOST, HOST_TUNNEL, REFUSED, RELAY, ROUTER, SERVER, TUN, open_stage, start_app, where
from tunsplit.lab import open_lab

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])
SEEN = {"uplink": HOST, "tunnel": RELAY}
SIDE = {"excluded": "uplink", "included": "tunnel"}
NAMES = pytest.mark.parametrize("name", SIDE)


@pytest.fixture
async def app(stage, name):
    async with stage.app(getattr(stage, name)) as running:
        yield running


async def assert_split(stage, versions=(4, 6)):
    """Both apps are where they belong."""
    for name, side in SIDE.items():
        async with stage.app(getattr(stage, name)) as app:
            for version in versions:
                stage.clear()
                assert str(SEEN[side][version]) == await app(f"ask('tcp', SERVER{version})")
                assert str(SEEN[side][version]) == await app(f"ask('udp', SERVER{version})")
                await app(f"ask('echo', SERVER{version})")
                assert {side} == await stage.where(address=SERVER[version])


# What an app may ask for


@NAMES
@BOTH
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_the_address_that_an_app_binds_does_not_move_it(stage, app, name, version, protocol):
    """L10: bound to an address of either side, it leaves on its own and works."""
    for source in (HOST[version], HOST_TUNNEL[version]):
        await app(f"own = {protocol}(SERVER{version}, 7, source); own.send(b'hello')", source=str(source))
        assert (await app("own.recv(100)")).startswith(f"{SEEN[SIDE[name]][version]} ".encode())
    assert {SIDE[name]} == await stage.where(address=SERVER[version])


ON_LINK = {4: "192.168.50.77", 6: "2001:db8:50::77"}


@pytest.mark.attack("a socket bound to a side's device", "asks and sends there", "refused, before ARP")
@NAMES
@BOTH
@pytest.mark.parametrize("device", ["eth0", "wg0"])
@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
async def test_a_socket_bound_to_a_sides_device_sends_nothing_at_all(stage, app, version, device, kind):
    """L10, L36: refused, without ARP or neighbour solicitation that names the destination."""
    for destination in (str(SERVER[version]), ON_LINK[version]):
        with pytest.raises(OSError, match=REFUSED):
            await app(
                "with socket.socket(family(destination), getattr(socket, kind)) as own:\n"
                "    own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())\n"
                "    own.connect((destination, 7)); own.send(b'?'); own.recv(100)",
                destination=destination, device=device, kind=kind,
            )  # fmt: skip
        assert set() == await stage.where(destination=destination)


async def test_without_tunsplit_such_a_socket_does_ask_for_its_destination(lab):
    """The control: the observer would have seen it."""
    async with start_app(lab.host, lab.copy_program("python", "app")) as app:
        await app(
            "own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0')\n"
            "own.sendto(b'?', (destination, 7))",
            destination=ON_LINK[4],
        )
        assert {"uplink"} == await where(lab, destination=ON_LINK[4])


NAME_A_DEVICE = {
    # IP_UNICAST_IF, which systemd-resolved sets, IP_PKTINFO and IP_MULTICAST_IF; the same of IPv6, and a scope id.
    ("unicast", 4): "own.setsockopt(0, 50, struct.pack('!i', index)); own.sendto(b'named', (to, 7))",
    ("unicast", 6): "own.setsockopt(41, 76, struct.pack('!i', index)); own.sendto(b'named', (to, 7))",
    ("info", 4): "own.sendmsg([b'named'], [(0, 8, struct.pack('=i8x', index))], 0, (to, 7))",
    ("info", 6): "own.sendmsg([b'named'], [(41, 50, struct.pack('=16xi', index))], 0, (to, 7))",
    ("multicast", 4): "own.setsockopt(0, 32, struct.pack('=8xi', index)); own.sendto(b'named', (to, 7))",
    ("multicast", 6): "own.setsockopt(41, 17, struct.pack('=i', index)); own.sendto(b'named', (to, 7))",
    ("scope", 6): "own.sendto(b'named', (to, 7, 0, index))",
}
OPTIONS = pytest.mark.parametrize(("option", "version"), NAME_A_DEVICE)


async def send_named(app, option, version, to, device):
    """Have an app send a datagram that names a device."""
    await app(
        f"own = socket.socket(family(to), socket.SOCK_DGRAM); index = socket.if_nametoindex(device)\n"
        f"{NAME_A_DEVICE[option, version]}",
        to=str(to), device=device,
    )  # fmt: skip


@pytest.mark.attack("a datagram that names a side's device", "leaves there", "leaves on its app's side")
@NAMES
@OPTIONS
@pytest.mark.parametrize("device", ["eth0", "wg0"])
async def test_a_device_that_a_datagram_names_does_not_move_it(stage, app, name, option, version, device):
    """L10, L36: it goes into the tun like any other, without ARP or neighbour solicitation for its destination."""
    await send_named(app, option, version, SERVER[version], device)
    assert (await app("own.recv(100)")).startswith(f"{SEEN[SIDE[name]][version]} ".encode())
    assert {SIDE[name]} == await stage.where(payload=b"named")

    await send_named(app, option, version, ON_LINK[version], device)
    assert str(SEEN[SIDE[name]][version]) == await app(f"ask('udp', SERVER{version})")  # what came before is judged
    if name == "included":
        assert {"tunnel"} == await stage.where(destination=ON_LINK[version], direction="out")


@BOTH
@pytest.mark.parametrize("option", ["unicast", "info"])
async def test_without_tunsplit_a_device_that_a_datagram_names_does_move_it(lab, option, version):
    """The control: the observers would have seen it leave there."""
    async with start_app(lab.host, lab.copy_program("python", "app")) as app:
        await send_named(app, option, version, SERVER[version], "eth0")
        assert {"uplink"} == await where(lab, destination=SERVER[version], direction="out")


@BOTH
async def test_an_echo_request_that_names_a_device_is_steered_too(stage, included, version):
    """L10, L12."""
    await included(
        "own = ping(to); own.setsockopt(*option, struct.pack('!i', socket.if_nametoindex('eth0'))); echo(own)",
        to=str(SERVER[version]), option=(0, 50) if version == 4 else (41, 76),
    )  # fmt: skip
    assert {"tunnel"} == await stage.where(address=SERVER[version])


LINK_LOCAL = "fe80::77"


@NAMES
@pytest.mark.parametrize("option", ["unicast", "info", "scope"])
async def test_a_link_local_address_is_nobodys_but_the_local_networks(stage, app, name, option):
    """L36: without its sharing, no neighbour is asked for it."""
    with pytest.raises(OSError, match=REFUSED):
        await send_named(app, option, 6, LINK_LOCAL, "eth0")
    assert str(SEEN[SIDE[name]][6]) == await app("ask('udp', SERVER6)")
    assert set() == await stage.where(destination=LINK_LOCAL)


# What the host may look like


@pytest.mark.parametrize("mode", [0, 1, 2])
async def test_every_reverse_path_filter_will_do(mode):
    """KERNEL facts: strict drops what comes in for a mark, unless the mark takes part in the look-up."""
    async with open_lab(rp_filter=mode) as lab, open_stage(lab) as stage:
        await assert_split(stage)


@pytest.mark.lab(ipv6=False)
async def test_a_host_without_ipv6_is_split_all_the_same(stage, excluded):
    """SPEC.md, "Families": what is switched off stays off."""
    await assert_split(stage, versions=(4,))
    with pytest.raises(OSError):  # noqa: PT011 - the kernel's word for "no such family here"
        await excluded("tcp(SERVER6)")
    assert "" == (await stage.lab.host.run(["ip", "-6", "address"])).stdout


async def test_others_rules_routes_and_tables_stay_and_change_nothing(lab):
    """SPEC.md, "Robustness": they come after ours, and are there when we are gone."""
    lab.host.ip(
        "rule add priority 100 lookup 100\nroute add default via 192.168.50.1 dev eth0 table 100\n"
        "rule add priority 200 fwmark 0x1/0x1 lookup 100\nrule add priority 300 uidrange 0-0 lookup main\n"
        "route add ::/0 dev wg0 table 100\nroute add 198.51.100.0/25 dev wg0\n"
        f"route add {SERVER[6]} via 2001:db8:50::1 dev eth0"
    )
    await lab.host.run(["ip", "-6", "rule", "add", "priority", "100", "lookup", "100"])
    lab.host.nft("table ip others {\n chain output {\n type filter hook output priority 0; counter accept;\n }\n}\n")
    show = ["sh", "-c", "ip rule; ip -6 rule; ip route show table all; nft -s list ruleset"]
    before = (await lab.host.run(show)).stdout
    async with open_stage(lab) as stage:
        await assert_split(stage)
    assert before == (await lab.host.run(show)).stdout


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", *map(str, (*HOST.values(), *HOST_TUNNEL.values()))])
async def test_loopback_and_own_addresses_are_never_touched(stage, excluded, included, address):
    """L9: between apps of both sides, and on no wire."""
    await excluded(
        "server = socket.create_server((own, 7000), family=family(own))\n"
        "udp_server = socket.socket(family(own), socket.SOCK_DGRAM); udp_server.bind((own, 7000))",
        own=address,
    )
    await included("client = tcp(own, 7000); client.sendall(b'by loopback')", own=address)
    assert b"by loopback" == await excluded("server.accept()[0].recv(100)")
    await included("udp_client = udp(own, 7000); udp_client.send(b'by loopback')")
    assert address == await excluded("udp_server.recvfrom(100)[1][0]")
    await included("ask('echo', own)")

    assert [] == await stage.daemon.flows()
    assert set() == await stage.where(payload=b"by loopback")
    assert set() == await stage.where(address=address, port=7000)


# The local network


@BOTH
async def test_the_local_network_is_the_excluded_apps_alone(stage, excluded, included, version):
    """SPEC.md, "Splitting rules": sharing off binds included apps, whose packets go by the tunnel or nowhere."""
    assert str(HOST[version]) == await excluded(f"ask('udp', ROUTER{version}, b'from excluded')")
    assert {"uplink"} == await stage.where(address=ROUTER[version], payload=b"from excluded")
    assert str(RELAY[version]) == await included(f"ask('udp', ROUTER{version}, b'from included')")
    assert {"tunnel"} == await stage.where(payload=b"from included")


async def test_local_network_sharing_lets_included_apps_reach_it(lab):
    """L25: the uplink's own private network, and nothing else."""
    async with open_stage(lab, lan={"allow": True}) as stage, stage.app(stage.included) as app:
        assert str(HOST[4]) == await app("ask('tcp', ROUTER4)")
        assert str(HOST[4]) == await app("ask('udp', ROUTER4)")
        assert {"uplink"} == await stage.where(address=ROUTER[4])
        assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")
        assert {"tunnel"} == await stage.where(address=SERVER[4])


async def test_dhcp_is_never_swallowed(stage, included):
    """SPEC.md: DHCP always; a renewal to the server, and a broadcast from a socket bound to the device."""
    await included("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.bind(('', 68))")
    await included("own.sendto(b'renewal', (ROUTER4, 67))")
    assert {"uplink"} == await stage.where(port=67, payload=b"renewal")
    (frame,) = stage.lab.uplink.seen("udp", payload=b"renewal")
    assert HOST[4] == frame.source
    await included(
        "own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0')\n"
        "own.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)\nown.sendto(b'discover', ('255.255.255.255', 67))"
    )
    assert {"uplink"} == await stage.where(port=67, payload=b"discover")


MULTICAST = "own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.sendto(b'to many', ('239.1.2.3', 5353))"
MULTICAST6 = (
    "own = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)\n"
    "own.sendto(b'to many', ('ff02::fb', 5353, 0, socket.if_nametoindex('eth0')))"
)


@pytest.mark.parametrize("code", [MULTICAST, MULTICAST6], ids=["v4", "v6"])
async def test_multicast_of_an_included_app_goes_nowhere(stage, included, code):
    """L25, L36."""
    with contextlib.suppress(OSError):  # refused at once is as good
        await included(code)
    assert str(RELAY[4]) == await included("ask('udp', SERVER4)")  # whatever waited before has been judged
    assert set() == await stage.where(payload=b"to many")


@pytest.mark.parametrize("code", [MULTICAST, MULTICAST6], ids=["v4", "v6"])
async def test_multicast_stays_local_where_the_local_network_is_shared(lab, code):
    """SPEC.md, "Firewall": link-local and administrative scope, on the uplink."""
    async with open_stage(lab, lan={"allow": True}) as stage, stage.app(stage.included) as app:
        await app(code)
        assert {"uplink"} == await stage.where(payload=b"to many")


async def test_the_tun_is_on_the_host_and_nowhere_else(stage):
    """Negative control of all of the above: there is a tun, and it is what carries them."""
    assert TUN in (await stage.lab.host.run(["ip", "route", "get", str(SERVER[4])])).stdout
