"""The VPN's own way: its packets leave by the uplink and never loop, and nobody else's take it (L23, L33, L39)."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.netns.fates import Question, ask
from tests.netns.stage import HOST, REFUSED, RELAY, open_stage, until
from tunsplit.lab.addresses import RELAY_NAME, SYSTEM_RESOLVER, TUNNEL_PORT
from tunsplit.lab.openvpn import CONNECTED, HOST_DEVICE, PORT, RELAY_DEVICE, serve_openvpn
from tunsplit.lab.programs import require

pytestmark = pytest.mark.netns

# OpenVPN, whose server is known by name alone. tunsplit runs first: without [tunnel] client nobody could ask for it.

ENDPOINTS = [f"{RELAY[4]}:{PORT}/udp", f"[{RELAY[6]}]:{PORT}/udp"]
STAYS = ("--user", "nobody", "--persist-tun", "--persist-key")  # the device stays, and the sockets change their owner
KNOWN_BY: dict[str, tuple[dict[str, Any], tuple[str, ...], int]] = {
    "endpoint and owner": ({"endpoint": ENDPOINTS, "transport_user": "nobody"}, STAYS, PORT),
    "mark, on port 53": ({"fwmark": 1194}, ("--mark", "1194"), 53),
    "what carries the tunnel": ({"endpoint": "none", "transport_user": "nobody"}, STAYS, PORT),
}


def openvpn_stage(lab, **tunnel):
    """Run tunsplit for OpenVPN; the lab's own keys do not apply."""
    own = {"interface": HOST_DEVICE, "fwmark": None, "endpoint": None, **tunnel}
    return open_stage(lab, tunnel=own, dns={"system": [str(SYSTEM_RESOLVER[4])]})


def openvpn():
    return str(Path(require("openvpn")).resolve())


async def connected(stage, client, times):
    """Wait until a client has connected so many times, and tunsplit has seen its device."""

    async def is_up():
        return client.output.count(CONNECTED) == times and (await stage.daemon.status())["tunnel"]["up"]

    await until(is_up, f"connected {times} times\n{client.output}")


@pytest.mark.lab(tunnel=None)
@pytest.mark.parametrize("known_by", KNOWN_BY)
async def test_openvpn_starts_by_name_and_reconnects(lab, known_by):
    """L39, L23: from the cold, with tunsplit first; and after its privileges are dropped, or its device is gone."""
    tunnel, options, port = KNOWN_BY[known_by]
    async with (
        serve_openvpn(lab) as vpn,
        openvpn_stage(lab, client=[openvpn()], **tunnel) as stage,
        lab.observe(lab.relay, RELAY_DEVICE) as inside,
        stage.app(stage.excluded) as excluded,
        stage.app(stage.included) as included,
    ):
        with pytest.raises(OSError, match=REFUSED):
            await included("ask('tcp', SERVER4)")
        async with vpn.client(RELAY_NAME, *options, port=port, resolver=SYSTEM_RESOLVER[4]) as client:
            for times in (1, 2):
                await connected(stage, client, times)
                for version in (4, 6):
                    assert str(RELAY[version]) == await included(f"ask('tcp', SERVER{version})")
                    assert str(RELAY[version]) == await included(f"ask('udp', SERVER{version}, b'of the included')")
                    assert str(HOST[version]) == await excluded(f"ask('udp', SERVER{version}, b'of the excluded')")
                ways = {flow["verdict"] for flow in await stage.daemon.flows() if is_transport(flow, port)}
                assert ({"uplink"} if known_by == "what carries the tunnel" else set()) == ways
                assert times == len([name for name in asked(lab, "system") if name == (RELAY_NAME, "A")])
                if times == 1:
                    os.kill(client.pid, signal.SIGUSR1)

        await inside.settle()
        assert inside.seen("udp", payload=b"of the included")
        assert [] == inside.seen(payload=b"of the excluded")
        assert set() == await stage.where(payload=b"of the included")
        assert {"uplink"} == await stage.where(payload=b"of the excluded")
        # No transport within the transport; and nobody but system DNS was asked for the name.
        assert [] == [seen for version in (4, 6) for seen in inside.seen(address=RELAY[version])]
        assert [] == [name for role in ("relay", "lan", "public") for name in asked(lab, role)]


def is_transport(flow, port):
    return flow["app"]["exe"] == openvpn() and flow["destination"].endswith(f":{port}") and not flow["captured"]


