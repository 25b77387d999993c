"""What telling one socket of its path, and no other, relies on from Linux."""

import socket
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.hosts import FAR4, FAR6, TUN4, TUN6, open_host
from tunsplit.engine.steering import into_tun
from tunsplit.host import Rule
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.kernel.tun import Tun
from tunsplit.wire import craft, vnet
from tunsplit.wire.ip import parse_untrusted

pytestmark = pytest.mark.netns

NAME = "ts-path"
TABLE, NARROW = 7500, 7508
FAR = {4: ip_address(FAR4), 6: ip_address(FAR6)}
OWN = {4: ip_address(TUN4), 6: ip_address(TUN6)}
BOTH = pytest.mark.parametrize("version", [4, 6])
HEADERS = {4: 28, 6: 48}
DISCOVER = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}  # IP(V6)_MTU_DISCOVER
PATH_MTU = {4: (socket.IPPROTO_IP, 14), 6: (socket.IPPROTO_IPV6, 24)}  # IP(V6)_MTU
WANT, DO, PROBE = 1, 2, 3


class Paths:
    """A tun into which a host's default leads, and who sends there."""

    def __init__(self, host, kernel, tun):
        self.kernel, self.tun = kernel, tun
        host.ip(f"link set {NAME} mtu 1420 up")
        self.link = host.link(NAME)
        for version, own in OWN.items():
            host.ip(f"address add {own} dev {NAME}" + (" nodad" if version == 6 else ""))
            kernel.replace_route(into_tun(self.link, ip_network({4: "0.0.0.0/0", 6: "::/0"}[version]), TABLE, own))
            kernel.add_rule(Rule(version, 81, iif="lo", table=TABLE))

    @contextmanager
    def socket(self, version, discover=DO):
        family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
        with socket.socket(family, socket.SOCK_DGRAM) as made:
            made.setsockopt(*DISCOVER[version], discover)
            made.connect((str(FAR[version]), 9))
            made.setblocking(False)
            yield made

    def sent(self, sock, size):
        """What comes out of the tun of a datagram: sizes of packets; or that it is too long."""
        self.packets()
        try:
            sock.send(bytes(size))
        except OSError as error:
            return error.strerror
        return [len(packet) for packet in self.packets()]

    def packets(self):
        buffer, found = bytearray(70000), []
        while size := self.tun.read_into(buffer):
            found.append(bytes(buffer[vnet.SIZE : size]))
        return found

    def too_big(self, sock, version, mtu=1300):
        """Have a router say so of what this socket sends."""
        self.packets()
        sock.send(bytes(1340))
        (packet,) = self.packets()
        error = craft.too_big(packet, parse_untrusted(packet, len(packet)), (OWN[version] + 1).packed, mtu)
        assert error is not None
        self.tun.write(vnet.NONE + error)

    def route(self, version, table=TABLE, **others):
        return replace(into_tun(self.link, ip_network(FAR[version]), table, OWN[version]), **others)


@pytest.fixture
def paths():
    with open_host() as host, Rtnetlink() as kernel, Tun(NAME) as tun:
        yield Paths(host, kernel, tun)


@BOTH
def test_an_error_to_one_socket_narrows_the_path_for_all(paths, version):
    with paths.socket(version) as told, paths.socket(version) as other:
        paths.too_big(told, version)

        assert "Message too long" == paths.sent(other, 1340)


@BOTH
def test_under_a_route_of_its_own_it_goes_when_that_goes(paths, version):
    above = paths.route(version, metric=2)
    with paths.socket(version) as told, paths.socket(version) as other:
        paths.kernel.replace_route(above)
        paths.too_big(told, version)
        paths.kernel.delete_route(above)

        assert "Message too long" == paths.sent(told, 1340)
        assert [1340 + HEADERS[version]] == paths.sent(told, 1340) == paths.sent(other, 1340)


def test_routes_of_ipv4_that_differ_in_destination_only_are_one(paths):
    above = paths.route(4)
    with paths.socket(4) as told, paths.socket(4) as other:
        paths.kernel.replace_route(above)
        paths.too_big(told, 4)
        paths.kernel.delete_route(above)

        assert "Message too long" == paths.sent(other, 1340)


@BOTH
@pytest.mark.parametrize("discover", [WANT, DO, PROBE])
def test_a_rule_of_ports_gives_one_socket_a_path_of_its_own(paths, version, discover):
    """And each treats it as it was asked to: cuts, refuses, or goes on."""
    with paths.socket(version, discover) as told, paths.socket(version, DO) as other:
        paths.sent(told, 1340)
        port = told.getsockname()[1]
        paths.kernel.replace_route(paths.route(version, NARROW, mtu=1300))
        paths.kernel.add_rule(
            Rule(version, 79, iif="lo", to=ip_network(FAR[version]), ipproto=17, sport=(port, port), table=NARROW)
        )
        # A route of IPv6 is looked for anew only when one above it has changed.
        paths.kernel.replace_route(paths.route(version, metric=2))
        paths.kernel.delete_route(paths.route(version, metric=2))

        whole = [1340 + HEADERS[version]]
        cut = {4: [1300, 88], 6: [1296, 148]}[version]
        assert {WANT: cut, DO: "Message too long", PROBE: whole}[discover] == paths.sent(told, 1340)
        assert 1300 == told.getsockopt(*PATH_MTU[version])
        assert whole == paths.sent(other, 1340)
        assert 1420 == other.getsockopt(*PATH_MTU[version])
