"""The daemon: acquires in order, releases in reverse. The only wiring.

app ─▶ tun ─▶ pump: outbound ─▶ a side's packet socket         (known flows)
                   └▶ admit ─▶ attribute ─▶ judge ─▶ open       (first packets)
app ◀─ tun ◀─ pump: inbound ◀─ a side's packet socket
"""

import gc
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import NamedTuple

import trio

from tunsplit.config import Config
from tunsplit.engine.hold import Hold
from tunsplit.engine.nat import Nat
from tunsplit.engine.ports import PortPool
from tunsplit.engine.slowpath import SlowPath
from tunsplit.kernel import hostconfig, tcpclock
from tunsplit.kernel.caps import NEEDED, keep_only
from tunsplit.kernel.conntrack import Conntrack
from tunsplit.kernel.descriptors import holds_tun
from tunsplit.kernel.instance import Instance
from tunsplit.kernel.limits import raise_descriptor_limit
from tunsplit.kernel.liveports import LivePorts
from tunsplit.kernel.nft import Nftables
from tunsplit.kernel.nftevents import TableEvents
from tunsplit.kernel.nftguard import Guard
from tunsplit.kernel.procevents import is_initial_network
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.rtnetlink import NeighbourEvents, Rtnetlink, RtnetlinkEvents
from tunsplit.kernel.sockdeaths import SocketDeaths
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.kernel.tun import Tun
from tunsplit.names import NAT_FIRST, NAT_LAST
from tunsplit.tasks import control, expiry, treefile, watchdog
from tunsplit.tasks.admit import Admit
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.chance import Chance
from tunsplit.tasks.dns import Dns
from tunsplit.tasks.explain import Explainer
from tunsplit.tasks.forward import Forward
from tunsplit.tasks.halfopen import HalfOpen
from tunsplit.tasks.handovers import Handovers
from tunsplit.tasks.heirs import Heirs
from tunsplit.tasks.holders import HoldersWatch
from tunsplit.tasks.ipsec import Ipsec
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.linksockets import LinkSockets
from tunsplit.tasks.liveflows import LiveFlows
from tunsplit.tasks.localresolvers import LocalResolvers
from tunsplit.tasks.narrow import Narrow
from tunsplit.tasks.network import Network
from tunsplit.tasks.notices import Notices
from tunsplit.tasks.opening import Opening
from tunsplit.tasks.organs import Organ, closing
from tunsplit.tasks.portchoice import PortChoice
from tunsplit.tasks.pump import Pump
from tunsplit.tasks.report import Report
from tunsplit.tasks.settings import policy_of, steering_of
from tunsplit.tasks.sources import SocketSource
from tunsplit.tasks.switch import Switch
from tunsplit.tasks.tuns import Tuns
from tunsplit.tasks.untold import Untold
from tunsplit.tasks.upkeep import Upkeep
from tunsplit.tasks.verbs import Verbs, on_hangup
from tunsplit.wire.ip import UDP

NICE = -10  # with less, a fifth of the orphans of `sh -c "program &"` was refused under load; with this, one in fifty
FULL_PASS = 100  # passes over what has lived a little, of 7,000 objects each, before the next over everything

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


def _give_up_rights() -> None:
    """Keep the capabilities that are still needed."""
    here = is_initial_network()
    keep_only(capability for capability in NEEDED if not (here and capability.name == "CAP_SYS_ADMIN"))


def _tame_collector() -> None:
    """Let the collector of cycles look rarely at what lives: no packet is carried meanwhile, 0.1 s with 100,000 flows.

    What has been made so far lives as long as the daemon. What comes has cycles for a moment only, if at all, and is
    found by the passes over the young; a flow that ends is cut (`Nat.end`).
    """
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_PASS)


