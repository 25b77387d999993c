"""Our own sockets: bound, marked, few, and not for long."""

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from tests.fakes.resolvers import query
from tests.hosts import own_namespace, run
from tunsplit.engine.dnstable import Route, Server
from tunsplit.engine.resolver import Channel, Resolver
from tunsplit.names import MARK_TUNNEL, MARK_UPLINK
from tunsplit.tasks import upstream as module
from tunsplit.tasks.chance import Chance
from tunsplit.tasks.upstream import MOST_AGE_S, MOST_USES, Upstream

pytestmark = pytest.mark.netns

RELAY, OTHER, FAR = map(ip_address, ("10.64.0.1", "10.64.0.2", "198.51.100.53"))
NOW = 1000.0


def server(address=RELAY, route: Route = Route.TUNNEL) -> Server:
    return Server(address, route, "row")


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """Both sides are devices with a network behind them in which nobody is."""
    with own_namespace():
        for device in ("wg0", "eth0"):
            run("ip", "link", "add", device, "type", "veth", "peer", f"{device}-far")
        for device in ("lo", "wg0", "eth0", "wg0-far", "eth0-far"):
            run("ip", "link", "set", device, "up")
        run("ip", "address", "add", "10.64.0.9/24", "dev", "wg0")
        run("ip", "address", "add", "198.51.100.9/24", "dev", "eth0")
        devices = {Route.TUNNEL: "wg0", Route.OUTSIDE: "eth0", Route.LAN: "eth0"}
        made = Upstream(lambda route, _: devices[route], Chance().below, lambda: NOW)
        made.resolver = Resolver(made, lambda *_: None, Chance().below)
        yield made
        made.close()


def opened(upstream: Upstream, to: Server, now: float = NOW) -> Channel:
    channel = upstream.open(to, over_tcp=False, now=now)
    assert channel is not None
    return channel


def sockets() -> int:
    return len(run("ss", "-Hun").splitlines())


@pytest.mark.parametrize(
    ("address", "route", "device", "mark"),
    [(RELAY, Route.TUNNEL, "wg0", MARK_TUNNEL), (FAR, Route.OUTSIDE, "eth0", MARK_UPLINK)],
)
def test_a_question_leaves_by_its_side_with_its_mark(upstream, address, route, device, mark):
    rule = f"add rule inet seen out udp dport 53 oifname {device} meta mark {mark} counter"
    run("nft", f"add table inet seen; add chain inet seen out {{ type filter hook output priority 0; }}; {rule}")
    channel = opened(upstream, server(address, route))

    assert upstream.send(channel, query())
    assert "packets 1 " in run("nft", "list", "table", "inet", "seen")


def test_a_socket_does_not_leave_its_side(upstream):
    """Bound to the tunnel's device, it does not follow the routes, which lead to the other."""
    rules = "".join(f"add rule inet seen out udp dport 53 oifname {device} counter;" for device in ("eth0", "wg0"))
    run("nft", f"add table inet seen; add chain inet seen out {{ type filter hook output priority 0; }}; {rules}")

    assert upstream.send(opened(upstream, server(FAR)), query())
    shown = run("nft", "list", "table", "inet", "seen")
    assert 'oifname "eth0" counter packets 0 ' in shown
    assert 'oifname "wg0" counter packets 1 ' in shown


def test_what_cannot_be_sent_is_said_so(upstream):
    channel = opened(upstream, server())
    run("ip", "link", "set", "wg0", "down")

    assert not upstream.send(channel, query())


def test_on_the_lan_no_public_address_is_asked(upstream):
    assert upstream.open(server(FAR, Route.LAN), over_tcp=False, now=NOW) is None
    assert upstream.open(server(RELAY, Route.LAN), over_tcp=False, now=NOW) is not None


def test_this_host_is_beside_the_tunnel(upstream):
    assert upstream.open(server(ip_address("127.0.0.1")), over_tcp=False, now=NOW) is None
    assert upstream.open(server(ip_address("127.0.0.1"), Route.LAN), over_tcp=False, now=NOW) is not None


def test_before_it_runs_there_are_no_connections(upstream):
    assert upstream.open(server(), over_tcp=True, now=NOW) is None


def test_a_port_serves_few_questions(upstream):
    channels = [opened(upstream, server()) for _ in range(10 * MOST_USES)]

    assert 10 <= len(set(map(id, channels)))
    assert module.POOL >= sockets()


def test_a_port_does_not_serve_for_long(upstream):
    first = [opened(upstream, server()) for _ in range(MOST_USES)]
    later = [opened(upstream, server(), NOW + MOST_AGE_S) for _ in range(MOST_USES)]

    assert set() == set(map(id, first)) & set(map(id, later))


def test_sockets_that_nobody_needs_are_closed(upstream):
    opened(upstream, server())
    opened(upstream, server(OTHER), NOW + 1)
    upstream.sweep(NOW + MOST_AGE_S)
    assert 1 == sockets()
    upstream.sweep(NOW + 1 + MOST_AGE_S)

    assert 0 == sockets()
    assert 0 == upstream.statistics()["upstream_sockets"]


def test_a_socket_that_somebody_waits_on_stays_open_until_he_is_answered(upstream):
    channel = opened(upstream, server())
    channel.attempts[1] = None  # type: ignore[assignment]  # whoever it is
    upstream.sweep(NOW + MOST_AGE_S)
    assert 1 == sockets()
    channel.attempts.clear()
    upstream.release(channel)

    assert 0 == sockets()


def test_sockets_are_bounded_on_each_route(upstream, monkeypatch):
    monkeypatch.setattr(module, "MOST_SOCKETS", 2)
    monkeypatch.setattr(module, "POOL", 1)
    held = [opened(upstream, server(address)) for address in (RELAY, OTHER)]

    assert upstream.open(server(ip_address("10.64.0.3")), over_tcp=False, now=NOW) is None
    assert held[0] is opened(upstream, server(), NOW + MOST_AGE_S)
    assert upstream.open(server(FAR, Route.OUTSIDE), over_tcp=False, now=NOW) is not None


def test_without_a_route_there_is_no_socket(upstream):
    run("ip", "link", "set", "wg0", "down")

    assert upstream.open(server(), over_tcp=False, now=NOW) is None
    assert 0 == sockets()


def test_without_its_device_there_is_no_socket(upstream):
    run("ip", "link", "del", "wg0")

    assert upstream.open(server(), over_tcp=False, now=NOW) is None
    assert 0 == sockets()
