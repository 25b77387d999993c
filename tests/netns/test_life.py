"""From start to end: the host is as it was before, and nothing leaks on the way (L14, L15, L16)."""

import os
import re
import signal

import pytest

from tests.netns.sides import is_on
from tests.netns.stage import HOST, REFUSED, RELAY, SERVER, complaints, open_stage, start_app, until, where
from tunsplit.errors import KernelError
from tunsplit.lab import open_lab

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])

# All that tunsplit could touch. What counts or is drawn by lot is left out.
SHOW = r"""
for family in -4 -6; do ip $family address; ip $family route show table all; ip $family rule; done
nft --stateless list ruleset
find /proc/sys/net -type f -perm -400 ! -name '*_count' ! -name stable_secret ! -name 'tcp_fastopen_key' \
    ! -name flush ! -path '*/neigh/*' | sort | xargs grep -aH '' 2>/dev/null
"""


async def look_at(namespace):
    """Everything of a host that tunsplit could have changed."""
    shown = (await namespace.run(["sh", "-c", SHOW], check=False)).stdout
    return re.sub(r"(valid_lft|preferred_lft|expires) \S+", "", shown).splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_host_is_put_back_exactly(lab, number):
    """Contract, `tunsplit run`: undo and exit 0; used before that, by both apps."""
    before = await look_at(lab.host)
    async with open_stage(lab) as stage, stage.app(stage.excluded) as one, stage.app(stage.included) as other:
        assert before != await look_at(lab.host)  # the control: it does show
        await one("own = tcp(SERVER4)")
        await other("own = tcp(SERVER6)")
        os.kill(stage.daemon.pid, number)
        assert 0 == await stage.daemon.wait()
        assert before == await look_at(lab.host)


async def test_a_killed_daemon_leaves_included_apps_cut_off_and_undo_puts_the_host_back(lab):
    """L15: nothing is exposed; excluded apps are cut off too until `undo`."""
    before = await look_at(lab.host)
    async with open_stage(lab) as stage, stage.app(stage.excluded) as one, stage.app(stage.included) as other:
        await other("own = tcp(SERVER4); read_line(own)")
        await stage.daemon.kill()
        stage.clear()
        for app in (one, other):
            for version in (4, 6):
                with pytest.raises(OSError, match=REFUSED):
                    await app(f"tcp(SERVER{version})")
                with pytest.raises(OSError, match=REFUSED):
                    await app(f"udp(SERVER{version}).send(b'?')")
        await other("own.setblocking(False)\nwith contextlib.suppress(OSError): own.sendall(b'in clear')")
        assert set() == await stage.where(destination=SERVER[4])
        assert set() == await stage.where(destination=SERVER[6])

        assert 0 == (await stage.daemon.command("undo")).returncode
        assert before == await look_at(lab.host)
        assert 0 == (await stage.daemon.command("undo")).returncode  # idempotent
        assert before == await look_at(lab.host)
        # The control: the way is open again, and was there to be taken.
        assert str(HOST[4]) == await other("ask('tcp', SERVER4)")
        assert {"uplink"} == await stage.where(destination=SERVER[4])


async def test_a_start_over_leftovers_works_and_puts_back_what_was_before_them(lab):
    """L15: the next start repairs it by itself."""
    before = await look_at(lab.host)
    async with open_stage(lab) as stage:
        await stage.daemon.kill()
        async with open_stage(lab) as again, again.app(again.excluded) as one, again.app(again.included) as other:
            assert str(HOST[4]) == await one("ask('tcp', SERVER4)")
            assert str(RELAY[4]) == await other("ask('tcp', SERVER4)")
        assert before == await look_at(lab.host)


async def test_a_second_daemon_in_one_namespace_is_refused_and_changes_nothing(lab):
    """Issue, "Bad input"."""
    async with open_stage(lab) as stage:
        before = await look_at(lab.host)
        with pytest.raises(KernelError, match="another tunsplit is at work in this network namespace"):
            async with open_stage(lab):
                pass
        assert before == await look_at(lab.host)
        async with stage.app(stage.included) as app:
            assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")


async def test_two_daemons_in_two_namespaces_do_not_meet(lab):
    """Contract, "Fixed meanings"."""
    async with open_lab() as other, open_stage(lab) as one, open_stage(other) as two:
        for stage in (one, two):
            async with stage.app(stage.excluded) as app:
                assert str(HOST[4]) == await app("ask('tcp', SERVER4)")
                assert {"uplink"} == await stage.where(address=SERVER[4])
        assert 1 == len(await one.daemon.flows())


# The tunnel comes and goes


@pytest.mark.lab(tunnel=None)
async def test_without_a_tunnel_included_apps_are_refused_at_once_until_there_is_one(lab, stage, excluded, included):
    """L14: RST and ICMP, no hanging; excluded apps work as if no VPN were installed."""
    assert False is (await stage.daemon.status())["tunnel"]["up"]
    for version in (4, 6):
        with pytest.raises(OSError, match=REFUSED):
            await included(f"tcp(SERVER{version})")
        with pytest.raises(OSError, match=REFUSED):
            await included(f"own = udp(SERVER{version}); own.send(b'?'); own.recv(100)")
        assert set() == await where(lab, address=SERVER[version])
        assert str(HOST[version]) == await excluded(f"ask('tcp', SERVER{version})")

    await lab.create_tunnel()

    async def is_up():
        return (await stage.daemon.status())["tunnel"]["up"]

    await until(is_up, "the tunnel is up")
    assert await is_on(stage, included, "tunnel")


