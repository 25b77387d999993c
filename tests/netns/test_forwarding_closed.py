"""What nobody may reach by way of what is forwarded for guests (L10, L19, L31, L36)."""

import contextlib

import pytest

from tests.netns.guests import GATEWAY, GUEST, open_guest_app
from tests.netns.sides import is_on
from tests.netns.stage import HOST, SERVER, open_stage, start_app

pytestmark = pytest.mark.netns

TUN4 = "10.128.0.1"
FORWARDED = {4: "10.128.0.5", 6: "2001:2:0:5::5"}
FAR = {4: "198.51.100.99", 6: "2001:db8:100::99"}
FIREWALL = pytest.mark.parametrize("firewall", [True, False], ids=["firewall", "routing alone"])
SEND = (
    "for to in destinations:\n"
    "    with contextlib.suppress(OSError): udp(to).send(payload.encode())\n"
    "    with contextlib.suppress(OSError): ping(to).send(struct.pack('!BBHHH', 128 if ':' in to else 8, 0, 0, 0, 1))\n"
    "    with contextlib.suppress(OSError), socket.socket(family(to)) as own:\n"
    "        own.settimeout(0.05); own.connect((to, 7))"
)
LISTEN = (
    "server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); server.bind(('::', 7)); server.settimeout(0.5)\n"
    "def received():\n"
    "    heard = []\n"
    "    with contextlib.suppress(TimeoutError):\n"
    "        while True: heard.append(server.recv(100))\n"
    "    return heard\n"
)


def lead_through(lab):
    """Have the neighbours on both sides take the host for their way to guests, to the tun and to the world."""
    for version in (4, 6):
        lab.router.ip(f"route add {GUEST[version]} via {HOST[version]}\nroute add {FAR[version]} via {HOST[version]}")
        lab.relay.ip(f"route add {GUEST[version]} dev wg0\nroute add {FAR[version]} dev wg0")
    lab.router.ip(f"route add {FORWARDED[4]} via {HOST[4]}")


async def sent_by_host(lab, payloads):
    """What the host has sent of these, and every word that it has said to those who sent them."""
    found = []
    for observer in (lab.uplink, lab.tunnel):
        await observer.settle()
        frames = [frame for frame in observer.seen() if frame.direction == "out"]
        found += [frame for frame in frames if any(payload in frame.frame for payload in payloads)]
        found += [frame for frame in frames if str(frame.destination) in FAR.values()]
    return found


@pytest.mark.attack("neighbours and the VPN's side route through the host", "forwarded", "dropped without a word")
@FIREWALL
async def test_nothing_is_forwarded_for_who_is_on_a_side(lab, firewall):
    """L31: neither to a guest nor to the other side, nor back out; no word that it was refused."""
    destinations = [*GUEST.values(), *FAR.values(), FORWARDED[4]]
    async with (
        open_guest_app(lab, masquerade=False) as guest,
        start_app(lab.router, lab.copy_program("python", "neighbour")) as neighbour,
        start_app(lab.relay, lab.copy_program("python", "behind")) as behind,
    ):
        lead_through(lab)
        await guest(LISTEN)

        async def send():
            for app, payload in ((neighbour, "from the uplink"), (behind, "from the tunnel")):
                await app(SEND, destinations=destinations, payload=payload)

        # The control: without tunsplit all of that is forwarded, and seen.
        await send()
        assert {b"from the uplink", b"from the tunnel"} == set(await guest("received()"))
        assert await sent_by_host(lab, [b"from the uplink", b"from the tunnel"])

        async with open_stage(lab, firewall={"enabled": firewall}) as stage:
            assert await is_on(stage, guest, "tunnel")
            await guest("received()")
            stage.clear()
            await send()
            assert [] == await guest("received()")
            assert [] == await sent_by_host(lab, [b"from the uplink", b"from the tunnel"])
            assert {str(SERVER[4]), str(SERVER[6])} == {
                flow["destination"].rpartition(":")[0].strip("[]") for flow in await stage.daemon.flows()
            }


