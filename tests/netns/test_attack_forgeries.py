"""Whoever sends in a server's name, or not to this host at all, ends nothing, changes nothing, and is not heard (L37).

Each attack is carried out on a host without tunsplit first. That it has arrived is seen each time.
"""

import json
import socket
import struct
from contextlib import AsyncExitStack, closing

import pytest
import trio

from tests import craft
from tests.craft import RST
from tests.netns import attacker
from tests.netns.attacker import ends, open_forger
from tests.netns.sides import is_on
from tests.netns.stage import HOST, PATIENCE_S, ROUTER, SERVER, open_stage, start_app, until
from tests.netns.test_mtu import TRANSFER, TUN_MTU, overlapping
from tunsplit.engine.flow import LINGER_S
from tunsplit.lab import addresses

pytestmark = pytest.mark.netns

VERSIONS = (4, 6)
FAR = 1 << 30  # octets; no window is so wide
NARROW = {4: 600, 6: 1280}


async def next_number(lab, version, port):
    """The sequence number of what the server says next."""
    at = {4: 34, 6: 54}[version]
    await lab.uplink.settle()
    frames = [one for one in lab.uplink.seen("tcp", source=SERVER[version], port=port) if one.payload]
    return struct.unpack_from("!I", frames[-1].frame, at + 4)[0] + len(frames[-1].payload)


def reset(version, port, number):
    return craft.tcp(ends(SERVER[version], 7, HOST[version], port), flags=RST, seq=number % (1 << 32))


async def on_uplink(stack, lab):
    """Who forges on the uplink's network."""
    (shown,) = json.loads((await lab.host.run(["ip", "-json", "link", "show", "eth0"])).stdout)
    return open_forger(stack, lab.router, "lan0", bytes.fromhex(shown["address"].replace(":", "")))


async def nat_port(stage, app, version, protocol):
    """The outside port of an app's latest flow of this kind."""
    flows = [
        flow for flow in await stage.daemon.flows()
        if flow["app"] and flow["app"]["pid"] == app.pid and flow["protocol"] == protocol
        and (version == 6) == ("[" in flow["source"])
    ]  # fmt: skip
    return int(min(flows, key=lambda flow: flow["age_s"])["nat"].rpartition(":")[2])


@pytest.mark.attack("forged resets, out of window", "TCP does not believe them", "nor does NAT: the connection goes on")
async def test_a_forged_reset_ends_no_connection(lab):
    """L37, RFC 9293 §3.10.7.4: who guesses the ports does not know the window; and a reset that fits is one."""

    async def is_alive(app, version):
        return b"alive" == await app(f"own{version}.sendall(b'alive') or read_exactly(own{version}, 5)")

    async def ends_by_one_that_fits(forger, app, version, port):
        forger.send(reset(version, port, await next_number(lab, version, port)))
        with pytest.raises(OSError, match="reset"):
            await app(f"own{version}.recv(1)")

    async with AsyncExitStack() as stack:
        forger = await on_uplink(stack, lab)
        async with start_app(lab.host, lab.copy_program("python", "app")) as app:
            for version in VERSIONS:
                await app(f"own{version} = tcp(SERVER{version}); read_line(own{version})")
                port = await app(f"own{version}.getsockname()[1]")
                forger.send(reset(version, port, await next_number(lab, version, port) + FAR))
                assert await is_alive(app, version)
                await ends_by_one_that_fits(forger, app, version, port)

        async with open_stage(lab) as stage, stage.app(stage.excluded) as app:

            async def ports_in(state):
                flows = await stage.daemon.flows()
                return {int(flow["nat"].rpartition(":")[2]) for flow in flows if flow["state"] == state}

            ports: dict[int, int] = {}
            suspected: set[int] = set()
            for version in VERSIONS:
                await app(f"own{version} = tcp(SERVER{version}); read_line(own{version})")
                ports[version] = await nat_port(stage, app, version, "tcp")
            for version, port in ports.items():
                forger.send(reset(version, port, await next_number(lab, version, port) + FAR))
            # That NAT has seen the resets; then the sockets are asked, and the connections go on.
            with trio.fail_after(LINGER_S + 2 * PATIENCE_S):
                while suspected < set(ports.values()):
                    suspected |= await ports_in("closing")
                going_on: set[int] = set()
                while going_on < set(ports.values()):
                    going_on = await ports_in("open")
            for version in VERSIONS:
                assert await is_alive(app, version)
                await ends_by_one_that_fits(forger, app, version, ports[version])
            assert {"uplink"} == await stage.where(address=SERVER[4]) | await stage.where(address=SERVER[6])


