"""The daemon: acquires in order, releases in reverse. The only wiring.

app ─▶ tun ─▶ outbound.pump ─▶ a side's packet socket          (known flows)
                   └▶ admit ─▶ attribute ─▶ judge ─▶ open       (first packets)
app ◀─ tun ◀─ inbound.pump ◀─ a side's packet socket
"""

import gc
import logging
import pwd
import secrets
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

import trio

from tunsplit.config import Config
from tunsplit.engine.hold import Hold
from tunsplit.engine.matchers import CgroupRule, CmdlineRule, Matcher, NameRule, UserRule, path_rule
from tunsplit.engine.nat import Direction, Nat
from tunsplit.engine.policy import Mode, Policy, Rule, Verdict
from tunsplit.engine.ports import PortPool
from tunsplit.engine.slowpath import SlowPath
from tunsplit.engine.steering import Endpoint, SteeringSettings
from tunsplit.errors import ConfigError
from tunsplit.kernel import hostconfig
from tunsplit.kernel.conntrack import Conntrack
from tunsplit.kernel.instance import Instance
from tunsplit.kernel.nft import LivePorts
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.procpid import identify, resolve
from tunsplit.kernel.rtnetlink import Rtnetlink, RtnetlinkEvents
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.kernel.tun import Tun
from tunsplit.names import NAT_FIRST, NAT_LAST
from tunsplit.tasks import control, expiry, inbound, outbound
from tunsplit.tasks.admit import WORKERS, Admit
from tunsplit.tasks.network import Network
from tunsplit.tasks.portchoice import PortChoice
from tunsplit.tasks.report import Report
from tunsplit.tasks.side import SideDevice
from tunsplit.tasks.sources import SocketSource
from tunsplit.wire.ip import TCP, UDP

PROTOCOLS = {"tcp": TCP, "udp": UDP}

logger = logging.getLogger(__name__)


def run(config: Config, *, config_file: str, ready: Callable[[], None]) -> None:
    """Split traffic in the network namespace of the calling thread until SIGTERM or SIGINT.

    `ready` is called once traffic is split.

    Raises:
        TunsplitError: it cannot start, and nothing is left behind; or the host could not be put back whole.
    """
    trio.run(_run_until_signal, config, config_file, ready)