def asked(lab, role):
    """The names that this resolver was asked for, with their types."""
    return [(question.name, question.kind) for question in lab.resolvers[role].questions()]


@pytest.mark.lab(tunnel=None)
async def test_without_a_client_that_is_named_openvpn_never_learns_its_servers_address(lab):
    """The control of the above: it is an included app like any other, and its question goes nowhere."""
    async with serve_openvpn(lab) as vpn, openvpn_stage(lab, endpoint=ENDPOINTS) as stage:
        async with vpn.client(RELAY_NAME, resolver=SYSTEM_RESOLVER[4]) as client:
            await client.wait_written("Cannot resolve host address")
        assert set() == await stage.where(port=53)
        assert [] == asked(lab, "system")


# WireGuard on the port of names


@pytest.mark.lab(tunnel_port=53)
@pytest.mark.parametrize("fwmark", [TUNNEL_PORT, None], ids=["by mark", "by owner"])
async def test_a_vpn_may_use_the_port_of_names(lab, fwmark):
    """L39: its transport is no question, and a question to the relay is none of its transport."""
    async with open_stage(lab, tunnel={"fwmark": fwmark}) as stage, stage.app(stage.included) as included:
        assert str(RELAY[4]) == await included("ask('tcp', SERVER4)")
        assert str(RELAY[6]) == await included("ask('udp', SERVER6)")
        assert [] == [flow for flow in await stage.daemon.flows() if flow["destination"] == f"{RELAY[4]}:53"]
        assert await stage.where(destination=RELAY[4], port=53) == {"uplink"}
        # Named by an app, the relay is asked nothing in clear text.
        await included("os.setresuid(1000, 1000, 1000)")
        question = Question("udp", RELAY[4], "asked-at-the-relay.who.is")
        await ask(included, [question])
        assert {"tunnel"} == await stage.where(payload=b"asked-at-the-relay")
        stage.lab.tunnel_down()
        await ask(included, [question])
        assert "uplink" not in await stage.where(payload=b"asked-at-the-relay")


# Nobody else's


UNPRIVILEGED = "os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)"
# What a program can do to send to the relay's endpoint, each in a socket of its own.
TO_THE_RELAY = {
    "plain": "own.sendto(b'clear text', to)",
    "connected": "own.connect(to); own.send(b'clear text')",
    "fragments": "own.sendto(b'clear text' * 300, to)",
    "a port of its choice": "own.bind(('', 51821)); own.sendto(b'clear text', to)",
    "the uplink's address": "own.bind((source, 0)); own.sendto(b'clear text', to)",
    "bound to the uplink": "own.setsockopt(1, 25, b'eth0'); own.sendto(b'clear text', to)",
    "unicast": "own.setsockopt(*unicast, struct.pack('!i', index)); own.sendto(b'clear text', to)",
    "packet info": "own.sendmsg([b'clear text'], [info], 0, to)",
    "marked": "own.setsockopt(1, 36, mark); own.sendto(b'clear text', to)",
    "marked in passing": "own.sendmsg([b'clear text'], [(1, 36, struct.pack('=I', mark))], 0, to)",
    "by tcp": "own = socket.socket(family(to[0])); own.settimeout(0.3); own.connect(to)",
    "by echo": "own = ping(to[0]); own.send(bytes((8 if version == 4 else 128,)) + bytes(7) + b'clear text')",
}  # fmt: skip


async def send_to_the_relay(app, version):
    """Send by each way; what is refused at once is as good as what never leaves."""
    names = {
        "to": (str(RELAY[version]), TUNNEL_PORT), "source": str(HOST[version]), "version": version, "mark": TUNNEL_PORT,
    }  # fmt: skip
    for way in TO_THE_RELAY.values():
        with contextlib.suppress(OSError):
            await app(
                "to = tuple(to); index = socket.if_nametoindex('eth0')\n"
                "info = (0, 8, struct.pack('=i8x', index)) if version == 4 else (41, 50, struct.pack('=16xi', index))\n"
                "unicast = (0, 50) if version == 4 else (41, 76)\n"
                f"own = socket.socket(family(to[0]), socket.SOCK_DGRAM); {way}",
                **names,
            )


def in_clear(lab, version):
    """What has left by the uplink to the relay and is none of WireGuard's own."""
    return [seen for seen in lab.uplink.seen(destination=RELAY[version]) if seen.direction == "out"]


