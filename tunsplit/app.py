"""The daemon: acquires in order, releases in reverse. The only wiring.

app ─▶ tun ─▶ pump: outbound ─▶ a side's packet socket         (known flows)
                   └▶ admit ─▶ attribute ─▶ judge ─▶ open       (first packets)
app ◀─ tun ◀─ pump: inbound ◀─ a side's packet socket
"""

import gc
import logging
import os
import secrets
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import NamedTuple

import trio

from tunsplit.config import Config
from tunsplit.engine.hold import Hold
from tunsplit.engine.nat import Nat
from tunsplit.engine.ports import PortPool
from tunsplit.engine.slowpath import SlowPath
from tunsplit.kernel import hostconfig
from tunsplit.kernel.conntrack import Conntrack
from tunsplit.kernel.instance import Instance
from tunsplit.kernel.limits import raise_descriptor_limit
from tunsplit.kernel.nft import LivePorts
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.rtnetlink import Rtnetlink, RtnetlinkEvents
from tunsplit.kernel.sockdeaths import SocketDeaths
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.kernel.tun import Tun
from tunsplit.names import NAT_FIRST, NAT_LAST
from tunsplit.tasks import control, expiry
from tunsplit.tasks.admit import WORKERS, Admit
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.dns import Dns
from tunsplit.tasks.explain import Explainer
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.liveflows import LiveFlows
from tunsplit.tasks.localresolvers import LocalResolvers
from tunsplit.tasks.network import Network
from tunsplit.tasks.portchoice import PortChoice
from tunsplit.tasks.pump import Pump
from tunsplit.tasks.report import Report
from tunsplit.tasks.settings import policy_of, steering_of
from tunsplit.tasks.sources import SocketSource
from tunsplit.tasks.switch import Switch
from tunsplit.tasks.verbs import Verbs, on_hangup
from tunsplit.wire.ip import UDP

STATE = Path("/run/tunsplit")
NICE = -10  # with less, a fifth of the orphans of `sh -c "program &"` was refused under load; with this, one in fifty
SO_NETNS_COOKIE = 71  # asm-generic/socket.h, since Linux 5.14

logger = logging.getLogger(__name__)


class Daemon(NamedTuple):
    """A running daemon: what it shows, what can be switched, and whether it leaves the way open."""

    report: Report
    switch: Switch
    host_config: hostconfig.HostConfig


def run(config: Config, *, config_file: str, ready: Callable[[], None], on_stop: str | None = None) -> None:
    """Split traffic in the network namespace of the calling thread until SIGTERM or SIGINT.

    With `firewall.on_stop = "block"` SIGINT alone opens the way at the end. A mistake of ours never does.
    `on_stop` goes before the configuration's. `ready` is called once traffic is split.

    Raises:
        TunsplitError: it cannot start, and nothing is left behind; or the host could not be put back whole.
    """
    _hurry()
    raise_descriptor_limit()
    trio.run(_run_until_signal, config, config_file, on_stop, ready)


