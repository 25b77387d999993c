"""What other programs send by packet sockets, below IP: nothing of it leaves but what a link needs (L26, L33).

The netdev table comes back when somebody takes it away, follows the devices, outlives the daemon, and goes at the end.
"""

import pytest

from tests.craft import udp
from tests.netns.stage import HOST, HOST_TUNNEL, RELAY, ROUTER, SERVER, open_stage, until
from tests.netns.test_tunnel_life import flows_again

pytestmark = pytest.mark.netns

TABLE = "netdev tunsplit"
REFUSED = "ENOBUFS"

# In an app: one frame, past IP; with `bypass` past the device's queue, too.
SEND = """
SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
def send(device, protocol, frame, bypass=False):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as own:
        own.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, int(bypass))
        try:
            own.sendto(bytes.fromhex(frame), (device, protocol))
        except OSError as error:
            return errno.errorcode[error.errno]
    return "sent"
"""

ETHERTYPE = {4: 0x0800, 6: 0x86DD}
ARP, EAPOL = 0x0806, 0x888E
DISCOVER = udp("0.0.0.0:68 > 255.255.255.255:67", b"discover")


async def raw_frame(stage, protocol, payload):
    """A frame from the host to everybody."""
    return (b"\xff" * 6 + await stage.mac() + protocol.to_bytes(2, "big") + payload).ljust(60, b"\0").hex()


async def arp_request(stage):
    """Who has the router's address."""
    own = await stage.mac() + HOST[4].packed
    return await raw_frame(stage, ARP, bytes.fromhex("0001080006040001") + own + bytes(6) + ROUTER[4].packed)


def datagram(source, version, payload):
    own, server = ((f"{one[version]}" if version == 4 else f"[{one[version]}]") for one in (source, SERVER))
    return udp(f"{own}:4000 > {server}:7", payload)


async def send_below(stage, app, version, *, bypass=False, payload=b"below"):
    """What an app hears of a datagram past IP, by the uplink."""
    frame = await raw_frame(stage, ETHERTYPE[version], datagram(HOST, version, payload))
    return await app(f"send('eth0', {ETHERTYPE[version]}, frame, {bypass})", frame=frame)


async def send_inside(app, version):
    """The same by the tunnel, which has no link layer."""
    packet = datagram(HOST_TUNNEL, version, b"inside").hex()
    return await app(f"send('wg0', {ETHERTYPE[version]}, frame)", frame=packet)


@pytest.mark.attack("frames by packet sockets (nmap, scapy)", "they leave beside the tunnel", "refused")
async def test_what_comes_from_packet_sockets_leaves_only_where_the_link_needs_it(lab):
    """Whose an app is makes no difference; both apps' flows go on. The control is the same without the table."""
    async with open_stage(lab) as stage, stage.app(stage.included) as included, stage.app(stage.excluded) as excluded:
        for app in (included, excluded):
            await app(SEND)

        async def closed():
            for version in (4, 6):
                for bypass in (False, True):
                    if REFUSED != await send_below(stage, included, version, bypass=bypass):
                        return False
                if REFUSED != await send_inside(excluded, version):
                    return False
            return True

        assert await closed()
        for protocol, frame in (
            (ARP, await arp_request(stage)),
            (EAPOL, await raw_frame(stage, EAPOL, b"\2\1\0\0")),
            (ETHERTYPE[4], await raw_frame(stage, ETHERTYPE[4], DISCOVER)),
        ):
            assert "sent" == await included(f"send('eth0', {protocol}, frame)", frame=frame)
        for version in (4, 6):
            assert str(HOST[version]) == await excluded(f"ask('tcp', SERVER{version})")
            assert str(RELAY[version]) == await included(f"ask('tcp', SERVER{version})")
        assert set() == await stage.where(payload=b"below") | await stage.where(payload=b"inside")
        assert {"uplink"} == await stage.where(protocol="udp", payload=b"discover")
        assert lab.uplink.seen("arp", destination=ROUTER[4], source=HOST[4])
        assert "packets 6 " in (await lab.host.run(["nft", "list", "counter", *TABLE.split(), "rejected"])).stdout

        restored = await stage.counter("restored_tables")
        await lab.host.run(["nft", "delete", "table", *TABLE.split()])

        async def is_restored():
            return await stage.counter("restored_tables") > restored

        await until(is_restored, "the table is back")
        assert await closed()
        await lab.remove_tunnel()
        await lab.create_tunnel()
        await until(lambda: _tunnel_is_up(stage), "the tunnel is back")
        assert await closed()
        assert await flows_again(stage, included)

        await stage.daemon.kill()
        assert await closed()
        await lab.host.run(["nft", "delete", "table", *TABLE.split()])
        for version in (4, 6):
            assert "sent" == await send_below(stage, included, version, payload=b"control")
            assert "sent" == await send_inside(excluded, version)
        assert {"uplink"} == await stage.where(payload=b"control")
        assert {"tunnel"} == await stage.where(payload=b"inside")
        assert 0 == (await stage.daemon.command("undo")).returncode


async def test_who_has_a_socket_below_ip_is_shown(stage, included):
    """L33: packet sockets by device and program, XDP sockets by their number; our own are none of them."""

    async def shown():
        return (await stage.daemon.status())["link_sockets"]

    assert [] == await shown()
    await included("bound = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); bound.bind(('eth0', 0x0800))")
    await included("xdp = socket.socket(44, socket.SOCK_RAW)")
    app = {"pid": included.pid, "exe": str(stage.included), "user": 0}
    packet, xdp = {"kind": "packet", "interface": "eth0", "app": app}, {"kind": "xdp", "interface": None, "app": None}

    async def both():
        return [packet, xdp] == await shown()

    await until(both, "both are shown")
    assert (
        f"note     {stage.included}, process {included.pid} of user 0 has a packet socket on eth0"
        in (await stage.daemon.command("status")).stdout
    )
    await included("bound.close(); xdp.close()")

    async def neither():
        return not await shown()

    await until(neither, "none is shown any more")


async def _tunnel_is_up(stage):
    return (await stage.daemon.status())["tunnel"]["up"]
