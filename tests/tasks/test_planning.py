"""What is done and said about the host without a daemon."""

from ipaddress import ip_address

import pytest

from tests.hosts import FAR4, FAR6, FWMARK, TUN, TUNNEL, UPLINK, open_host
from tunsplit.app import open_daemon
from tunsplit.config.addresses import Listener
from tunsplit.config.schema import Config, Control, Dns, Firewall, Lan, Tun, Tunnel
from tunsplit.errors import TunsplitError
from tunsplit.kernel import hostconfig, nft, nftguard, resolvconf
from tunsplit.kernel.instance import Instance
from tunsplit.tasks.planning import Part, block, parts

pytestmark = pytest.mark.netns

NAME = "ts-plan"


@pytest.fixture
def host():
    with open_host() as made:
        yield made


@pytest.fixture
def config(tmp_path):
    return Config(
        tunnel=Tunnel(interface=TUNNEL, fwmark=FWMARK),
        tun=Tun(name=NAME),
        control=Control(socket=str(tmp_path / "c.sock")),
    )


def by_heading(found: list[Part]) -> dict[str, Part]:
    return {part.heading: part for part in found}


async def test_the_plan_is_what_a_start_does(host, config):
    before = host.state()
    planned = parts(config)
    assert before == host.state()
    assert all(not part.now for part in planned if part.heading != "sysctls")

    async with open_daemon(config):
        for part in parts(config):
            assert (part.heading, sorted(part.wanted)) == (part.heading, sorted(part.now))
            then = by_heading(planned)[part.heading]
            if part.heading != "sysctls":
                assert sorted(then.wanted) == sorted(part.now)
        for line in by_heading(planned)["sysctls"].wanted:
            path, _, value = line.removeprefix("sysctl -w ").partition("=")
            assert value == host.sysctl(path)
    assert before == host.state()


def test_a_configured_mtu_is_planned(host, config):
    wanted = by_heading(parts(config.replaced(tun=Tun(name=NAME, mtu=1400))))["devices"].wanted

    assert f"ip link set {NAME} mtu 1400" in wanted


@pytest.mark.parametrize("taken", [True, False])
def test_resolvers_are_planned_where_they_are_taken_over(host, config, monkeypatch, taken):
    monkeypatch.setattr(resolvconf, "is_taken", lambda: taken)
    monkeypatch.setattr(resolvconf, "read", lambda: resolvconf.ResolvConf((ip_address("192.0.2.53"),)))
    assert str(resolvconf.PATH) not in by_heading(parts(config))

    listen = (Listener(ip_address("127.0.0.54"), 53), Listener(ip_address("127.0.0.54"), 5353))
    part = by_heading(parts(config.replaced(dns=Dns(take_over=True, listen=listen))))[str(resolvconf.PATH)]

    assert ("nameserver 127.0.0.54",) == part.wanted
    assert ("nameserver 127.0.0.54" if taken else "nameserver 192.0.2.53",) == part.now


def test_block_closes_and_undo_opens(host, config):
    before = host.state()
    block(config)
    block(config)

    assert ["closed", "closed"] == [host.way(FAR4), host.way(FAR6)]
    assert [] == [line for part in parts(config) for line in part.now if NAME in line and not part.is_text]
    hostconfig.undo()
    assert before == host.state()


def test_block_does_not_take_a_device_that_bears_the_tuns_name(host, config):
    named = config.replaced(tun=Tun(name=TUN))
    block(named)

    assert f"dev {TUN}" not in host.ip("route show table 7500")
    assert UPLINK in host.ip("route show table 7501")


def test_block_leaves_a_daemon_alone(host, config):
    before = host.state()
    with Instance.acquire(), pytest.raises(TunsplitError, match="another tunsplit is at work"):
        block(config)
    assert before == host.state()


async def test_whoever_leaves_the_way_closed_leaves_the_guard_and_whoever_comes_next_fits_it(host, config):
    before = host.state()
    async with open_daemon(config, on_stop="block"):
        standing = nftguard.listing()
    assert standing.replace("flags owner", "flags ") == nftguard.listing()
    part = by_heading(parts(config))["nftables, guard"]
    # What a start would change of it is that it has an owner again.
    assert ["\tflags owner"] == [line for line in part.wanted if line not in part.now]

    allowing = config.replaced(lan=Lan(allow=True))
    assert "192.168.50.0/24" not in nftguard.listing()
    block(allowing)
    assert "192.168.50.0/24" in nftguard.listing()
    async with open_daemon(config):
        assert standing == nftguard.listing()

    block(config)
    assert nftguard.listing()
    block(config.replaced(firewall=Firewall(enabled=False)))
    assert "" == nftguard.listing()
    block(config)
    nft.delete()
    assert [f"nft table {nftguard.TABLE}"] == [line for line in hostconfig.undo() if "nft" in line]
    assert before == host.state()  # of which the guard knew
