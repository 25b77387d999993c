"""Every interface but loopback and the tun is closed unless it is opened by name (L26, L31, L36)."""

import contextlib
import os
import signal
from collections.abc import AsyncIterator

import pytest
import trio

from tests.netns.stage import HOST, HOST_TUNNEL, REFUSED, RELAY, SERVER, TUN, Stage, open_stage, start_app, until, where
from tests.netns.third import DEVICE, NEIGHBOUR, NOBODY, OWN, open_third, plug, sent
from tunsplit.lab.observer import Observer

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])
TUN4 = "10.128.0.1"


@pytest.fixture
async def third(lab) -> AsyncIterator[Observer]:
    """Build the third network before tunsplit starts."""
    async with open_third(lab) as observer:
        yield observer


@pytest.fixture
async def stage(lab, third) -> AsyncIterator[Stage]:
    """Run tunsplit in a host that has a third interface."""
    async with open_stage(lab) as opened:
        yield opened


# What an app can do to send there, each on a line of its own.
WAYS = {
    "plain": "own.sendto(b'elsewhere', (to, 7))",
    "own address": "own.bind((source, 0)); own.sendto(b'elsewhere', (to, 7))",
    "device": "own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth1'); own.sendto(b'elsewhere', (to, 7))",
    "unicast": "own.setsockopt(*option, struct.pack('!i', index)); own.sendto(b'elsewhere', (to, 7))",
    "info": "own.sendmsg([b'elsewhere'], [info], 0, (to, 7))",
}
MULTICAST = {4: "224.0.0.251", 6: "ff02::fb"}


async def send_every_way(app, version, to):
    """Send a datagram by each way; what is refused at once is as good as what never leaves."""
    for way in WAYS.values():
        with contextlib.suppress(OSError):
            await app(
                "index = socket.if_nametoindex('eth1')\n"
                "info = (0, 8, struct.pack('=i8x', index)) if version == 4 else (41, 50, struct.pack('=16xi', index))\n"
                "option = (0, 50) if version == 4 else (41, 76)\n"
                f"own = socket.socket(family(to), socket.SOCK_DGRAM); {way}",
                to=to, source=OWN[version], version=version,
            )  # fmt: skip


async def connect_every_way(app, version, to):
    """Try to connect by each way that TCP has."""
    for way in ("pass", "own.bind((source, 0))", "own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth1')"):
        with contextlib.suppress(OSError):
            await app(
                f"own = socket.socket(family(to)); own.settimeout(0.3); {way}; own.connect((to, 7))",
                to=to, source=OWN[version],
            )  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", ["excluded", "included"])
async def test_no_app_sends_by_a_third_interface(stage, third, version, name):
    """L26, L36: whatever it names, not a packet, and no ARP or neighbour solicitation that names a destination."""
    async with stage.app(getattr(stage, name)) as app:
        for to in (NEIGHBOUR[version], NOBODY[version], str(SERVER[version])):
            await send_every_way(app, version, to)
            await connect_every_way(app, version, to)
            assert [] == await sent(third, destination=to)
        await send_every_way(app, version, MULTICAST[version])
        assert [] == await sent(third, payload=b"elsewhere")
        side = {"excluded": HOST, "included": RELAY}[name]
        assert str(side[version]) == await app(f"ask('tcp', SERVER{version})")  # and the app is none the worse for it


@BOTH
async def test_without_tunsplit_an_app_does_send_there(lab, third, version):
    """The control: each of these ways leads there, and the observer sees it."""
    async with start_app(lab.host, lab.copy_program("python", "app")) as app:
        await connect_every_way(app, version, NEIGHBOUR[version])
        assert len(await sent(third, protocol="tcp", destination=NEIGHBOUR[version])) >= len(WAYS) - 2
        await send_every_way(app, version, NEIGHBOUR[version])
        assert len(WAYS) == len(await sent(third, payload=b"elsewhere", destination=NEIGHBOUR[version]))
        await send_every_way(app, version, NOBODY[version])
        assert await sent(third, destination=NOBODY[version])
        await send_every_way(app, version, MULTICAST[version])
        assert await sent(third, payload=b"elsewhere", destination=MULTICAST[version])