def _hurry() -> None:
    """Go first, if we may: who is gone before we have looked at it leaves children that nobody can judge."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, min(NICE, os.getpriority(os.PRIO_PROCESS, 0)))
    except PermissionError:
        logger.info("no right to a higher priority: under load, more children of short-lived programs are refused")


async def _run_until_signal(config: Config, config_file: str, on_stop: str | None, ready: Callable[[], None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with open_daemon(config, config_file, on_stop) as daemon:
            # What has been made so far lives as long as the daemon: the collector need not look at it again.
            gc.freeze()
            ready()
            try:
                async for number in signals:
                    if number != signal.SIGHUP:
                        daemon.host_config.stays_closed &= number != signal.SIGINT
                        closed = daemon.host_config.stays_closed
                        logger.info("stopping", extra={"signal": signal.Signals(number).name, "stays_closed": closed})
                        return
                    on_hangup(daemon.switch)
            except trio.Cancelled:  # a task has failed, and nobody has said that the way may be open
                daemon.host_config.stays_closed = True
                logger.error("a mistake of ours ends the daemon: the way stays closed until the next start, or undo")
                raise


@asynccontextmanager
async def open_daemon(config: Config, config_file: str = "", on_stop: str | None = None) -> AsyncIterator[Daemon]:
    """A running daemon, in the network namespace of the calling thread; undone on leaving, or closed, as configured.

    `config_file` is where a reload finds the configuration; `on_stop` goes before its `firewall.on_stop`.

    Raises:
        TunsplitError: it cannot start, and nothing is left behind; or the host could not be put back whole.
    """
    try:
        async with _open_daemon(config, config_file, on_stop) as daemon:
            yield daemon
    except BaseExceptionGroup as group:
        # Nurseries wrap what ends them, also if it is one error only.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        raise error from error.__cause__


@asynccontextmanager
async def _open_daemon(config: Config, config_file: str, on_stop: str | None) -> AsyncIterator[Daemon]:
    with ExitStack() as stack:
        stack.enter_context(Instance.acquire())
        rtnetlink = stack.enter_context(Rtnetlink())
        events = stack.enter_context(RtnetlinkEvents(ignore_port=rtnetlink.port))
        live_ports = stack.enter_context(LivePorts())
        diag = stack.enter_context(closing(SockDiag()))
        conntrack = stack.enter_context(closing(Conntrack()))
        deaths = stack.enter_context(closing(SocketDeaths(UDP)))
        processes = stack.enter_context(closing(Processes()))
        judge = Judge(policy_of(config), processes, state_file())
        stack.callback(judge.close)
        stack.callback(judge.save_now)
        resolvers = LocalResolvers(diag, processes)
        judge.prepare()
        resolvers.refuse_covering(judge.policy, judge.tree.lineage)
        judge.is_resolver = resolvers.is_resolver
        protocols = frozenset(config.split.protocols)
        pools = {name: PortPool(NAT_FIRST, NAT_LAST, secrets.randbelow) for name in ("tcp", "udp", "echo")}
        nat = Nat(pools)
        ports = PortChoice(nat, live_ports, diag, conntrack)
        host_config = hostconfig.HostConfig(rtnetlink, live_ports=ports.taken)
        host_config.stays_closed = (on_stop or config.firewall.on_stop) == "block"
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
        answers = Answers(tun, network)
        loopback = stack.enter_context(closing(SockDiag(socket.if_nametoindex("lo"))))
        dns = Dns(
            config,
            tun=tun,
            nat=nat,
            network=network,
            answers=answers,
            judge=judge,
            source=SocketSource(loopback, processes),
            rtnetlink=rtnetlink,
        )
        stack.callback(dns.close)
        admit = Admit(
            nat=nat,
            slow=slow,
            source=source,
            sources=(source,),
            judge=judge,
            network=network,
            dns=dns.capture,
            ports=ports,
            answers=answers,
            hold=Hold(config.split.hold),
            protocols=protocols,
        )
        pump = Pump(tun, nat, dns.before(admit.passed_by), counters)
        stack.callback(pump.close)
        live = LiveFlows(
            judge=judge, nat=nat, refused=admit.refused, diag=diag, processes=processes, carry=pump.carry_out
        )
        switch = Switch(
            config,
            config_file,
            judge=judge,
            live=live,
            admit=admit,
            explainer=Explainer(judge, source, network, nat, dns.capture),
            processes=processes,
            network=network,
            resolvers=resolvers,
        )
        resolvers.on_change = live.on_change
        judge.on_change, judge.on_exec = live.on_change, live.on_exec

        def configured(config: Config) -> None:
            dns.configure(config)
            host_config.stays_closed = (on_stop or config.firewall.on_stop) == "block"

        switch.on_config = configured
        report = Report(switch, judge, nat, network, admit, ports, tun, dns, counters)
        async with trio.open_nursery() as nursery:
            network.on_device, network.on_close = pump.attach, pump.detach
            ports.on_missing = network.restore

            def changed() -> None:
                admit.refused.clear()
                dns.network_changed()

            network.on_change, network.on_gateway = changed, dns.network_changed
            network.too_big, network.unreachable = answers.too_big, answers.unreachable
            network.refresh()
            nursery.start_soon(pump.run)
            for _ in range(WORKERS):
                nursery.start_soon(admit.search)
            nursery.start_soon(admit.release_late)
            await nursery.start(dns.run)
            stack.enter_context(dns.taken_over())
            nursery.start_soon(judge.watch)
            nursery.start_soon(judge.save)
            nursery.start_soon(live.watch_holders)
            nursery.start_soon(resolvers.watch)
            nursery.start_soon(network.watch)
            nursery.start_soon(network.confirm_neighbours)
            fragments = (slow.fragments, pump)
            nursery.start_soon(expiry.expire, nat, ports, fragments, deaths, counters)
            await nursery.start(control.serve, config.control, {**report.verbs(), **Verbs(switch, config_file).verbs()})
            yield Daemon(report, switch, host_config)
            nursery.cancel_scope.cancel()


def state_file() -> Path:
    """Where the process tree survives us: /run is shared by all network namespaces, so each has a file of its own."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        # Never given twice while the system runs, as an inode number is.
        cookie = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
    return STATE / f"processes-{cookie}.json"