@pytest.mark.attack(
    "forged word that a datagram was too big",
    "all apps' way to that server is narrow",
    "the app's that has sent it only",
)
@pytest.mark.attack("the same of a segment out of window", "TCP does not believe it", "nor does tunsplit")
async def test_a_forged_path_mtu_is_one_side_s_affair(lab):
    """L22, L30, L37: a datagram has nothing but its ports to be known by; a segment has a number."""
    async with AsyncExitStack() as stack:
        forger = await on_uplink(stack, lab)

        def narrow(version, port, quoted=None):
            quoted = quoted or craft.udp(ends(HOST[version], port, SERVER[version], 7), bytes(1400))
            forger.send(attacker.too_big(ROUTER[version], quoted, NARROW[version]))

        async with (
            open_stage(lab) as stage,
            stage.app(stage.excluded) as app,
            stage.app(stage.included) as included,
        ):
            await included(TRANSFER)
            for version in VERSIONS:
                await app(f"{TRANSFER}\nown = datagram(SERVER{version}, {version}, 2); own.send(b'?'); own.recv(99)")
                narrow(version, await nat_port(stage, app, version, "udp"))

                async def is_told(version=version):
                    return NARROW[version] == await app(f"path_mtu(own, {version})")

                await until(is_told, "the app is told")
                assert TUN_MTU == await included(f"path_mtu(datagram(SERVER{version}, {version}, 2), {version})")
                await included(f"strict = datagram(SERVER{version}, {version}, 2)")
                assert await included("answered(strict, 1340)")

                await app(f"own = tcp(SERVER{version}); read_line(own)")
                port = await nat_port(stage, app, version, "tcp")
                number = await next_number(lab, version, port) + FAR
                quoted = craft.tcp(ends(HOST[version], port, SERVER[version], 7), bytes(1400), seq=number % 2**32)
                stage.clear()
                narrow(version, port, quoted)
                await app("own.sendall(bytes(100_000)); read_exactly(own, 100_000)")
                await stage.where()
                sizes = [one.octets for one in lab.uplink.seen("tcp", source=HOST[version], port=port)]
                assert max(sizes) > NARROW[version] + 100

        # The control: without tunsplit whoever sends there next is told, too.
        async with start_app(lab.host, stage.excluded) as app:
            await app(TRANSFER)
            for version in VERSIONS:
                await app(f"own = datagram(SERVER{version}, {version}, 2); own.send(b'?'); own.recv(99)")
                narrow(version, await app("own.getsockname()[1]"))

                async def is_narrow_for_all(version=version):
                    return NARROW[version] == await app(f"path_mtu(datagram(SERVER{version}, {version}, 2), {version})")

                await until(is_narrow_for_all, "the host is told")


# Frames

HEAR = """
own = socket.socket(family(to), socket.SOCK_DGRAM); own.settimeout(3)
own.bind(('', 0) if family(to) == socket.AF_INET else ('::', 0)); own.sendto(b'?', (to, 7)); own.recv(100)

def heard(wanted):
    words = set()
    while not words >= set(wanted):
        words.add(own.recv(3000)[:20].decode().rstrip('.'))
    return words
"""