async def test_with_the_firewall_switched_off_what_names_a_device_gets_there(lab, third):
    """The control of the firewall itself, and what DESIGN.md says of `enabled = false`."""
    async with open_stage(lab, firewall={"enabled": False}) as stage, stage.app(stage.included) as app:
        await send_every_way(app, 4, NEIGHBOUR[4])
        assert await sent(third, payload=b"elsewhere")
        assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")


HURRY = """
def hurry():
    "Send by eth1 from before it is there until half a second after it has come up."
    until = time.monotonic() + 5
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth1')
            until = min(until, time.monotonic() + 0.5)
            own.sendto(b'elsewhere', (to, 7))
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as own:
            own.sendto(b'elsewhere', ('ff02::fb', 7, 0, socket.if_nametoindex('eth1')))
"""


async def hurry(lab, app):
    """Have an app send as soon as it can by an interface that appears meanwhile."""
    await app(HURRY, to=NEIGHBOUR[4])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app, "hurry()")
        plug(lab)


@pytest.mark.attack("an app waits for an interface to appear", "it sends by it at once", "closed from its first moment")
async def test_an_interface_that_appears_is_closed_from_its_first_moment(lab):
    """L26: an app that waits for it sends nothing, from before its first address on."""
    async with open_third(lab, plugged=False) as third, open_stage(lab) as stage, stage.app(stage.included) as app:
        await hurry(lab, app)
        assert [] == await sent(third, payload=b"elsewhere")
        assert [] == await sent(third, destination=NEIGHBOUR[4])
        assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")


async def test_without_tunsplit_the_app_is_quick_enough(lab):
    """The control."""
    async with open_third(lab, plugged=False) as third, start_app(lab.host, lab.copy_program("python", "app")) as app:
        await hurry(lab, app)
        assert await sent(third, payload=b"elsewhere")


# What comes in there


@BOTH
async def test_what_comes_in_by_a_third_interface_reaches_no_app(stage, third, included, version):
    """L26; the control is the same server, reached by the uplink."""
    await included(
        "server = socket.socket(family(own), socket.SOCK_DGRAM); server.bind((any, 7001)); server.settimeout(0.5)",
        own=OWN[version], any="::" if version == 6 else "",
    )  # fmt: skip
    async with start_app(stage.lab.router, stage.excluded) as neighbour:
        await neighbour("own = udp(to, 7001); own.send(b'by the third'); own.send(b'by the third')", to=OWN[version])
        await third.settle()
        assert [seen for seen in third.seen(payload=b"by the third") if seen.direction == "in"]
        with pytest.raises(OSError, match="timed out"):
            await included("server.recv(100)")
        await neighbour("own = udp(to, 7001); own.send(b'by the uplink')", to=str(HOST[version]))
        assert b"by the uplink" == await included("server.recv(100)")

        await stage.daemon.terminate()
        await neighbour("own = udp(to, 7001); own.send(b'by the third')", to=OWN[version])
        assert b"by the third" == await included("server.recv(100)")


@pytest.mark.attack("ARP asks for the tunnel's address", "answered", "not answered")
async def test_nobody_there_learns_the_tunnels_and_the_tuns_address(lab, third):
    """L19: by ARP. The controls are the tunnel's address without tunsplit, and the interface's own with it."""
    lab.router.ip("address add 10.0.0.1/8 dev lan1")

    async def answered(address):
        lab.router.ip("neighbour flush dev lan1")
        third.clear()
        await neighbour("udp(to, 7001).send(b'?')", to=address)

        async def is_asked():
            await third.settle()
            return third.seen("arp", destination=address)

        await until(is_asked, "ARP asks")
        return [seen for seen in await sent(third, protocol="arp") if str(seen.source) == address]

    async with start_app(lab.router, lab.copy_program("python", "neighbour")) as neighbour:
        assert await answered(str(HOST_TUNNEL[4]))
        async with open_stage(lab):
            assert [] == await answered(str(HOST_TUNNEL[4]))
            assert [] == await answered(TUN4)
            assert await answered(OWN[4])


