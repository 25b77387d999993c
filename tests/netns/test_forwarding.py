"""What the host forwards for containers and virtual machines (SPEC "Splitting rules", L17, L22, L31)."""

import contextlib
import json

import pytest

from tests.netns.fates import answered, ask_and_trace, ask_everywhere, configure, differences
from tests.netns.guests import GUEST, open_guest_app
from tests.netns.sides import is_on
from tests.netns.stage import HOST, HOST_TUNNEL, REFUSED, RELAY, SERVER, open_stage, until, where
from tests.netns.test_life import look_at
from tests.netns.test_nat import know_path_mtu
from tunsplit.lab.addresses import RESOLVERS, TUNNEL_MTU

pytestmark = pytest.mark.netns

OWN = {"uplink": HOST, "tunnel": HOST_TUNNEL}
TRANSFER = (
    "import threading\nown = tcp(SERVER{0}); read_line(own)\ndata = os.urandom(300_000)\n"
    "thread = threading.Thread(target=own.sendall, args=(data,)); thread.start()\n"
    "back = read_exactly(own, len(data)); thread.join()"
)


@pytest.mark.lab(rp_filter=1)
@pytest.mark.parametrize(
    ("side", "masquerade"), [("tunnel", True), ("uplink", True), ("uplink", False)], ids=["tunnel", "uplink", "routed"]
)
async def test_a_guest_is_on_the_side_that_the_configuration_says(lab, side, masquerade):
    """`forwarded`: TCP, UDP, ping, IPv4 and IPv6, long datagrams and streams; beside Docker's rules, or without any."""
    async with open_guest_app(lab, masquerade=masquerade) as guest, open_stage(lab, split={"forwarded": side}) as stage:
        know_path_mtu(stage)
        assert await is_on(stage, guest, side)
        for version in (4, 6):
            stage.clear()
            await guest(f"ask('ping', SERVER{version})")
            assert {side} == await stage.where(address=SERVER[version])
            await guest(TRANSFER.format(version))
            assert await guest("back == data")
            # Less than its own device takes, 1500 octets with all headers: what the tun does.
            assert await guest(f"own.getsockopt(socket.IPPROTO_TCP, 2) <= {TUNNEL_MTU - {4: 40, 6: 60}[version]}")
            await guest(f"ask('udp', SERVER{version}, bytes(4000)); ask('udp', SERVER{version}, bytes(1300))")
            assert {side} == await stage.where(address=SERVER[version])
            seen = getattr(lab, side).seen(destination=SERVER[version])
            assert {OWN[side][version]} == {frame.source for frame in seen}
        flows = await stage.daemon.flows()
        assert {(None, "forwarded", side)} == {(flow["app"], flow["reason"], flow["verdict"]) for flow in flows}
        assert {"tcp", "udp", "icmp", "icmpv6"} == {flow["protocol"] for flow in flows}


async def test_a_guest_goes_on_when_somebody_has_taken_its_tun_away(lab):
    """L34; until it is there again, nothing of a guest leaves on either side."""
    async with open_guest_app(lab) as guest, open_stage(lab) as stage, stage.app(stage.included) as app:
        assert await is_on(stage, guest, "tunnel")
        await app("own = tcp(SERVER4); read_line(own)")
        lab.host.ip("link delete tunsplit1")

        async def works():
            with contextlib.suppress(OSError):
                return await guest("ask('tcp', SERVER4)")

        assert str(RELAY[4]) == await until(works, "the guest has a way again")
        assert await is_on(stage, guest, "tunnel", clear=False)
        assert 1 == await stage.counter("tun_renewals")
        assert b"as before" == await app("own.send(b'as before') and read_exactly(own, 9)")


@pytest.mark.parametrize("side", ["tunnel", "uplink"])
async def test_a_guest_that_sends_too_much_at_once_is_told_the_path_mtu(lab, side):
    """L22: by this host, and by a router behind it."""
    lab.router.ip("route replace 198.51.100.0/24 dev inet0 proto kernel scope link mtu lock 1300")
    async with open_guest_app(lab) as guest, open_stage(lab, split={"forwarded": side}) as stage:
        for version in (4, 6):
            level, discover, mtu = {4: ("IP", 10, 14), 6: ("IPV6", 23, 24)}[version]
            await guest(f"own = udp(SERVER{version}); own.setsockopt(socket.IPPROTO_{level}, {discover}, 2)")
            narrow = {4: 1300, 6: TUNNEL_MTU}[version]

            async def is_known(level=level, mtu=mtu, narrow=narrow):
                for size in (1440, 1350):
                    with contextlib.suppress(OSError):
                        await guest(f"own.send(bytes({size}))")
                return narrow == await guest(f"own.getsockopt(socket.IPPROTO_{level}, {mtu})")

            assert await until(is_known, "the guest knows")
        assert {side} == await stage.where(address=SERVER[4])


