"""DNS as a whole: the proxy, what brings it questions, and what the table is made of just now.

apps' packets ─▶ DnsCapture ─▶ DnsProxy ─▶ sockets on one side
                  └▶ our listener in the tun ──┤
our stub on loopback ──────────────────────────┘
"""

import logging
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address

import trio

from tunsplit.config import Config
from tunsplit.engine.dnstable import DnsTable, Route
from tunsplit.engine.interception import CLEAR
from tunsplit.engine.nat import Nat
from tunsplit.errors import KernelError
from tunsplit.host import FAMILIES, IPAddress
from tunsplit.kernel import resolvconf
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.dnscapture import Conversation, DnsCapture
from tunsplit.tasks.dnsconnections import Ask, Connections, open_listener
from tunsplit.tasks.dnsproxy import DnsProxy, Recent, Reply, boottime
from tunsplit.tasks.dnsstub import Stub
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.network import Network
from tunsplit.tasks.sources import SocketSource
from tunsplit.tasks.systemdns import Settings, SystemDnsFinder
from tunsplit.tasks.tuns import Tuns

Json = dict[str, object]
PassedBy = Callable[[bytes, bytes, float], None]

logger = logging.getLogger(__name__)


class RoutesNetwork:
    """The network as the proxy needs to know it."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._gateways: dict[tuple[int, IPAddress], bytes] = {}

    def side_device(self, route: Route, family: int) -> str | None:
        """The device by which questions of this route leave; None: there is no way just now."""
        facts = self._network.facts(_side(route), family)
        return facts.link.name if facts is not None else None

    def side_identity(self, route: Route) -> Hashable:
        """What tells one network behind a route from another: device, addresses, gateway and its Ethernet address."""
        found = []
        for family in FAMILIES:
            facts = self._network.facts(_side(route), family)
            if facts is not None:
                gateway = facts.gateway(family)
                mac = self._mac(facts.link.index, gateway) if gateway is not None else None
                found.append((facts.link.index, facts.addresses, gateway, mac))
        return tuple(found)

    def _mac(self, index: int, gateway: IPAddress) -> bytes | None:
        """The gateway's; while the kernel does not know it, the one that was known last."""
        key = (index, gateway)
        mac = self._network.mac_of(index, gateway)
        if mac is not None:
            # A handful of networks a day: those of the past are of no use.
            self._gateways = {known: own for known, own in self._gateways.items() if known[0] != index} | {key: mac}
        return self._gateways.get(key)


def _finding(config: Config) -> Settings:
    return Settings(config.tunnel.interface, config.tunnel.dns, config.dns.system)


def _side(route: Route) -> str:
    return "tunnel" if route is Route.TUNNEL else "uplink"


