"""The network as it is without tunsplit: who sees whom, and by which address."""

import socket

import pytest
import trio

from tunsplit.errors import KernelError
from tunsplit.lab import addresses, open_lab

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])


def by_tunnel(lab, version):
    """Send what is for the server into the tunnel."""
    lab.host.ip(f"route replace {lab.server(version)} dev {addresses.TUNNEL_DEVICE}")


async def fetch(lab, version, path="/"):
    return (await lab.host.run(["curl", "-sS", "--max-time", "5", lab.url(version, path)])).stdout


@BOTH
async def test_the_server_sees_the_hosts_own_address_on_the_uplink(lab, version):
    assert f"{lab.seen_from_uplink(version)}\n" == await fetch(lab, version)


@BOTH
@pytest.mark.parametrize("kind", [None, "veth"])
async def test_the_server_sees_the_relays_address_from_the_tunnel(version, kind):
    async with open_lab(tunnel_kind=kind) as lab:
        by_tunnel(lab, version)

        assert f"{lab.seen_from_tunnel(version)}\n" == await fetch(lab, version)
        assert kind in (None, lab.tunnel_kind)


@BOTH
async def test_both_observers_see_their_own_side_and_not_the_other(lab, version):
    await fetch(lab, version)
    await lab.uplink.settle()
    await lab.tunnel.settle()
    assert {"out", "in"} == {seen.direction for seen in lab.uplink.seen("tcp", address=lab.server(version))}
    assert [] == lab.tunnel.seen(address=lab.server(version))
    lab.uplink.clear()

    by_tunnel(lab, version)
    await fetch(lab, version)
    await lab.uplink.settle()
    await lab.tunnel.settle()
    assert [] == lab.uplink.seen(address=lab.server(version))
    assert {"out", "in"} == {seen.direction for seen in lab.tunnel.seen("tcp", address=lab.server(version))}
    assert lab.uplink.seen("wireguard", address=addresses.RELAY[4].ip)


async def test_an_observer_counts_every_frame(lab):
    with lab.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind((str(addresses.HOST[4].ip), 4000))
        for number in range(5000):
            own.sendto(b"%032d" % number, (str(lab.server(4)), 9))
    await lab.uplink.settle()

    sent = {flow: count for flow, count in lab.uplink.flows().items() if flow.source_port == 4000}
    assert [5000] == list(sent.values())
    assert 0 == lab.uplink.dropped
    assert 1 == len(lab.uplink.seen(payload=b"%032d" % 7))


async def test_an_observer_sees_who_is_asked_for_by_arp(lab):
    await lab.host.run(["ping", "-c1", "-W1", "192.168.50.77"], check=False)
    await lab.uplink.settle()

    assert lab.uplink.seen("arp", destination="192.168.50.77")
    assert [] == lab.uplink.seen("icmp", destination="192.168.50.77")


async def test_captures_can_be_read_by_others(tmp_path):
    async with open_lab(captures=tmp_path) as lab:
        await fetch(lab, 4)
        by_tunnel(lab, 6)
        await fetch(lab, 6)
        await lab.uplink.settle()
        await lab.tunnel.settle()

    for name, version in (("uplink", 4), ("tunnel", 6)):
        command = ["tcpdump", "-nr", str(tmp_path / f"{name}.pcapng"), "tcp"]
        shown = (await trio.run_process(command, capture_stdout=True, capture_stderr=True)).stdout.decode()
        assert str(addresses.SERVER[version].ip) in shown


async def test_an_observer_that_does_not_look_says_so():
    async with open_lab(observe=False) as lab:
        with pytest.raises(KernelError, match="without observers"):
            await lab.uplink.settle()


@BOTH
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_the_echo_servers_say_who_is_seen_and_echo(lab, version, kind):
    own = trio.socket.from_stdlib_socket(lab.host.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, kind))
    with own, trio.fail_after(5):
        await own.connect((str(lab.server(version)), addresses.ECHO_PORT))
        await own.send(b"hello")
        wanted = f"{lab.seen_from_uplink(version)} {own.getsockname()[1]}\nhello".encode()
        got = b""
        while len(got) < len(wanted):
            got += await own.recv(100)
        assert wanted == got


async def test_the_http_server_sends_as_much_as_is_asked_for(lab):
    assert 200_000 == len(await fetch(lab, 4, "/bytes/200000"))
    with pytest.raises(Exception, match="404") as failure:
        await lab.host.run(["curl", "-sSf", lab.url(4, "/nothing")])
    assert any("404" in note for note in failure.value.__notes__)


