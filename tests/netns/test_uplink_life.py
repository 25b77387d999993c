"""The uplink moves: address, gateway, card; who can go on does, and nothing takes the wrong side (L16, L25, L37)."""

import os
import random
import signal
import sys
from contextlib import asynccontextmanager, nullcontext
from functools import partial

import pytest

from bench import moves
from tests.netns.stage import HOST, REFUSED, RELAY, ROUTER, SERVER, open_stage, start_app, until
from tests.netns.talk import WORDS, mixed, open_talk
from tests.netns.third import DEVICE, NEIGHBOUR, OWN, open_third, plug

# Asks for a host, in the name of some neighbours in turn, and always with another Ethernet address.
ARP_STORM = """
import itertools, os, socket, sys, time
own = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
own.bind(("lan0", 0))
host = socket.inet_aton(sys.argv[1])
for number in itertools.count():
    mac = b"\\2" + os.urandom(5)
    sender = host[:3] + bytes((100 + number % 10,))
    asks = bytes.fromhex("0001080006040001") + mac + sender + bytes(6) + host
    own.send(b"\\xff" * 6 + mac + b"\\x08\\x06" + asks)
    if number == 600:
        print("storm", flush=True)
    if not number % 600:  # more than a queue holds, and yet an observer keeps up
        time.sleep(0.4)
"""

# Only a tunnel whose transport does not itself need the uplink can show that no included packet is lost.
pytestmark = [pytest.mark.netns, pytest.mark.lab(tunnel_kind="veth")]

GATEWAY_MAC = bytes.fromhex("020000000099")
SECOND4 = f"route add default via {NEIGHBOUR[4]} dev {DEVICE}"
SECOND6 = f"route add ::/0 via {NEIGHBOUR[6]} dev {DEVICE}"


def add_gateway(lab):
    """Put a second gateway beside the first one, a machine with an Ethernet address of its own."""
    lab.router.ip(
        "link add link lan0 name gateway address 02:00:00:00:00:99 type macvlan mode bridge\nlink set gateway up\n"
        "address add 192.168.50.9/32 dev gateway\naddress add 2001:db8:50::9/128 dev gateway"
    )
    lab.router.sysctl({"net/ipv4/conf/lan0/arp_ignore": 1, "net/ipv4/conf/gateway/arp_ignore": 1})


@asynccontextmanager
async def arp_storm(lab):
    """Have somebody on the uplink's network ask for the host beside the block, hundreds of times at once."""
    async with lab.router.start([sys.executable, "-I", "-S", "-c", ARP_STORM, str(HOST[4])]) as storm:
        await storm.wait_written("storm\n")
        yield


async def uses(stage, mac, words=WORDS):
    """Wait until what the excluded app says on each of these sockets goes to this neighbour."""
    stage.clear()

    async def seen():
        await stage.lab.uplink.settle()
        said = [stage.lab.uplink.seen(payload=f"excluded {word}".encode()) for word in words]
        return all(any(frame.frame[:6] == mac for frame in frames if frame.direction == "out") for frames in said)

    return await until(seen, f"the gateway is {mac.hex(':')}")


async def works(app, seen_as, version):
    """Wait until new connections of an app carry this address."""

    async def asked():
        try:
            return await app(f"ask('tcp', SERVER{version})") == seen_as
        except TimeoutError:
            raise
        except OSError:
            return False

    return await until(asked, f"new connections come from {seen_as}")


async def is_refused(app, version):
    """Wait until an app's new connections are refused, and not by time."""

    async def refused():
        try:
            await app(f"tcp(SERVER{version}).close()")
        except TimeoutError:
            raise
        except OSError:
            return True
        return False

    return await until(refused, "new connections are refused")


@asynccontextmanager
async def open_apps(stage):
    async with stage.app(stage.excluded) as one, stage.app(stage.included) as other:
        yield one, other