@pytest.mark.attack("a stranger's datagram to a port in use", "the app hears it", "dropped: nobody has asked him")
@pytest.mark.attack("a datagram to it by the other side's wire", "the app hears it", "dropped")
@pytest.mark.attack("a datagram in a broadcast frame", "the app hears it", "dropped")
@pytest.mark.attack(
    "frames for another host, frames with a VLAN tag", "a packet socket sees them as plain IP", "not looked at"
)
@pytest.mark.attack("fragments that overlap", "the kernel drops them (RFC 5722)", "so does tunsplit")
@pytest.mark.lab(tunnel_kind="veth")
async def test_frames_that_are_not_meant_for_the_app_s_flow_are_not_heard(lab):
    """L37: to the very port that an app listens on; one that is meant is heard."""

    def forge(forgers, version, port):
        """Send all of them; what each says is its name."""
        to, inside = HOST[version], addresses.HOST_TUNNEL[version].ip
        uplink, tunnel = forgers
        server, stranger = SERVER[version], {4: "198.51.100.66", 6: "2001:db8:100::66"}[version]

        def datagram(word, source=server, source_port=7, to=to, port=port):
            return craft.udp(ends(source, source_port, to, port), word.encode().ljust(20, b"."))

        uplink.send(datagram("another MAC"), to=bytes.fromhex("020000000055"))
        uplink.send(datagram("VLAN 5"), tag=attacker.vlan(5))
        uplink.send(datagram("broadcast"), to=attacker.BROADCAST_MAC)
        uplink.send(datagram("stranger", source=stranger))
        uplink.send(datagram("stranger's port", source_port=8))
        tunnel.send(datagram("other wire"), datagram("other address", to=inside))
        whole = craft.udp(ends(server, 7, to, port), b"overlapping.".ljust(3000, b"."))
        uplink.send(*overlapping(craft.fragments(whole, 1200, identification=77)))
        uplink.send(datagram("meant"))

    async with AsyncExitStack() as stack:
        mac = bytes.fromhex("020000000001")  # of both ends of a tunnel that is a veth pair
        forgers = await on_uplink(stack, lab), open_forger(stack, lab.relay, "wg0", mac)
        async with start_app(lab.host, lab.copy_program("python", "app")) as app:
            with closing(lab.host.socket(socket.AF_PACKET, socket.SOCK_DGRAM)) as tap:
                tap.bind(("eth0", 3))  # ETH_P_ALL
                for version in VERSIONS:
                    await app(HEAR, to=str(SERVER[version]))
                    port = await app("own.getsockname()[1]")
                    forge(forgers, version, port)
                    words = {"broadcast", "stranger", "stranger's port", "other wire", "other address", "meant"}
                    assert words == await app("heard(wanted)", wanted=list(words))
                tapped = b"".join(iter_frames(tap))
                assert all(word in tapped for word in (b"another MAC", b"VLAN 5", b"overlapping"))

        async with open_stage(lab) as stage, stage.app(stage.excluded) as app:
            for version in VERSIONS:
                await app(HEAR, to=str(SERVER[version]))
                port = await nat_port(stage, app, version, "udp")
                forge(forgers, version, port)
                assert {"meant"} == await app("heard({'meant'})")
                await lab.uplink.settle()
                # Whatever was late has come before this.
                forgers[0].send(craft.udp(ends(SERVER[version], 7, HOST[version], port), b"the end"))
                assert {"the end"} == await app("heard({'the end'})")


def iter_frames(tap):
    """What a packet socket has received so far."""
    while True:
        try:
            yield tap.recv(65536)
        except BlockingIOError:
            return


@pytest.mark.attack(
    "ICMP forgeries against the VPN's transport", "its way is narrow", "likewise; the tunnel goes on, nobody moves"
)
async def test_forgeries_against_the_vpn_s_transport_move_nobody(lab):
    """L23, L37: too big, and nobody there; in main's eyes the relay's path is narrow then, which is the control."""

    async def is_narrow():
        for version in lab.uplink.seen("wireguard"):
            to = str(version.destination)
            if to != str(HOST[4]):
                shown = (await lab.host.run(["ip", "route", "get", to, "mark", str(addresses.TUNNEL_MARK)])).stdout
                return f"mtu {NARROW[4]}" in shown
        return False

    async def is_hit(forger):
        """Forge, and wait until the kernel believes it."""

        async def believed():
            await lab.uplink.settle()
            sent = [one for one in lab.uplink.seen("wireguard") if one.direction == "out"][-1]
            forger.send(attacker.unreachable(ROUTER[4], sent.frame[14:]))
            forger.send(attacker.too_big(ROUTER[4], sent.frame[14:], NARROW[4]))
            return await is_narrow()

        await until(believed, "the kernel takes the relay's path for narrow")

    async with AsyncExitStack() as stack:
        forger = await on_uplink(stack, lab)
        async with open_stage(lab) as stage, stage.app(stage.excluded) as app, stage.app(stage.included) as included:
            assert await is_on(stage, included, "tunnel")
            await is_hit(forger)
            await included(TRANSFER)
            for version in VERSIONS:
                assert (await included(f"transfer(SERVER{version}, 300_000)"))[0]
            assert await is_on(stage, included, "tunnel")
            assert await is_on(stage, app, "uplink")
