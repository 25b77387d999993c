"""The tunnel's life, and the tun's: refused at once while it is away, flowing again when it is back (L14, L16, L34)."""

import errno
import os
import signal

import pytest
import trio

from bench import flaps
from tests.netns.questions import ASKING
from tests.netns.sides import is_on
from tests.netns.stage import (
    HOST,
    HOST_TUNNEL,
    PATIENCE_S,
    REFUSED,
    RELAY,
    SERVER,
    TUN,
    open_stage,
    start_app,
    until,
    where,
)

pytestmark = pytest.mark.netns

OTHER = {4: "10.64.0.77/32", 6: "fd64::77/128"}
PREFIX = {4: 32, 6: 128}

# In an app: a datagram to the router every few milliseconds, each of which has to be answered.
STEADY = """
import threading
lost, answered = [], []
def steady(own):
    for number in range(1_000_000):
        try:
            own.send(b"steady %d" % number)
            while b"steady %d" % number not in own.recv(100):
                pass
        except OSError as error:
            lost.append(str(error))
        else:
            answered.append(number)
        time.sleep(0.01)
for router in (ROUTER4, ROUTER6):
    threading.Thread(target=steady, args=(udp(router),), daemon=True).start()
"""
# A connection and a socket for datagrams, of both IP versions, all of them in use.
OPEN = """
kept = {}
for version, server in ((4, SERVER4), (6, SERVER6)):
    own, datagrams, pings = tcp(server), udp(server), ping(server)
    read_line(own); datagrams.send(b"open"); datagrams.recv(100); echo(pings)
    kept[version] = own, datagrams, pings
"""


async def ends(app, waiting):
    """How an app's waiting ends: an error, and not that of its patience."""
    with pytest.raises(OSError, match=f"{REFUSED}|abort|reset") as raised:
        await app(waiting)
    assert not isinstance(raised.value, TimeoutError)
    return raised.value.errno


async def all_end(app, act, *, versions=(4, 6)):
    """An app that waits for answers on the connection hears of it when its side is gone; on the datagrams, too."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(act)
        assert await ends(app, f"kept[{versions[0]}][0].recv(1)") in (errno.ECONNABORTED, errno.ECONNRESET)
    for number in (1, 2):
        await ends(app, f"kept[{versions[0]}][{number}].recv(1)")
    for version in versions[1:]:
        for number in range(3):
            await ends(app, f"kept[{version}][{number}].recv(1)")


async def refused(app, version):
    """Whatever an app tries is refused at once."""
    for attempt in ("tcp(server)", "own = udp(server); own.send(b'?'); own.recv(100)", "echo(ping(server))"):
        with pytest.raises(OSError, match=REFUSED) as raised:
            await app(attempt, server=str(SERVER[version]))
        assert not isinstance(raised.value, TimeoutError)


async def is_undisturbed(stage, excluded):
    """The app that runs STEADY has had an answer to each datagram, and still has; none was in the tunnel."""
    before = await excluded("len(answered)")

    async def goes_on():
        return await excluded("len(answered)") > before + 2

    assert await until(goes_on, "it goes on")
    assert [] == await excluded("lost")
    assert {"uplink"} == await stage.where(payload=b"steady")
    return True


async def flows_again(stage, app, side="tunnel"):
    """An app is on its side only, as soon as it is anywhere."""

    async def works():
        try:
            return await app("ask('udp', SERVER4), ask('udp', SERVER6)")
        except OSError:
            return None

    await until(works, "it flows again")
    return await is_on(stage, app, side)


def renumber(lab, *versions, back=False):
    """Give the tunnel other addresses, or the first ones again."""
    for version in versions:
        first = f"{HOST_TUNNEL[version]}/{PREFIX[version]}"
        old, new = (OTHER[version], first) if back else (first, OTHER[version])
        lab.host.ip(f"address delete {old} dev wg0\naddress add {new} dev wg0")


# In an app: what it sends without a pause, come what may.
# TCP sends again when its time has come; a datagram that got lost with the tun is sent again here.
GO_ON = """
for own, datagrams, pings in kept.values():
    own.settimeout(15); own.sendall(b"goes on"); assert read_exactly(own, 7) == b"goes on"
    datagrams.settimeout(1)
    for tries in range(5):
        datagrams.send(b"goes on")
        with contextlib.suppress(TimeoutError):
            assert datagrams.recv(100).endswith(b"goes on")
            break
    else:
        raise AssertionError("no answer")