async def test_flows_go_on_while_the_way_changes_and_the_address_stays(lab, stage):
    """L16: renewed, by another gateway, by a gateway with another card: not a packet is lost."""
    add_gateway(lab)
    async with open_talk(stage) as (excluded, included):
        lab.host.ip(
            f"address change {HOST[4]}/24 dev eth0 valid_lft 1000 preferred_lft 900\n"
            f"route replace default via {ROUTER[4]} dev eth0\naddress add 192.168.50.3/24 dev eth0\n"
        )
        assert ({}, {}) == (await excluded.lost(), await included.lost())
        lab.host.ip("route replace default via 192.168.50.9 dev eth0\nroute replace ::/0 via 2001:db8:50::9 dev eth0")
        assert await uses(stage, GATEWAY_MAC)
        assert ({}, {}) == (await excluded.lost(), await included.lost())

        lab.host.ip("route delete default\nroute delete ::/0")
        assert {"udp4", "udp6"} <= set(await excluded.until_told(("udp4", "udp6")))
        lab.host.ip(f"route add default via {ROUTER[4]} dev eth0\nroute add ::/0 via {ROUTER[6]} dev eth0")
        assert await excluded.is_heard()
        assert {"udp4", "udp6"} == set(await excluded.told())
        assert {} == await included.lost()
        assert [] == await mixed(stage)


async def test_an_address_that_goes_takes_its_flows_with_it(lab, stage):
    """L16, L37: their apps hear of it while they wait; nothing carries the old address; who has another goes on."""
    async with open_talk(stage) as (excluded, included), open_apps(stage) as (one, _):
        lab.host.ip(
            "address add 192.168.50.3/24 dev eth0\naddress add 2001:db8:50::3/64 dev eth0\n"
            f"address delete {HOST[6]}/64 dev eth0"
        )
        await one("listener = tcp(SERVER6)")
        assert set(WORDS[1::2]) == set(await excluded.until_told(WORDS[1::2]))
        stage.clear()
        lab.host.ip(
            f"address delete {HOST[4]}/24 dev eth0\naddress add 192.168.50.3/24 dev eth0\n"
            f"route replace default via {ROUTER[4]} dev eth0"
        )
        await excluded.until_told()
        assert await works(one, "192.168.50.3", 4)
        assert await works(one, "2001:db8:50::3", 6)
        await excluded.is_heard(("udp4", "udp6"))
        stage.clear()
        await excluded.is_heard(("udp4", "udp6"))
        for version in (4, 6):
            assert set() == await stage.where(source=HOST[version])
        assert {} == await included.lost()
        assert [] == await mixed(stage)


SAY = """
def say(own):
    own.settimeout(1)
    own.send(b"said by it")
    return own.recv(65536).split()[0].decode()
"""


async def test_a_socket_that_keeps_a_lost_address_is_ended_and_may_begin_anew(lab):
    """The kernel lets it send on with IPv6, and nothing would ever come back, no error either."""
    old, new = str(HOST[6]), "2001:db8:50::3"
    async with start_app(lab.host, program := lab.copy_program("python", "kept")) as app:
        # Not by the tun: they were connected before it was there.
        await app(SAY)
        await app("flowing, silent = udp(SERVER6), udp(SERVER6)")
        assert [old, old] == await app("[own.getsockname()[0] for own in (flowing, silent)]")
        async with open_stage(lab, [program]) as stage:
            assert old == await app("say(flowing)")
            lab.host.ip(f"address add {new}/64 dev eth0 nodad\naddress delete {old}/64 dev eth0")

            async def is_told(word):
                try:
                    await app(f"say({word})")
                except TimeoutError:
                    return False
                except ConnectionError:
                    return True
                raise AssertionError(f"{word} was answered")

            for word in ("flowing", "silent"):
                await until(partial(is_told, word), f"its app is told: {word}")
                await app(f"{word}.connect((SERVER6, 7))")
                assert new == await app(f"say({word})")
            assert {"uplink"} == await stage.where(payload=b"said by it")


async def test_a_card_that_is_swapped(lab, stage):
    """L16: pulled out, and another put in, with another name and index."""
    async with (
        open_third(lab, plugged=False) as second,
        open_talk(stage) as (excluded, included),
        open_apps(stage) as (one, _),
    ):
        lab.host.ip("link delete eth0")
        await excluded.until_told()
        for version in (4, 6):
            await is_refused(one, version)
        plug(lab)
        lab.host.ip(f"{SECOND4}\n{SECOND6}")
        for version in (4, 6):
            assert await works(one, OWN[version], version)
        await excluded.is_heard(("udp4", "udp6"))
        assert {} == await included.lost()
        assert [] == await mixed(stage, second)