async def _run_until_signal(config: Config, config_file: str, on_stop: str | None, ready: Callable[[], None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with open_daemon(config, config_file, on_stop, acquired=_give_up_rights) as daemon:
            _tame_collector()
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
async def open_daemon(
    config: Config,
    config_file: str = "",
    on_stop: str | None = None,
    *,
    acquired: Callable[[], None] = lambda: None,
) -> AsyncIterator[Daemon]:
    """A running daemon, in the network namespace of the calling thread; undone on leaving, or closed, as configured.

    Args:
        config: what it is to do.
        config_file: where a reload finds the configuration.
        on_stop: goes before its `firewall.on_stop`.
        acquired: called once all is there that takes more rights than to keep it, before any task or thread runs.

    Raises:
        TunsplitError: it cannot start, and nothing is left behind; or the host could not be put back whole.
    """
    try:
        async with _open_daemon(config, config_file, on_stop, acquired) as daemon:
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
async def _open_daemon(
    config: Config, config_file: str, on_stop: str | None, acquired: Callable[[], None]
) -> AsyncIterator[Daemon]:
    with ExitStack() as stack:
        stack.enter_context(Instance.acquire())
        clients = stack.enter_context(control.listening(config.control))
        rtnetlink = stack.enter_context(Rtnetlink())
        events = stack.enter_context(RtnetlinkEvents(ignore_port=rtnetlink.port))
        neighbours = stack.enter_context(NeighbourEvents())
        live_ports = stack.enter_context(LivePorts())
        tables = stack.enter_context(TableEvents(ignore_port=live_ports.port))
        diag, conntrack = stack.enter_context(SockDiag()), stack.enter_context(Conntrack())
        deaths = stack.enter_context(SocketDeaths(UDP))
        processes = stack.enter_context(Processes())
        judge = Judge(policy_of(config), processes, treefile.path_here())
        stack.callback(judge.close)
        stack.callback(judge.save_now)
        resolvers = LocalResolvers(diag, processes)
        judge.prepare()
        resolvers.refuse_covering(judge.policy, judge.tree.lineage)
        judge.is_resolver = resolvers.is_resolver
        protocols = frozenset(config.split.protocols)
        pools = {name: PortPool(NAT_FIRST, NAT_LAST, Chance().below) for name in ("tcp", "udp", "echo")}
        nat = Nat(pools)
        ports = PortChoice(nat, live_ports, diag, conntrack)
        ipsec = stack.enter_context(Ipsec(nat))
        guard, nftables = stack.enter_context(Guard()), stack.enter_context(Nftables())
        host_config = hostconfig.HostConfig(rtnetlink, live_ports=ports.taken, guard=guard, nftables=nftables)
        host_config.stays_closed = (on_stop or config.firewall.on_stop) == "block"
        tun = stack.enter_context(Tun(config.tun.name))
        logger.info("tun created", extra={"device": tun.name, "offloads": tun.offloads})
        tuns = Tuns(tun, stack.enter_context(Tun(config.tun.forwarded)))
        # Sockets bound to the tun are found only by those who name it.
        diag.interface = tun.index
        stack.callback(host_config.release)
        network = Network(
            steering_of(config),
            tuns=tuns,
            tun_addresses=config.tun.address,
            tun_mtu=config.tun.mtu,
            nat=nat,
            rtnetlink=rtnetlink,
            events=events,
            neighbours=neighbours,
            host_config=host_config,
            protocols=protocols,
        )
        stack.callback(network.devices.close)
        judge.tunnel_up = lambda: network.tunnel_up
        judge.carries_tunnel = lambda pid: holds_tun(pid, network.tunnel)
        counters: Counter[str] = Counter()
        upkeep = Upkeep(host_config, tables, network.restore, counters)
        host_config.on_restored, host_config.on_egress = upkeep.restored, upkeep.egress
        slow = SlowPath(nat.outbound, counters, outbound=True, shared_clock=tcpclock.is_shared())
        source = SocketSource(diag, processes)
        answers = Answers(tuns, network)
        loopback = stack.enter_context(SockDiag(socket.if_nametoindex("lo")))
        dns = Dns(
            config,
            tuns=tuns,
            nat=nat,
            network=network,
            answers=answers,
            judge=judge,
            source=SocketSource(loopback, processes),
            rtnetlink=rtnetlink,
        )
        stack.callback(dns.close)
        hold = Hold(config.split.hold)
        handovers, heirs = Handovers(deaths, hold, counters), Heirs(judge.tree, processes, hold)
        admit = Admit(
            nat=nat,
            slow=slow,
            source=source,
            sources=(source,),
            judge=judge,
            network=network,
            dns=dns.capture,
            opening=Opening(nat, network, source, dns.capture, ports, ipsec.claims),
            answers=answers,
            hold=hold,
            handovers=handovers,
            heirs=heirs,
            protocols=protocols,
        )
        narrow = Narrow(answers, network, rtnetlink, config.tun.name)
        nat.goes_on = source.goes_on
        nat.on_end, host_config.passing_rules = narrow.forget, narrow.rules
        forwarded = SlowPath(nat.forwarded, counters, outbound=True)
        forward = Forward(
            nat=nat,
            slow=forwarded,
            judge=lambda: judge.policy.judge_forwarded(),
            dns=dns.capture,
            ports=ports,
            answers=answers,
            claimed=ipsec.claims,
            send=admit.send,
            protocols=protocols,
        )
        half_open = HalfOpen(counters)
        heard, unclaimed = narrow.heard, half_open.answer
        passed_by, forwarded_by = dns.before(admit.passed_by), forward.passed_by
        pump = Pump(tuns, nat, passed_by, forwarded_by, counters, heard=heard, unclaimed=unclaimed)
        stack.callback(pump.close)
        pump.heed(handovers.fileno(), handovers.take_in)
        pump.after_carried += [handovers.carried, heirs.carried]
        judge.on_lost, judge.on_heard, heirs.carry = heirs.note_unknown, heirs.heard, pump.carry_out
        live = LiveFlows(
            judge=judge,
            nat=nat,
            refused=admit.refused,
            half_open=half_open,
            diag=diag,
            processes=processes,
            carry=pump.carry_out,
        )
        switch = Switch(
            config,
            config_file,
            judge=judge,
            live=live,
            admit=admit,
            explainer=Explainer(judge, source, network, nat, dns.capture, ipsec),
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
        notices = Notices(diag, answers)
        switch.on_change = lambda: forward.judge_again(trio.current_time())
        link_sockets = LinkSockets(processes, counters)
        report = Report(switch, judge, nat, network, admit, forward, ports, tuns, dns, link_sockets, counters)
        acquired()
        async with trio.open_nursery() as nursery:
            network.on_end, network.on_loss = notices.ended, half_open.clear
            ipsec.on_end = notices.ended

            def tun_renewed(tun: Tun) -> None:
                pump.renewed(tun)
                if tun is tuns.own:
                    diag.interface = tun.index
                    dns.tun_renewed()

            network.on_tun = tun_renewed
            devices = network.devices
            devices.on_device, devices.on_close = pump.attach, pump.detach
            devices.too_big, devices.unreachable, devices.no_way = narrow.too_big, answers.unreachable, answers.no_way

            def close_judged(why: str) -> None:
                judge.fail(why)
                live.holders_unknown()

            def hear() -> None:
                with closing(network.close_sides):
                    network.hear()
                    ipsec.hear()
                with closing(close_judged):
                    judge.hear()

            pump.before_batch = hear
            judge.on_subscribed = pump.hear_first
            for descriptor in (events.fileno(), judge.fileno(), *ipsec.descriptors()):
                pump.hear_first(descriptor)
            ports.on_missing = network.restore

            tunnel_up = False

            def changed() -> None:
                nonlocal tunnel_up
                live.forget_refusals()
                half_open.clear()
                narrow.forget_all()
                forward.refused.clear()
                dns.network_changed()
                if network.tunnel_up is not tunnel_up:
                    tunnel_up = network.tunnel_up
                    live.tunnel_changed()

            network.on_change, network.on_gateway = changed, dns.network_changed
            network.refresh()
            nursery.start_soon(admit.search)

            fragments = (slow.fragments, forwarded.fragments, pump, narrow)
            holders = HoldersWatch(processes, (live, resolvers, link_sockets), counters)
            untold = Untold(judge, nat, live.holders_unknown)
            organs: tuple[Organ, ...] = (
                Organ("pump", pump.run),
                Organ("release_late", admit.release_late),
                Organ("judge", judge.watch, close_judged),
                Organ("judge_tell", judge.tell_of_others, close_judged),
                Organ("judge_save", judge.save),
                Organ("holders", holders.watch, close_judged),
                Organ("untold", untold.watch, close_judged),
                Organ("paths", switch.follow_paths, close_judged),
                Organ("network", network.watch, network.close_sides),
                Organ("neighbours", devices.neighbours.watch),
                Organ("neighbours_kept", devices.neighbours.confirm),
                Organ("notices", notices.tell),
                Organ("tables", upkeep.watch_tables),
                Organ("sysctls", upkeep.watch_sysctls),
                Organ("expiry", partial(expiry.expire, nat, ports, fragments, handovers, counters)),
            )
            for organ in organs:
                nursery.start_soon(organ.keep, counters)
            await nursery.start(dns.run)
            stack.enter_context(dns.taken_over())
            verbs = {**report.verbs(), **Verbs(switch, config_file).verbs()}
            await nursery.start(control.serve, clients, verbs)
            nursery.start_soon(watchdog.reassure)
            yield Daemon(report, switch, host_config)
            nursery.cancel_scope.cancel()