"""
PERSIST = """
import threading
going = [True]
def persist(own):
    while going:
        with contextlib.suppress(OSError):
            own.send(word.encode())
        time.sleep(0.001)
for server in (SERVER4, SERVER6):
    threading.Thread(target=persist, args=(udp(server),), daemon=True).start()
"""


# The tunnel


async def test_a_renumbered_tunnel_never_sends_with_its_old_address(lab, stage, excluded, included):
    """Flows with it end, also those that only wait; those of the other IP version go on, and excluded ones."""
    await excluded(STEADY)
    for version, other in ((4, 6), (6, 4)):
        await included(OPEN)
        old = lab.tunnel.seen(source=HOST_TUNNEL[version], payload=b"open")
        assert old  # the control: it does show

        async def act(version=version):
            renumber(lab, version)
            stage.clear()

        await all_end(included, act, versions=(version,))
        await included(
            f"for own in kept[{version}][:2]:\n    with contextlib.suppress(OSError): own.sendall(b'late')\n"
            f"kept[{other}][0].sendall(b'goes on'); read_exactly(kept[{other}][0], 7)"
        )
        assert await flows_again(stage, included)
        assert lab.tunnel.seen(source=OTHER[version].partition("/")[0])
        assert [] == lab.tunnel.seen(source=HOST_TUNNEL[version])
        assert await is_undisturbed(stage, excluded)
    await included(OPEN)

    async def back():
        renumber(lab, 4, 6, back=True)

    await all_end(included, back)
    assert await flows_again(stage, included)


async def test_a_tunnel_without_an_address_of_a_family_refuses_it(lab, stage, excluded, included):
    """SPEC.md, "Tunnel states"; a new MTU ends nothing."""
    await included(OPEN)
    lab.host.ip("link set wg0 mtu 1300")

    async def is_followed():
        return 1300 == (await stage.daemon.status())["tunnel"]["mtu"]

    assert await until(is_followed, "the new MTU is known")
    await included("for own, *_ in kept.values(): own.sendall(b'!' * 3000); read_exactly(own, 3000)")

    async def act():
        lab.host.ip(f"address delete {HOST_TUNNEL[4]} dev wg0")

    await all_end(included, act, versions=(4,))
    stage.clear()
    await refused(included, 4)
    await included("kept[6][0].sendall(b'goes on'); read_exactly(kept[6][0], 7)")
    assert str(HOST[4]) == await excluded("ask('tcp', SERVER4)")
    assert {"uplink"} == await stage.where(destination=SERVER[4])
    assert {"tunnel"} == await stage.where(destination=SERVER[6])
    lab.host.ip(f"address add {HOST_TUNNEL[4]} dev wg0")
    assert await flows_again(stage, included)


async def test_a_client_that_crashes_and_is_started_again(lab, stage, excluded, included):
    """Its device goes and comes as another; nobody hangs, whoever waits is told, and names are asked again."""
    await excluded(STEADY)
    await included(OPEN)
    await included(ASKING)
    assert "relay" == await included("who('192.0.2.53')")
    await all_end(included, lab.kill_tunnel)
    stage.clear()
    for version in (4, 6):
        await refused(included, version)
        assert set() == await stage.where(destination=SERVER[version])
    assert "SERVFAIL" == await included("who('192.0.2.53')")
    assert await is_undisturbed(stage, excluded)

    await lab.create_tunnel()
    assert await flows_again(stage, included)
    assert "relay" == await included("who('192.0.2.53')")
    assert await is_undisturbed(stage, excluded)


# A client that opens its device, prints what the kernel writes into it, and holds it until its stdin ends.
CLIENT = """
import fcntl, os, struct, sys
descriptor = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH", b"vpn0", 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
while True:
    packet = os.read(descriptor, 2000)
    if packet[0] >> 4 == 4:
        print(".".join(map(str, packet[12:16])), flush=True)
"""


async def test_a_device_that_its_client_keeps_while_it_is_away_is_down(lab):
    """OpenVPN's persist-tun: it is up, with its addresses, and nobody reads it."""
    lab.host.ip("tuntap add vpn0 mode tun\naddress add 10.8.0.2/24 dev vpn0\nlink set vpn0 up")
    async with open_stage(lab, tunnel={"interface": "vpn0"}) as stage, stage.app(stage.included) as included:
        assert (await stage.daemon.status())["tunnel"]["up"] is False
        await refused(included, 4)
        client = lab.copy_program("python", "client")
        async with lab.host.start([client, "-I", "-S", "-u", "-c", CLIENT]) as running:

            async def is_up():
                return (await stage.daemon.status())["tunnel"]["up"]

            assert await until(is_up, "its client is there")
            await included("own = udp(SERVER4); own.send(b'?')")
            with trio.fail_after(PATIENCE_S):
                await running.wait_written("10.8.0.2\n")
        assert set() == await stage.where(destination=SERVER[4])
        await until(lambda: _is_refused(included), "its client is gone")