async def test_each_family_may_have_a_card_of_its_own(lab, stage):
    """SPEC.md, "Families"; then the one moves to the other's, whose flows do not notice."""
    async with open_third(lab) as second, open_apps(stage) as (one, _):
        lab.host.ip(f"route delete ::/0\n{SECOND6}")
        assert await works(one, OWN[6], 6)
        async with open_talk(stage) as (excluded, included):
            uplink = (await stage.daemon.status())["uplink"]
            assert ("eth0", DEVICE) == (uplink["interface4"], uplink["interface6"])
            lab.host.ip(f"{SECOND4} metric 7\nroute delete default via {ROUTER[4]}")
            await excluded.until_told(("tcp4", "udp4"))
            assert await works(one, OWN[4], 4)
            assert ({}, {}) == (await excluded.lost(("tcp6", "udp6")), await included.lost())
            assert [] == await mixed(stage, second)


async def test_the_best_of_two_default_routes_is_the_uplink(lab, stage):
    """L16: a worse one changes nothing; when a better one comes, or the metric changes, flows end and begin anew."""
    lab.host.ip(f"route replace default via {ROUTER[4]} dev eth0 metric 100\nroute delete default metric 0")
    async with open_third(lab) as second, open_talk(stage) as (excluded, included), open_apps(stage) as (one, _):
        lab.host.ip(f"{SECOND4} metric 200")
        assert await works(one, str(HOST[4]), 4)
        assert ({}, {}) == (await excluded.lost(), await included.lost())
        lab.host.ip(f"{SECOND4} metric 50")
        await excluded.until_told(("tcp4", "udp4"))
        assert await works(one, OWN[4], 4)
        assert str(HOST[6]) == await one("ask('tcp', SERVER6)")
        lab.host.ip("route delete default metric 50")
        assert await works(one, str(HOST[4]), 4)
        lab.host.ip("route delete default metric 100")
        assert await works(one, OWN[4], 4)
        assert ({}, {}) == (await excluded.lost(("tcp6", "udp6")), await included.lost())
        assert [] == await mixed(stage, second)


async def test_offline_excluded_apps_are_refused_and_the_tunnel_goes_on(lab, stage):
    """SPEC.md, "Tunnel states": no error; what is on-link is there as before."""
    async with open_talk(stage) as (_, included), open_apps(stage) as (one, other):
        lab.host.ip("route delete default\nroute delete ::/0")
        for version in (4, 6):
            await is_refused(one, version)
            with pytest.raises(OSError, match=REFUSED):
                await one(f"own = udp(SERVER{version}); own.send(b'offline'); own.recv(100)")
            assert str(RELAY[version]) == await other(f"ask('tcp', SERVER{version})")
            assert str(HOST[version]) == await one(f"ask('tcp', ROUTER{version})")
        assert {} == await included.lost()
        assert set() == await stage.where(payload=b"offline")
        status = await stage.daemon.status()
        assert ("eth0", None) == (status["uplink"]["interface4"], status["uplink"]["gateway4"])
        assert [] == await mixed(stage)


async def test_carrier_lost_and_back(lab, stage):
    """L16: the cable is out for a moment: connections outlive it."""
    async with open_talk(stage) as (excluded, included):
        lab.router.ip("link set lan0 down")
        await included.is_heard()
        lab.router.ip(f"link set lan0 up\naddress replace {ROUTER[6]}/64 dev lan0")
        assert await excluded.is_heard()
        assert ({}, {}) == (await excluded.told(), await included.told())
        assert {} == await included.lost()
        assert [] == await mixed(stage)


# A container's bridge with its port, another VPN's tun and tap, an overlay, a mirror.
VIRTUAL = """
link add br0 type bridge\nlink set br0 address 02:00:00:00:01:01 up\naddress add 10.90.1.1/24 dev br0
link add guest type veth peer name port\nlink set port master br0 up\nlink set guest up
tuntap add other0 mode tun\nlink set other0 up\naddress add 10.90.2.1/24 dev other0
tuntap add tap0 mode tap\nlink set tap0 up\naddress add 10.90.3.1/24 dev tap0
link add vxlan0 type vxlan id 7 dstport 4789 remote 192.168.50.1 dev eth0\nlink set vxlan0 up
address add 10.90.4.1/24 dev vxlan0
link add mirror type ifb\nlink set mirror up\naddress add 10.90.5.1/24 dev mirror
"""
NETWORKS = {"br0": 1, "other0": 2, "tap0": 3, "vxlan0": 4, "mirror": 5}