async def _run_until_signal(config: Config, config_file: str, ready: Callable[[], None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with open_daemon(config):
            # What has been made so far lives as long as the daemon: the collector need not look at it again.
            gc.freeze()
            ready()
            async for number in signals:
                if number != signal.SIGHUP:
                    logger.info("stopping", extra={"signal": signal.Signals(number).name})
                    return
                logger.warning("reloading is not supported in this release: restart", extra={"file": config_file})


@asynccontextmanager
async def open_daemon(config: Config) -> AsyncIterator[Report]:
    """A running daemon, in the network namespace of the calling thread; undone on leaving.

    Raises:
        TunsplitError: it cannot start, and nothing is left behind; or the host could not be put back whole.
    """
    try:
        async with _open_daemon(config) as report:
            yield report
    except BaseExceptionGroup as group:
        # Nurseries wrap what ends them, also if it is one error only.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        raise error from error.__cause__


@asynccontextmanager
async def _open_daemon(config: Config) -> AsyncIterator[Report]:
    with ExitStack() as stack:
        stack.enter_context(Instance.acquire())
        rtnetlink = stack.enter_context(Rtnetlink())
        events = stack.enter_context(RtnetlinkEvents(ignore_port=rtnetlink.port))
        live_ports = stack.enter_context(LivePorts())
        diag, conntrack, processes = SockDiag(), Conntrack(), Processes()
        for one in (diag, conntrack, processes):
            stack.callback(one.close)
        policy = policy_of(config)
        protocols = frozenset(config.split.protocols)
        pools = {name: PortPool(NAT_FIRST, NAT_LAST, secrets.randbelow) for name in ("tcp", "udp", "echo")}
        nat = Nat(pools)
        ports = PortChoice(nat, live_ports, diag, conntrack)
        host_config = hostconfig.HostConfig(rtnetlink, live_ports=ports.taken)
        tun = stack.enter_context(Tun(config.tun.name))
        logger.info("tun created", extra={"device": tun.name, "offloads": tun.offloads})
        # Sockets bound to the tun are found only by those who name it.
        diag.interface = socket.if_nametoindex(tun.name)
        stack.callback(host_config.release)
        network = Network(
            steering_of(config),
            tun=tun.name,
            tun_addresses=config.tun.address,
            tun_mtu=config.tun.mtu,
            nat=nat,
            rtnetlink=rtnetlink,
            events=events,
            host_config=host_config,
            protocols=protocols,
        )
        stack.callback(network.close)
        counters: Counter[str] = Counter()
        slow = SlowPath(nat.outbound, counters, outbound=True)
        source = SocketSource(diag, processes)
        admit = Admit(
            nat=nat,
            slow=slow,
            source=source,
            sources=(source,),
            policy=lambda: policy,
            network=network,
            ports=ports,
            tun=tun,
            hold=Hold(config.split.hold),
            protocols=protocols,
        )
        report = Report(config, policy, nat, network, admit, ports, tun, counters)
        async with trio.open_nursery() as nursery:
            fragments = [slow.fragments]

            async def pump_in(device: SideDevice, direction: Direction) -> None:
                back = SlowPath(direction, counters, outbound=False)
                fragments.append(back.fragments)
                await inbound.pump(device, tun, direction, back, counters)
                fragments.remove(back.fragments)

            network.on_device = lambda device: nursery.start_soon(pump_in, device, nat.inbound(device))
            ports.on_missing = network.restore
            network.on_change = admit.refused.clear
            network.too_big, network.unreachable = admit.too_big, admit.unreachable
            network.refresh()
            nursery.start_soon(outbound.pump, tun, nat, admit.passed_by, counters)
            for _ in range(WORKERS):
                nursery.start_soon(admit.search)
            nursery.start_soon(admit.release_late)
            nursery.start_soon(network.watch)
            nursery.start_soon(network.confirm_neighbours)
            nursery.start_soon(expiry.expire, nat, ports, fragments, counters)
            await nursery.start(control.serve, config.control, report.verbs())
            yield report
            nursery.cancel_scope.cancel()


def policy_of(config: Config) -> Policy:
    """The policy that a configuration asks for, with paths and users as they are on this host now.

    Raises:
        ConfigError: an [[app]] names a user that this host does not know.
    """
    rules = []
    for number, entry in enumerate(config.apps, start=1):
        matchers: list[Matcher] = []
        if entry.path is not None:
            matchers.append(path_rule(entry.path, identify, resolve))
        if entry.name is not None:
            matchers.append(NameRule(entry.name))
        if entry.cmdline is not None:
            matchers.append(CmdlineRule(entry.cmdline))
        if entry.user is not None:
            matchers.append(UserRule(_uid_of(entry.user, f"[[app]] #{number} user")))
        if entry.cgroup is not None:
            matchers.append(CgroupRule(entry.cgroup))
        others = [
            f"{key} {value}"
            for key in ("name", "cmdline", "user", "cgroup")
            if (value := getattr(entry, key)) is not None
        ]
        label = ", ".join([entry.path, *others] if entry.path is not None else others)
        rules.append(Rule(number, label, tuple(matchers), entry.inherit))
    split = config.split
    return Policy(tuple(rules), Mode(split.mode), split.enabled, Verdict(split.unattributed), Verdict(split.ambiguous))


def _uid_of(user: str | int, where: str) -> int:
    try:
        return user if isinstance(user, int) else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"{where}: found {user!r}, expected a user of this host") from None


def steering_of(config: Config) -> SteeringSettings:
    """What the configuration says about steering.

    Raises:
        ConfigError: [tunnel] transport_user is unknown on this host.
    """
    user = config.tunnel.transport_user
    try:
        uid = user if isinstance(user, int) else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"[tunnel] transport_user: found {user!r}, expected a user of this host") from None
    return SteeringSettings(
        tunnel=config.tunnel.interface,
        uplink=config.uplink.interface,
        fwmark=config.tunnel.fwmark,
        endpoints=tuple(Endpoint(one.address, one.port, PROTOCOLS[one.protocol]) for one in config.tunnel.endpoint),
        transport_uid=uid,
        resolvers=config.tunnel.dns,
        lan_allow=config.lan.allow,
        lan_routes=config.lan.routes,
        lan_discovery=config.lan.discovery,
        firewall=config.firewall.enabled,
    )