@pytest.mark.parametrize(
    ("resolver", "role"),
    [
        ("192.168.50.53", "lan"),
        ("fd50::53", "lan"),
        ("192.168.50.54", "system"),
        ("2001:db8:50::54", "system"),
        ("8.8.8.8", "public"),
        ("2001:4860:4860::8888", "public"),
        ("10.64.0.1", "relay"),
        ("fd64::1", "relay"),
    ],
)
async def test_each_resolver_says_who_it_is(lab, resolver, role):
    lab.host.ip("route add 10.64.0.1 dev wg0\nroute add fd64::1 dev wg0")
    dig = ["dig", "+short", "+time=2", f"@{resolver}", "who.is"]

    assert f'"{role}"\n' == (await lab.host.run([*dig, "TXT"])).stdout
    kind = "AAAA" if ":" in resolver else "A"
    assert f"{resolver}\n" == (await lab.host.run([*dig, kind])).stdout


async def test_iperf3_has_a_server(lab):
    async with lab.iperf_server():
        done = await lab.host.run(["iperf3", "-c", str(lab.server(6)), "-n", "1M"])
    assert "receiver" in done.stdout


# What a test may vary


@pytest.mark.parametrize("uplink", [(4,), (6,), (4, 6)])
@pytest.mark.parametrize("tunnel", [(4,), (6,), (4, 6), ()])
async def test_a_side_has_the_families_that_it_is_given(uplink, tunnel):
    async with open_lab(uplink=uplink, tunnel=tunnel) as lab:
        assert uplink == await families(lab, "eth0")
        assert tunnel == await families(lab, "wg0")
        for version in tunnel:  # whatever the uplink has must carry the tunnel
            by_tunnel(lab, version)
            assert f"{lab.seen_from_tunnel(version)}\n" == await fetch(lab, version)


async def families(lab, device):
    found = []
    for version in (4, 6):
        command = ["ip", f"-{version}", "-brief", "address", "show", "dev", device, "scope", "global"]
        if (await lab.host.run(command)).stdout:
            found.append(version)
    return tuple(found)


async def test_a_host_may_have_no_ipv6():
    async with open_lab(ipv6=False) as lab:
        assert "" == (await lab.host.run(["ip", "-6", "address"])).stdout
        by_tunnel(lab, 4)
        assert f"{lab.seen_from_tunnel(4)}\n" == await fetch(lab, 4)


@pytest.mark.parametrize("mode", [0, 1, 2])
async def test_the_hosts_reverse_path_filter_is_chosen(mode):
    async with open_lab(rp_filter=mode, tunnel=None) as lab:
        done = await lab.host.run(["cat", "/proc/sys/net/ipv4/conf/eth0/rp_filter"])
        assert f"{mode}\n" == done.stdout


async def test_main_has_no_way_into_the_tunnel(lab):
    for version in (4, 6):
        assert "wg0" not in (await lab.host.run(["ip", f"-{version}", "route", "get", "192.0.2.1"], check=False)).stdout


# The tunnel comes and goes


@pytest.mark.parametrize("kind", [None, "veth"])
async def test_the_tunnel_goes_down_and_comes_up(kind):
    async with open_lab(tunnel_kind=kind) as lab:
        lab.tunnel_down()
        assert () == await reach(lab)
        await lab.tunnel.settle()
        lab.tunnel_up()
        assert (4, 6) == await reach(lab)


@pytest.mark.parametrize("kind", [None, "veth"])
async def test_the_tunnel_is_removed_and_made_again(kind):
    async with open_lab(tunnel_kind=kind) as lab:
        for _ in range(2):
            await lab.remove_tunnel()
            assert "wg0" not in (await lab.host.run(["ip", "link"])).stdout
            await lab.tunnel.settle()
            await lab.create_tunnel()
            assert (4, 6) == await reach(lab)
        await lab.tunnel.settle()
        assert lab.tunnel.seen("tcp", address=lab.server(6))


@pytest.mark.parametrize("kind", [None, "veth"])
async def test_a_lab_may_start_without_a_tunnel(kind):
    async with open_lab(tunnel=None, tunnel_kind=kind) as lab:
        assert "wg0" not in (await lab.host.run(["ip", "link"])).stdout
        await lab.create_tunnel()
        assert (4, 6) == await reach(lab)
        await lab.tunnel.settle()
        assert lab.tunnel.seen("tcp", address=lab.server(4))


async def reach(lab):
    """The families in which the server is reached through the tunnel."""
    found = []
    for version in (4, 6):
        try:
            by_tunnel(lab, version)
        except KernelError:  # no route leads through a device that is down
            continue
        assert f"{lab.seen_from_tunnel(version)}\n" == await fetch(lab, version)
        found.append(version)
    return tuple(found)