async def test_where_somebody_empties_the_uplinks_table_the_transport_is_not_carried_in_the_tunnel(lab):
    """L23: it would feed itself, and the VPN's client would hold the tun for the way, also when the table is back."""
    async with open_stage(lab) as stage, stage.app(stage.included) as app:
        await app("own = udp(SERVER4)")
        await app("own.send(b'?'); own.recv(100)")
        async with lab.host.start(
            ["sh", "-c", "for one in $(seq 100); do ip route flush table 7501; done"]
        ) as flushing:
            while flushing.process.poll() is None:
                with contextlib.suppress(OSError):
                    await app("own.send(b'?')")
                await trio.sleep(0.01)
        assert [] == [flow for flow in await stage.daemon.flows() if flow["destination"].endswith(f":{TUNNEL_PORT}")]

        async def answered():
            with contextlib.suppress(OSError):
                return await app("own.settimeout(0.5) or own.send(b'!') and own.recv(100)")

        assert await until(answered, "the tunnel carries")


@pytest.mark.attack("an app names the relay's endpoint, mark, device", "in clear, as the VPN's own", "in the tunnel")
@pytest.mark.parametrize("fwmark", [TUNNEL_PORT, None], ids=["by mark", "by owner"])
async def test_no_unprivileged_program_sends_clear_text_to_the_relay(lab, fwmark):
    """L23, L33: not by naming the endpoint, the mark, the port or the device; its packets go in the tunnel."""
    endpoint = [f"{RELAY[4]}:{TUNNEL_PORT}/udp", f"[{RELAY[6]}]:{TUNNEL_PORT}/udp"]
    async with (
        open_stage(lab, tunnel={"fwmark": fwmark, "endpoint": endpoint, "transport_user": 4242}) as stage,
        stage.app(stage.included) as app,
    ):
        await app(UNPRIVILEGED)
        for version in (4, 6):
            await send_to_the_relay(app, version)
            assert str(RELAY[version]) == await app(f"ask('udp', SERVER{version})")  # what came before has been judged
            assert {"tunnel"} == await stage.where(destination=RELAY[version], payload=b"clear text")
            assert [] == in_clear(lab, version)

        stage.lab.tunnel_down()
        for version in (4, 6):
            await send_to_the_relay(app, version)
            with pytest.raises(OSError, match=REFUSED):
                await app(f"ask('tcp', SERVER{version})")
            assert "uplink" not in await stage.where(payload=b"clear text")
            assert [] == in_clear(lab, version)


async def test_the_transports_owner_can(lab):
    """The control of the above: root, and who has become the transport's user; to that port alone."""
    endpoint = [f"{RELAY[4]}:{TUNNEL_PORT}/udp", f"{RELAY[4]}:443/tcp"]
    async with (
        open_stage(lab, tunnel={"fwmark": None, "endpoint": endpoint, "transport_user": 4242}) as stage,
        stage.app(stage.included) as app,
    ):
        for uid in (0, 4242):
            stage.clear()
            await app(f"os.setresuid({uid}, {uid}, 0)")
            await app("own = udp(relay, port); own.send(b'clear text')", relay=str(RELAY[4]), port=TUNNEL_PORT)
            assert {"uplink"} == await stage.where(destination=RELAY[4], payload=b"clear text")
            with pytest.raises(OSError, match="refused"):  # by the relay
                await app("tcp(relay, 443)", relay=str(RELAY[4]))
            assert {"uplink"} == await stage.where(address=RELAY[4], port=443)
            await app("own = udp(relay, port); own.send(b'other port')", relay=str(RELAY[4]), port=TUNNEL_PORT + 1)
            await app("ask('udp', SERVER4)")
            assert {"tunnel"} == await stage.where(destination=RELAY[4], payload=b"other port", direction="out")


async def test_a_mark_alone_carries_any_protocol(lab):
    """L39: ESP has no ports, so no endpoint names it; unmarked it is an app's packet, of a protocol not listed."""
    async with open_stage(lab, tunnel={"endpoint": None}) as stage, stage.app(stage.included) as app:
        await app(
            "own = socket.socket(socket.AF_INET, socket.SOCK_RAW, 50); own.connect((relay, 0))", relay=str(RELAY[4])
        )
        await app("own.send(b'of an app')")
        await app("own.setsockopt(1, 36, mark); own.send(b'of the VPN')", mark=TUNNEL_PORT)
        await app("ask('udp', SERVER4)")
        assert {"uplink"} == await stage.where(payload=b"of the VPN", direction="out")
        assert set() == await stage.where(payload=b"of an app", direction="out")