async def test_a_virtual_device_is_never_taken_for_the_uplink(lab):
    """Also when no route is left to the card. That main prefers each of them is the control."""
    lab.host.ip(f"route replace default via {ROUTER[4]} dev eth0 metric 100\nroute delete default metric 0\n{VIRTUAL}")
    routes = [f"default via 10.90.{number}.9 dev {name} metric {number}" for name, number in NETWORKS.items()]
    add = "".join(f"route add {route}\n" for route in routes)
    lab.host.ip(add)
    async with open_stage(lab) as stage, open_apps(stage) as (one, other):
        for route in routes:
            shown = await lab.host.run(["ip", "route", "show", "default"])
            assert shown.stdout.startswith(route.rpartition(" metric")[0])
            assert await works(one, str(HOST[4]), 4)
            lab.host.ip(f"route delete {route}")
        lab.host.ip(f"{add}route delete default metric 100")
        await is_refused(one, 4)
        assert "eth0" == (await stage.daemon.status())["uplink"]["interface4"]
        assert (str(HOST[6]), str(RELAY[4])) == (await one("ask('tcp', SERVER6)"), await other("ask('tcp', SERVER4)"))
        assert {"uplink"} == await stage.where(source=HOST[4], destination=SERVER[4])


@pytest.mark.parametrize("around", [nullcontext, arp_storm])
async def test_a_gateway_with_a_new_card_is_followed(lab, stage, around):
    """L16: it says so by gratuitous ARP and an unsolicited advertisement (RFC 5227 §3, RFC 4861 §7.2.6).

    In a storm of ARP, too, of whose news the most is lost.
    """
    lab.router.sysctl({"net/ipv4/conf/lan0/arp_notify": 1, "net/ipv6/conf/lan0/ndisc_notify": 1})
    async with open_talk(stage) as (excluded, included), around(lab):
        lab.router.ip(f"link set lan0 address {GATEWAY_MAC.hex(':')}")
        assert await uses(stage, GATEWAY_MAC)
        assert await excluded.is_heard()
        assert ({}, {}) == (await excluded.told(), await included.told())
        assert {} == await included.lost()
        assert [] == await mixed(stage)


async def test_asleep_while_the_network_changes(lab, stage):
    """L16, L37: what apps have said meanwhile leaves with no address that is gone, and by no card that is."""
    async with open_third(lab) as second, open_talk(stage) as (excluded, included), open_apps(stage) as (one, _):
        for talker in (excluded, included):
            await talker.hush()  # else it might be stopped in the middle of a batch, and end that first
        os.kill(stage.daemon.pid, signal.SIGSTOP)
        try:
            lab.host.ip(
                f"address delete {HOST[4]}/24 dev eth0\naddress delete {HOST[6]}/64 dev eth0\n"
                "address add 192.168.50.3/24 dev eth0\naddress add 2001:db8:50::3/64 dev eth0\n"
                f"{SECOND4}\nroute replace ::/0 via {ROUTER[6]} dev eth0"
            )
            stage.clear()
            for talker in (excluded, included):
                await talker.hush(False)
            assert await excluded.goes_on()
        finally:
            os.kill(stage.daemon.pid, signal.SIGCONT)
        await excluded.until_told()
        assert await works(one, OWN[4], 4)
        assert await works(one, "2001:db8:50::3", 6)
        await excluded.is_heard(("udp4", "udp6"))
        assert {} == await included.lost()
        for version in (4, 6):
            assert [] == lab.uplink.seen(source=HOST[version], payload=b"excluded")
        assert [] == await mixed(stage, second)


async def test_an_uplink_that_moves_faster_than_it_can_be_followed(lab):
    """L16: as `python -m bench.moves`, which goes on for long; the frames where they belong are the control."""
    chance = random.Random(5)
    async with moves.open_stage(lab, stuck_s=15.0) as stage:
        for _ in range(4):
            await stage.move(chance)
    seen = stage.seen
    assert (0, 0) == (seen.leaks.total(), seen.stuck.total())
    assert [] == seen.ended
    assert seen.frames["excluded on the uplink"]
    assert seen.frames["included on the tunnel"]