# What an app can do to have its packets taken for a guest's.
BIND = "own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'tunsplit1')"
WAYS = (
    f"{BIND}; own.sendto(payload, (to, 7))",
    "own.setsockopt(*option, struct.pack('!i', index)); own.sendto(payload, (to, 7))",
    "own.sendmsg([payload], [info], 0, (to, 7))",
    "own.bind((source, 0)); own.sendto(payload, (to, 7))",
)
NAMED = (
    "payload, index = b'in disguise', socket.if_nametoindex('tunsplit1')\n"
    "info = (0, 8, struct.pack('=i8x', index)) if version == 4 else (41, 50, struct.pack('=16xi', index))\n"
    "option = (0, 50) if version == 4 else (41, 76)\n"
    "own = socket.socket(family(to), socket.SOCK_DGRAM)\n"
)


@FIREWALL
async def test_an_app_is_not_taken_for_a_guest(lab, firewall):
    """L10, L36: whatever it names, an included app does not get to the guests' side; the guest does."""
    options = {"split": {"forwarded": "uplink"}, "firewall": {"enabled": firewall}}
    async with open_guest_app(lab) as guest, open_stage(lab, **options) as stage, stage.app(stage.included) as app:
        for version in (4, 6):
            to, source = str(SERVER[version]), FORWARDED[version]
            for way in WAYS:
                with contextlib.suppress(OSError):
                    await app(NAMED + way, to=to, source=source, version=version)
            for bind in (BIND, "own.bind((source, 0))"):
                with contextlib.suppress(OSError):
                    await app(f"own = socket.socket(family(to)); own.settimeout(0.5); {bind}; own.connect((to, 7))")
            with contextlib.suppress(OSError):
                await app("own = udp(to, 7, source); own.send(b'from the bridge')", source=GATEWAY[version])
            assert "uplink" not in await stage.where(destination=SERVER[version])
            await guest(f"udp(SERVER{version}).send(b'a guest')")
            assert {"uplink"} == await stage.where(destination=SERVER[version], payload=b"a guest")


async def test_a_masquerade_for_guests_gives_no_app_anothers_name(lab):
    """L27: what the host sends from the bridge's address is rewritten too, to where an excluded app listens."""
    connect = "own = socket.socket(); own.bind((source, 40600)); own.settimeout(0.3); own.connect((SERVER4, 7))"
    async with (
        open_guest_app(lab),
        open_stage(lab) as stage,
        stage.app(stage.excluded) as one,
        stage.app(stage.included) as other,
    ):
        await one("listener = socket.socket(); listener.bind((source, 40600)); listener.listen()", source=TUN4)
        with contextlib.suppress(OSError):
            await other(connect, source=GATEWAY[4])
        assert set() == await stage.where(address=SERVER[4])
        # The control: the masquerade did rewrite it, on its way into the tun.
        listed = (await lab.host.run(["nft", "list", "counter", "inet", "tunsplit", "rewritten"])).stdout
        assert 0 < int(listed.split("packets ")[1].split()[0])


async def test_guests_reach_nothing_of_the_host(lab):
    """L26: their bridge is no side; the control is the same server before tunsplit."""
    async with open_guest_app(lab) as guest, start_app(lab.host, lab.copy_program("python", "server")) as server:
        await server(LISTEN)
        for version in (4, 6):
            await guest("udp(to).send(b'to the host')", to=GATEWAY[version])
        assert [b"to the host"] * 2 == await server("received()")
        async with open_stage(lab):
            for version in (4, 6):
                for to in (GATEWAY[version], str(HOST[version]), FORWARDED[version]):
                    with contextlib.suppress(OSError):
                        await guest("udp(to).send(b'to the host')", to=to)
            assert [] == await server("received()")
