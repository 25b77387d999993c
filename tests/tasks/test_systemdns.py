"""System DNS is found in files, and followed as they and the network change."""

from ipaddress import ip_address, ip_interface

import pytest
import trio

from tests.fakes.judges import as_real
from tunsplit.engine.sides import SideFacts, Sides
from tunsplit.errors import KernelError
from tunsplit.host import Address, Link, NamedServers, Neighbour, NeighbourState, Snapshot
from tunsplit.kernel import systembus
from tunsplit.tasks import systemdns
from tunsplit.tasks.systemdns import Settings, SystemDnsFinder

LINKS = ETH0, WG0 = Link(2, "eth0", 1500), Link(7, "wg0", 1420)
ROUTER, LAN, PUBLIC = map(ip_address, ("192.168.50.1", "192.168.50.53", "9.9.9.9"))
SETTINGS = Settings("wg0", (ip_address("10.64.0.1"),))


class FakeNetwork:
    """One uplink and a tunnel, which know what they are told."""

    def __init__(self):
        addresses = Address(2, ip_interface("192.168.50.2/24")), Address(7, ip_interface("10.64.0.2/24"))
        self.snapshot = Snapshot(LINKS, addresses)
        self.mac = b"\1" * 6
        self.asked = 0
        self.broken = False
        self.gateway = ROUTER
        self.move(ROUTER)

    def move(self, gateway, mac=b"\1" * 6):
        uplink = SideFacts(ETH0, (ip_interface("192.168.50.2/24"),), gateway)
        self.sides = Sides(uplink, uplink, SideFacts(WG0, (ip_interface("10.64.0.2/24"),)))
        self.mac, self.gateway = mac, gateway

    def neighbours(self, index):
        if self.broken:
            raise KernelError("gone")
        state = NeighbourState.REACHABLE if self.mac else NeighbourState.FAILED
        return [Neighbour(index, self.gateway, self.mac, state)]

    def neighbour_use(self, index, address):
        self.asked += 1


@pytest.fixture
def network():
    return FakeNetwork()


@pytest.fixture
def finder(network, tmp_path):
    (tmp_path / "etc").mkdir()
    return SystemDnsFinder(SETTINGS, as_real(network), as_real(network), root=tmp_path)


def resolv_conf(root, *servers):
    new = root / "etc/new"
    new.write_text("".join(f"nameserver {server}\n" for server in servers))
    new.replace(root / "etc/resolv.conf")


async def test_resolv_conf_s_are_the_host_s_but_for_stubs_and_the_vpn_s(finder, tmp_path):
    resolv_conf(tmp_path, "127.0.0.53", "10.64.0.1", "10.64.0.7", "192.168.50.2", LAN, "fe80::1%wg0", PUBLIC)
    changes = []
    finder.on_change = lambda: changes.append(finder.addresses())
    await finder.refresh()
    assert (LAN, PUBLIC) == finder.addresses()
    assert {"192.168.50.53": "resolv.conf", "9.9.9.9": "resolv.conf"} == finder.sources()
    await finder.refresh()
    assert [(LAN, PUBLIC)] == changes


async def test_what_is_written_anew_is_read_anew(finder, tmp_path):
    await finder.refresh()
    assert () == finder.addresses()
    resolv_conf(tmp_path, PUBLIC)
    await finder.refresh()
    assert (PUBLIC,) == finder.addresses()


async def test_on_another_network_a_private_one_is_not_asked_until_it_is_written_anew(finder, network, tmp_path):
    resolv_conf(tmp_path, LAN, PUBLIC)
    await finder.refresh()
    network.move(ROUTER, b"\2" * 6)  # the same address at somebody else's
    await finder.refresh()
    assert (PUBLIC,) == finder.addresses()
    network.move(ROUTER, None)
    await finder.refresh()
    assert (PUBLIC,) == finder.addresses()
    assert 0 < network.asked  # the kernel is to look for the gateway
    network.broken = True
    await finder.refresh()
    assert (PUBLIC,) == finder.addresses()
    network.broken = False
    network.move(ROUTER)
    await finder.refresh()
    assert (LAN, PUBLIC) == finder.addresses()
    network.move(ip_address("192.168.50.254"), b"\2" * 6)
    resolv_conf(tmp_path, LAN)
    await finder.refresh()
    assert (LAN,) == finder.addresses()