async def test_nothing_is_forwarded(lab, third):
    """L31: from a third interface neither to the uplink nor to the tunnel; without tunsplit it is."""
    lab.host.sysctl({"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1})
    lab.router.ip(f"route add 198.51.100.99 via {OWN[4]} dev lan1")
    async with start_app(lab.router, lab.copy_program("python", "neighbour")) as neighbour:
        ask = "udp('198.51.100.99', 7, source).send(b'through')"

        async def is_forwarded():
            await neighbour(ask, source=NEIGHBOUR[4])
            await lab.uplink.settle()
            return [seen for seen in lab.uplink.seen(payload=b"through") if seen.direction == "out"]

        assert await until(is_forwarded, "the control: it is forwarded")
        async with open_stage(lab) as stage:
            stage.clear()
            await neighbour(ask, source=NEIGHBOUR[4])
            await third.settle()
            assert set() == await stage.where(payload=b"through")


# Without it


@pytest.mark.parametrize("way", ["killed", "tun deleted"])
async def test_with_the_firewall_switched_off_routing_closes_the_way(lab, way):
    """Issue, "Fail closed by routing too"."""
    config = lab.config(firewall={"enabled": False})
    async with lab.tunsplit(config) as daemon, start_app(lab.host, lab.copy_program("python", "app")) as app:
        assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")
        if way == "killed":
            await daemon.kill()
        else:
            os.kill(daemon.pid, signal.SIGSTOP)  # it would make it anew
            lab.host.ip(f"link delete {TUN}")
        lab.uplink.clear()
        lab.tunnel.clear()
        for version in (4, 6):
            with pytest.raises(OSError, match=REFUSED):
                await app(f"tcp(SERVER{version})")
            with pytest.raises(OSError, match=REFUSED):
                await app(f"udp(SERVER{version}).send(b'?')")
            assert set() == await where(lab, destination=SERVER[version])
        if way == "killed":
            await daemon.command("undo")
        else:
            os.kill(daemon.pid, signal.SIGCONT)
            await daemon.terminate()
        assert str(HOST[4]) == await app("ask('tcp', SERVER4)")  # the control
        assert {"uplink"} == await where(lab, destination=SERVER[4])


# What has to pass


async def test_a_new_interface_can_become_the_uplink(stage, third, excluded):
    """L16: DHCP and neighbour discovery pass by it while it is closed for everything else."""
    await excluded(
        "own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.bind(('', 68))\n"
        "own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth1')\n"
        "own.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1); own.sendto(b'discover', ('255.255.255.255', 67))"
    )
    assert await sent(third, port=67, payload=b"discover")
    with pytest.raises(OSError, match=REFUSED):  # not to anybody
        await excluded("own.sendto(b'discover', (to, 67))", to=NEIGHBOUR[4])
    stage.lab.host.ip(f"route replace default via {NEIGHBOUR[4]} dev {DEVICE}\nroute delete ::/0\nlink set eth0 down\n")

    async def works():
        try:
            return await excluded("ask('tcp', SERVER4)")
        except OSError:
            return None

    assert OWN[4] == await until(works, "the third interface is the uplink")
    assert await sent(third, protocol="tcp", destination=SERVER[4])


async def test_each_rule_counts(stage, third, included):
    """Issue, "counters per rule"."""

    async def count(name):
        listed = (await stage.lab.host.run(["nft", "list", "counter", "inet", "tunsplit", name])).stdout
        return int(listed.split("packets ")[1].split()[0])

    before = await count("rejected")
    with pytest.raises(OSError, match=REFUSED):
        await included(
            "own = socket.socket(); own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth1')\n"
            "own.connect((to, 7))",
            to=NEIGHBOUR[4],
        )
    assert before < await count("rejected")
    assert 0 == await count("accepted_dhcp")
    await included("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.bind(('', 68))")
    await included("own.sendto(b'renewal', (ROUTER4, 67))")
    assert 1 == await count("accepted_dhcp")