@BOTH
@pytest.mark.parametrize("way", ["down", "removed"])
async def test_a_tunnel_that_goes_in_mid_flow_takes_its_flows_with_it(lab, stage, excluded, included, version, way):
    """L14, L16: nothing of them shows on the uplink, then or later; excluded flows do not notice."""
    await excluded(f"own = tcp(SERVER{version}); read_line(own)")
    await included(f"own = tcp(SERVER{version}); read_line(own)\ndatagrams = udp(SERVER{version})")
    await included("own.sendall(b'before'); read_exactly(own, 6); datagrams.send(b'before'); datagrams.recv(100)")
    assert {"tunnel"} == await stage.where(payload=b"before")
    if way == "down":
        lab.tunnel_down()
    else:
        await lab.remove_tunnel()
    stage.clear()

    await included(
        "own.setblocking(False); datagrams.setblocking(False)\n"
        "for _ in range(50):\n"
        "    with contextlib.suppress(OSError): own.sendall(b'after')\n"
        "    with contextlib.suppress(OSError): datagrams.send(b'after')\n"
        "    time.sleep(0.005)"
    )
    with pytest.raises(OSError, match=REFUSED):
        await included(f"tcp(SERVER{version})")
    await excluded("own.sendall(b'still here'); read_exactly(own, 10)")
    await lab.uplink.settle()
    assert lab.uplink.seen(payload=b"still here")
    assert [] == lab.uplink.seen(payload=b"after")

    if way == "down":
        lab.tunnel_up()
    else:
        await lab.create_tunnel()

    async def works():
        try:
            return await included(f"ask('tcp', SERVER{version})")
        except OSError:
            return None

    assert str(RELAY[version]) == await until(works, "the tunnel works again")
    await excluded("own.sendall(b'still here'); read_exactly(own, 10)")


# The uplink comes and goes


async def test_an_uplink_that_goes_down_and_comes_back(lab, stage, excluded, included):
    """L16: excluded apps are refused meanwhile, never sent into the tunnel."""
    lab.host.ip("link set eth0 down")
    stage.clear()

    async def is_refused():
        try:
            await excluded("tcp(SERVER4)")
        except OSError as error:
            return not isinstance(error, TimeoutError)
        return None

    await until(is_refused, "excluded apps are refused")
    lab.host.ip(
        "link set eth0 up\naddress replace 2001:db8:50::2/64 dev eth0\n"
        "route replace default via 192.168.50.1\nroute replace default via 2001:db8:50::1"
    )

    async def works():
        try:
            return await excluded("ask('tcp', SERVER4)"), await excluded("ask('tcp', SERVER6)")
        except OSError:
            return None

    assert (str(HOST[4]), str(HOST[6])) == await until(works, "the uplink works again")
    assert "tunnel" not in await stage.where(address=SERVER[4])


async def test_no_default_route_at_the_start_is_no_error(lab):
    """SPEC.md, "Tunnel states", offline: the tunnel's endpoint has a route of its own here."""
    lab.host.ip("route delete default\nroute delete ::/0\nroute add 203.0.113.10 via 192.168.50.1")
    async with open_stage(lab) as stage, stage.app(stage.excluded) as one, stage.app(stage.included) as other:
        for version in (4, 6):
            with pytest.raises(OSError, match=REFUSED):
                await one(f"tcp(SERVER{version})")
            assert str(RELAY[version]) == await other(f"ask('tcp', SERVER{version})")
            assert {"tunnel"} == await stage.where(address=SERVER[version])
        lab.host.ip("route add default via 192.168.50.1\nroute add default via 2001:db8:50::1")

        async def works():
            try:
                return await one("ask('tcp', SERVER4)")
            except OSError:
                return None

        assert str(HOST[4]) == await until(works, "the uplink works")


async def test_a_flow_older_than_tunsplit_never_mixes_sides(lab):
    """DESIGN.md, "The network": an excluded one goes on, an included one ends, and so reconnects in the tunnel."""
    programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
    async with start_app(lab.host, programs[0]) as one, start_app(lab.host, programs[1]) as other:
        for app in (one, other):
            await app("own = tcp(SERVER4); read_line(own)")
        config = lab.config([programs[0]])
        async with lab.tunsplit(config) as daemon:
            await lab.uplink.settle()
            lab.uplink.clear()
            await one("own.sendall(b'i go on')")
            assert b"i go on" == await one("read_exactly(own, 7)")
            with pytest.raises(OSError, match=r"reset|refused|abort|unreachable|Broken pipe|No route"):
                await other("own.sendall(b'i do not'); own.recv(100); own.sendall(b'i do not'); own.recv(100)")
            assert {"uplink"} == await where(lab, payload=b"i go on")
            assert set() == await where(lab, payload=b"i do not")
            assert str(RELAY[4]) == await other("ask('tcp', SERVER4)")
        assert [] == complaints(daemon.log)