async def test_what_was_said_in_between_is_said_to_have_changed(finder, network, tmp_path):
    """Who asks while the gateway is out of sight is told of nothing; and is told again once it is back."""
    resolv_conf(tmp_path, LAN)
    await finder.refresh()
    changes = []
    finder.on_change = lambda: changes.append(finder.addresses())
    network.move(ROUTER, None)
    assert () == finder.addresses()
    network.move(ROUTER)
    await finder.refresh()
    assert [(LAN,)] == changes


async def test_configured_ones_are_no_others_and_private_where_they_were_configured(finder, network, tmp_path):
    resolv_conf(tmp_path, "1.1.1.1")
    finder.configure(Settings("wg0", SETTINGS.tunnel_dns, (LAN, ip_address("127.0.0.53"))))
    await finder.refresh()
    assert ((LAN,), {"192.168.50.53": "configured"}) == (finder.addresses(), finder.sources())
    network.move(ip_address("192.168.50.254"), b"\2" * 6)
    await finder.refresh()
    assert () == finder.addresses()
    finder.configure(Settings("wg0", SETTINGS.tunnel_dns, (LAN, PUBLIC)))
    await finder.refresh()
    assert (LAN, PUBLIC) == finder.addresses()


async def test_behind_a_stub_services_leases_and_merged_lists_tell(finder, tmp_path, monkeypatch):
    """In the order in which they are to be believed, each as long as those before are silent."""
    finder._is_hosts = True  # noqa: SLF001 -- as where pid 1 is in our network namespace
    resolv_conf(tmp_path, "127.0.0.53")
    for folder in ("run/NetworkManager", "run/systemd/resolve", "run/systemd/netif/leases"):
        (tmp_path / folder).mkdir(parents=True)
    told = {"resolved": [NamedServers("systemd-resolved", (LAN,), 2), NamedServers("systemd-resolved", (PUBLIC,), 7)]}
    told["nm"] = [NamedServers("NetworkManager", (PUBLIC,), "eth0")]
    monkeypatch.setattr(systembus, "ask_resolved", lambda _: told["resolved"])
    monkeypatch.setattr(systembus, "ask_networkmanager", lambda _: told["nm"])
    (tmp_path / "run/systemd/netif/leases/2").write_text("DNS=1.0.0.1\n")
    merged = tmp_path / "run/systemd/resolve/resolv.conf"
    seen = []
    for silent in ("", "resolved", "nm", "lease", "merged"):
        if silent in told:
            told[silent] = []
        elif silent == "lease":
            (tmp_path / "run/systemd/netif/leases/2").unlink()
        merged.write_text(f"# without {silent}\n" + ("" if silent == "merged" else "nameserver 1.1.1.1\n"))
        await finder.refresh()
        seen.append(finder.sources())
    assert [
        {"192.168.50.53": "systemd-resolved"},
        {"9.9.9.9": "NetworkManager"},
        {"1.0.0.1": "DHCP lease"},
        {"1.1.1.1": "merged list of systemd-resolved"},
        {},
    ] == seen


async def test_elsewhere_than_in_pid_1_s_network_namespace_only_resolv_conf_counts(finder, tmp_path):
    finder._is_hosts = False  # noqa: SLF001 -- as there
    (tmp_path / "run/systemd/resolve").mkdir(parents=True)
    (tmp_path / "run/systemd/resolve/resolv.conf").write_text("nameserver 1.1.1.1\n")
    await finder.refresh()
    assert () == finder.addresses()


async def test_it_is_watched_and_the_network_wakes_it(finder, network, tmp_path, monkeypatch):
    monkeypatch.setattr(systemdns, "POLL_S", 0.01)
    resolv_conf(tmp_path, LAN)
    async with trio.open_nursery() as nursery:
        await nursery.start(finder.watch)
        assert (LAN,) == finder.addresses()
        changed = [trio.Event(), trio.Event()]
        finder.on_change = lambda: changed.pop(0).set()
        woken, reread = changed
        network.move(ROUTER, b"\2" * 6)
        finder.look_again()
        await woken.wait()
        assert () == finder.addresses()
        resolv_conf(tmp_path, PUBLIC)
        await reread.wait()
        assert (PUBLIC,) == finder.addresses()
        nursery.cancel_scope.cancel()