async def _is_refused(app):
    try:
        await app("tcp(SERVER4)")
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


async def test_a_tunnel_that_flaps_under_traffic_leaks_nothing_and_nothing_gets_stuck(lab):
    """Issue, "Must reach": as `python -m bench.flaps`, which counts two hundred."""
    async with flaps.open_stage(lab, stuck_s=15.0) as stage:
        for away_s, how in ((0.05, "down"), (0.0, "renumbered"), (0.1, "renumbered"), (0.2, "removed"), (0.0, "down")):
            await stage.flap(how, away_s)
        found = stage.flaps
    assert {"excluded": 0, "included": 0} == found.leaks
    assert {"excluded": 0, "included": 0} == found.stuck
    # On a busy machine a new connection's owner may be found too late.
    assert [] == [one for one in found.disturbed if not one.kind.startswith("connections")]
    assert found.refusals  # it was away


# The tun


@pytest.mark.parametrize("way", ["removed", "down", "flushed", "renamed", "moved"])
async def test_a_tun_that_somebody_takes_away_is_restored_and_nothing_leaks(lab, stage, excluded, included, way):
    """L34: flows go on, also what is sent meanwhile stays on its side; it shows."""
    commands = {
        "removed": f"link delete {TUN}",
        "down": f"link set {TUN} down",
        "flushed": f"address flush dev {TUN}",
        "renamed": f"link set {TUN} down\nlink set {TUN} name other",
        "moved": f"link set {TUN} netns {lab.relay.name}",
    }
    for app in (excluded, included):
        await app(OPEN)
    for app, name in ((excluded, "excluded"), (included, "included")):
        await app(PERSIST, word=f"{name} persists")
    lab.host.ip(commands[way])
    for app, seen_as in ((excluded, HOST), (included, RELAY)):
        assert await _flows(app, seen_as)
        await app(GO_ON)
        await app("going.clear()")
    assert {"uplink"} == await stage.where(payload=b"excluded persists")
    assert {"tunnel"} == await stage.where(payload=b"included persists")
    again = 0 if way in ("down", "flushed") else 1
    assert again == await stage.counter("tun_renewals")
    await included(ASKING)
    assert "relay" == await included("who('192.0.2.53', 'tcp')")
    assert TUN not in (await lab.relay.run(["ip", "link"])).stdout
    assert "other" not in (await lab.host.run(["ip", "link"])).stdout


async def _flows(app, seen_as):
    """An app is seen as it is to be, as soon as it is anywhere."""

    async def works():
        try:
            return await app("ask('udp', SERVER4), ask('tcp', SERVER6)")
        except OSError:
            return None

    return (str(seen_as[4]), str(seen_as[6])) == await until(works, "it flows again")


async def test_a_tun_whose_name_somebody_else_has_taken_keeps_the_way_closed(lab):
    """L34: it says so, and is restored when the name is free."""
    excluded = lab.copy_program("python", "excluded")
    async with (
        lab.tunsplit(excluded=[excluded]) as daemon,
        start_app(lab.host, excluded) as one,
        start_app(lab.host, lab.copy_program("python", "included")) as other,
    ):
        os.kill(daemon.pid, signal.SIGSTOP)  # it is quick
        lab.host.ip(f"link delete {TUN}\nlink add {TUN} type bridge\nlink set {TUN} up")
        os.kill(daemon.pid, signal.SIGCONT)

        async def is_blocked():
            return "blocked" == (await daemon.status())["state"]

        await until(is_blocked, "it is blocked")
        lab.uplink.clear()
        lab.tunnel.clear()
        for app in (one, other):
            for version in (4, 6):
                await refused(app, version)
                assert set() == await where(lab, destination=SERVER[version])
        assert f"an interface called {TUN} exists already" in daemon.log
        lab.host.ip(f"link delete {TUN}")

        async def works():
            try:
                return await one("ask('tcp', SERVER4)"), await other("ask('tcp', SERVER4)")
            except OSError:
                return None

        assert (str(HOST[4]), str(RELAY[4])) == await until(works, "the name is free")