class Dns:
    """What the daemon has of DNS."""

    def __init__(
        self,
        config: Config,
        *,
        tuns: Tuns,
        nat: Nat,
        network: Network,
        answers: Answers,
        judge: Judge,
        source: SocketSource,
        rtnetlink: Rtnetlink,
    ) -> None:
        """Listen for questions on loopback, if the configuration says so; nothing is answered before `run`.

        Args:
            config: as it applies now.
            tuns: where captured questions come from.
            nat: the table of flows.
            network: the sides.
            answers: words for the apps.
            judge: judges who asks on loopback.
            source: finds who asks on loopback.
            rtnetlink: tells which network the host is in.

        Raises:
            KernelError: an address or port of `dns.listen` cannot be had.
        """
        self._config = config
        self._network = network
        self._tun = tuns.own
        self._listeners: list[trio.SocketListener] = []
        self._is_client = judge.is_client
        self._finder = SystemDnsFinder(_finding(config), network, rtnetlink)
        self._finder.on_change = self._apply
        table = self._table()
        self.proxy = DnsProxy(table, RoutesNetwork(network), filter_aaaa=config.dns.filter_aaaa)
        self.capture = DnsCapture(
            tuns=tuns, nat=nat, network=network, answers=answers, ask=self.proxy.ask, table=table,
            is_resolver=judge.is_resolver, is_client=judge.is_client, random_below=secrets.randbelow,
        )  # fmt: skip
        self._counters: Counter[str] = Counter()
        self._connections = Connections(self._identify, self._counters)
        self._stub = Stub(
            config.dns.listen, source=source, judge=judge, ask=self.proxy.ask,
            hold_s=lambda: self._config.split.hold, counters=self._counters,
        )  # fmt: skip

    def close(self) -> None:
        """Give all sockets back."""
        self._stub.close()
        self.proxy.close()

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """Have /etc/resolv.conf name our stub within the block, where the configuration asks for it.

        Where it does not, a daemon that was killed may have been told otherwise: its stub is no more.
        """
        dns = self._config.dns
        own = [one.address for one in dns.listen if one.port == CLEAR] if dns.take_over else []
        with ExitStack() as stack:
            try:
                stack.enter_context(resolvconf.taken_over(own))
            except KernelError as error:  # the table holds all the same, but for whom an app asks is not known
                logger.warning("resolv.conf is left as it is", extra={"error": str(error)})
            yield

    # From the tun

    def before(self, passed_by: PassedBy) -> PassedBy:
        """Take what our own listener sends out of what the fast path could not take; all else is `passed_by`'s."""

        def take(vnet_header: bytes, packet: bytes, now: float) -> None:
            if not self.capture.passed_by(vnet_header, packet, now):
                passed_by(vnet_header, packet, now)

        return take

    def _identify(self, stream: trio.SocketStream) -> tuple[int | None, Ask] | None:
        address, port, *_ = stream.socket.getpeername()
        peer = ip_address(address)
        flow = self.capture.flow_of(peer.packed, port, peer.version)
        if flow is None:
            return None
        conversation = Conversation()

        def ask(message: bytes, reply: Reply) -> bool:
            if not flow.passes:
                return False
            try:
                asker = conversation.asker_of(flow, client=self._is_client(flow.owner))
            except KernelError:
                self._counters["dns_askers_unknown"] += 1
                return False
            self.proxy.ask(message, asker, reply, boottime())
            return flow.passes

        return flow.app.uid if flow.app else None, ask

    # Changes

    def configure(self, config: Config) -> None:
        """Follow another configuration."""
        self._config = config
        self._finder.configure(_finding(config))
        self._apply()

    def network_changed(self) -> None:
        """Follow a change of the network: the table is known first, since a private resolver may be another's now."""
        self._finder.look_again()
        self._apply()

    def _apply(self) -> None:
        table = self.capture.table = self._table()
        self.proxy.configure(table, filter_aaaa=self._config.dns.filter_aaaa)
        self.capture.review(trio.current_time())

    def _table(self) -> DnsTable:
        dns = self._config.dns
        return DnsTable(
            dns.platform,
            custom=dns.custom,
            relay=self._config.tunnel.dns or self._first_of_tunnel(),
            system=self._finder.addresses(),
            lan_allow=self._config.lan.allow,
            fallback=dns.fallback,
            listed_only=dns.intercept == "listed",
        )

    def _first_of_tunnel(self) -> tuple[IPAddress, ...]:
        """The first address of the tunnel's subnet, of each family; where the prefix has no room, there is none."""
        tunnel = self._network.sides.tunnel
        own = tunnel.addresses if tunnel is not None else ()
        return tuple(dict.fromkeys(
            one.network.network_address + 1 for one in own if one.network.prefixlen < one.max_prefixlen
        ))  # fmt: skip

    # Tasks

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled; started once it does."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._finder.watch)
            nursery.start_soon(self.proxy.run)
            nursery.start_soon(self._stub.run)
            for listener in self._listen():
                nursery.start_soon(trio.serve_listeners, self._connections.converse, [listener])
            task_status.started()

    def tun_renewed(self) -> None:
        """The tun has been made anew: what comes in by it is for our listeners again."""
        for listener in self._listeners:
            try:
                # By its index, which is another now (net/core/sock.c, sock_setbindtodevice).
                listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._tun.name.encode())
            except OSError as error:
                logger.warning("questions over TCP are not answered", extra={"error": str(error)})

    def _listen(self) -> Iterable[trio.SocketListener]:
        for version in FAMILIES:
            own = self._network.own_address(version)
            if own is None:
                continue
            try:
                listener = open_listener(ip_address(own), 0, self._tun.name)
            except KernelError as error:
                logger.warning("questions over TCP are refused", extra={"version": version, "error": str(error)})
                continue
            self._listeners.append(listener)
            self.capture.listeners[version] = listener.socket.getsockname()[1]
            yield listener

    # What is shown

    def routes(self) -> list[Json]:
        """Where questions of each class of apps go just now."""
        shown: list[Json] = []
        classes = [("normal", False, False), ("excluded", True, False)]
        if self._config.tunnel.client:
            classes.append(("client", False, True))
        for name, excluded, client in classes:
            choice = self.capture.table.choose(excluded=excluded, tunnel_up=self._network.tunnel_up, client=client)
            servers = [{"address": str(one.address), "route": one.route.value} for one in choice.servers]
            shown.append({"app": name, "route": choice.route.value, "servers": servers, "row": choice.row})
        return shown

    def setting(self) -> str:
        """Which resolver setting the configuration is: default, private custom, public custom or mixed."""
        settings = self.capture.table.settings
        return settings[0].value if len(settings) == 1 else "mixed"

    def recent(self) -> list[Recent]:
        """The latest questions, oldest first."""
        return self.proxy.recent()

    def statistics(self) -> dict[str, int]:
        """Counters, and how much is held."""
        own = {**self.capture.counters, **self._counters}
        return {**own, **{f"dns_{name}": count for name, count in self.proxy.statistics().items()}}