async def test_a_guest_asks_by_the_table(lab):
    """L17, L32: as a normal app in the tunnel, as an excluded one outside; whatever it asks, and wherever."""
    per_app = {"dns": {"platform": "per-app", "system": [str(RESOLVERS["system"][4])]}}
    async with open_guest_app(lab) as guest, open_stage(lab, **per_app) as stage:
        for side, role in (("tunnel", "relay"), ("uplink", "system")):
            await configure(stage, split={"forwarded": side}, **per_app)
            questions = ask_everywhere(f"guest-{side}")
            fates = await ask_and_trace(stage, guest, questions)
            assert {} == differences(dict.fromkeys(questions, answered(role, side, 4)), fates)
            stage.clear()
            for version in (4, 6):
                with pytest.raises(OSError, match=REFUSED):
                    await guest("tcp(to, 853)", to=str(RESOLVERS["public"][version]))
            assert set() == await stage.where(port=853)
        (shown,) = {(one["app"], one["verdict"]) for one in await recent(stage) if "uplink" in one["name"]}
        assert (None, "uplink") == shown


async def recent(stage):
    """What `tunsplit dns` shows."""
    return json.loads((await stage.daemon.command("dns", "--json")).stdout)


async def test_a_guest_that_comes_later_and_one_that_changes_sides(lab):
    """The bridge appears while tunsplit runs; a reload ends what is on the old side, and no socket of the host's."""
    async with open_stage(lab) as stage, open_guest_app(lab) as guest, stage.app(stage.excluded) as app:
        assert await is_on(stage, guest, "tunnel")
        await guest(
            "own = tcp(SERVER4, source_port=40404); read_line(own)\ndatagrams = udp(SERVER4, source_port=40405)"
        )
        await guest("datagrams.send(b'before'); datagrams.recv(100)")
        # Where masquerade keeps the guest's port, these are on the same ones.
        await app(
            "own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.bind(('', 40405)); listen = socket.socket()"
        )
        await app("listen.bind(('', 40404)); listen.listen()")
        await app("own.sendto(b'mine', (SERVER4, 7)); own.recv(100)")

        await configure(stage, split={"forwarded": "uplink"})
        stage.clear()
        with pytest.raises(OSError, match=r"reset|refused"):
            await guest("own.sendall(b'after'); read_exactly(own, 5)")
        assert set() == await stage.where(payload=b"after")
        assert await is_on(stage, guest, "uplink")
        await app("own.sendto(b'mine', (SERVER4, 7)); own.recv(100)")

        await configure(stage, split={"forwarded": "block"})
        for version in (4, 6):
            stage.clear()
            with pytest.raises(OSError, match=REFUSED):
                await guest(f"tcp(SERVER{version})")
            with pytest.raises(OSError, match=REFUSED):
                await guest(f"own = udp(SERVER{version}); own.send(b'?'); own.recv(100)")
            assert set() == await stage.where(address=SERVER[version])
        await configure(stage, split={"forwarded": "tunnel"})
        assert await is_on(stage, guest, "tunnel")
        await stage.daemon.command("off")
        await configure(stage, split={"forwarded": "uplink"})
        assert await is_on(stage, guest, "tunnel")


async def test_explain_says_that_a_packet_is_forwarded(lab):
    """Without a packet, by where it would come from."""
    async with open_guest_app(lab), open_stage(lab, split={"forwarded": "uplink"}) as stage:
        words = ["explain", "--json", "--proto", "tcp", "--src", f"{GUEST[4]}:4000", "--dst", f"{SERVER[4]}:80"]
        explained = json.loads((await stage.daemon.command(*words)).stdout)

        assert (None, "uplink", "forwarded") == (explained["app"], explained["verdict"], explained["reason"])
        assert str(HOST[4]) == explained["way"]["source"]


async def test_while_the_tunnel_is_down_a_guest_is_refused_at_once(lab):
    """L14, L16: not a packet on the uplink; it works again when the tunnel is back."""
    async with open_guest_app(lab) as guest, open_stage(lab) as stage:
        await guest("own = tcp(SERVER4); read_line(own)")
        lab.tunnel_down()

        async def is_down():
            return not (await stage.daemon.status())["tunnel"]["up"]

        await until(is_down, "the tunnel is down")
        stage.clear()
        for version in (4, 6):
            with pytest.raises(OSError, match=REFUSED):
                await guest(f"tcp(SERVER{version})")
            with pytest.raises(OSError, match=REFUSED):
                await guest(f"own6 = udp(SERVER{version}); own6.send(b'?'); own6.recv(100)")
        with pytest.raises(OSError, match=r"reset|refused"):
            await guest("own.sendall(b'after'); read_exactly(own, 5)")
        assert set() == await stage.where(payload=b"after")
        for version in (4, 6):
            assert set() == await stage.where(address=SERVER[version])
        lab.tunnel_up()

        async def works():
            try:
                return await guest("ask('tcp', SERVER4)")
            except OSError:
                return None

        assert str(RELAY[4]) == await until(works, "the tunnel works again")


async def test_a_killed_daemon_leaves_guests_cut_off_and_undo_puts_the_host_back(lab):
    """L15."""
    async with open_guest_app(lab) as guest:
        before = await look_at(lab.host)
        assert str(HOST[4]) == await guest("ask('tcp', SERVER4)")  # the control: that way is open, and is watched
        assert {"uplink"} == await where(lab, payload=b"", destination=SERVER[4], protocol="tcp")
        async with open_stage(lab) as stage:
            assert await is_on(stage, guest, "tunnel")
            await stage.daemon.kill()
            stage.clear()
            for version in (4, 6):
                with pytest.raises(OSError, match=REFUSED):
                    await guest(f"tcp(SERVER{version})")
                assert set() == await stage.where(address=SERVER[version])
            assert 0 == (await stage.daemon.command("undo")).returncode
            assert before == await look_at(lab.host)
