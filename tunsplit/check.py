"""What tunsplit needs from a host, and whether it is there: quickly before a start, thoroughly for `tunsplit check`."""

import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address
from pathlib import Path

from tunsplit.config import Config, unsupported
from tunsplit.errors import ConfigError, KernelError, PermissionMissing
from tunsplit.kernel import caps
from tunsplit.kernel.procpid import is_script, why_no_program
from tunsplit.kernel.trust import why_not_roots
from tunsplit.process import Process

TUN_DEVICE = Path("/dev/net/tun")
NO_TUN_DEVICE = (
    f"{TUN_DEVICE} is missing: load the kernel's module with `modprobe tun`, or give the container the device"
)
NO_NFT = "the program nft is missing: install the package nftables"


def require_runnable(*, tun: bool = True) -> None:
    """Fail early, with what to do about it, where `tunsplit run` could not work: a matter of microseconds.

    `tun`: the tun driver is needed.

    Raises:
        PermissionMissing: capabilities are missing.
        KernelError: the tun driver or `nft` is missing.
    """
    if missing := caps.missing():
        raise PermissionMissing(caps.complaint(missing))
    if tun and not TUN_DEVICE.exists():
        raise KernelError(NO_TUN_DEVICE)
    if not shutil.which("nft"):
        raise KernelError(NO_NFT)


def require_undoable() -> None:
    """Fail before anything is tried, where `tunsplit undo` could undo nothing.

    Raises:
        PermissionMissing: the capability is missing.
    """
    if missing := [capability for capability in caps.missing() if capability.name == "CAP_NET_ADMIN"]:
        raise PermissionMissing(caps.complaint(missing))


class Level(Enum):
    """How a finding reads at the head of its line."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    MISSING = "missing"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report, and the exit code that it asks for."""

    level: Level
    text: str
    exit_code: int = 0


def examine(config: Config | ConfigError, file: str) -> Iterator[tuple[str, list[Finding]]]:
    """Yield each part of the report: its heading and its findings.

    Args:
        config: the configuration, or what is wrong with it.
        file: its name.
    """
    yield "configuration", list(configuration(config, file))
    yield "capabilities", list(capabilities())
    yield "kernel", list(kernel())
    yield "programs", list(programs())


def exit_code(findings: list[Finding]) -> int:
    """Return the report's exit code: of several, the one to be mended first (2, 3, 4)."""
    return min((finding.exit_code for finding in findings if finding.exit_code), default=0)


def configuration(config: Config | ConfigError, file: str) -> Iterator[Finding]:
    """Yield what there is to say about the configuration, by itself and on this host."""
    if isinstance(config, ConfigError):
        for line in str(config).splitlines():
            yield Finding(Level.WRONG, line, ConfigError.exit_code)
        return
    yield Finding(Level.OK, file)
    for sentence in unsupported(config):
        yield Finding(Level.NOTE, sentence)
    yield from _programs_of_rules(config)
    yield from _clients(config)
    yield from _users(config)
    yield from _rules_of_root(config)
    yield from _interfaces(config)
    yield from _resolvers(config)
    yield from _local_resolvers(config)


GLOB = re.compile(r"[*?\[]")


def _programs_of_rules(config: Config) -> Iterator[Finding]:
    for number, app in enumerate(config.apps, 1):
        if app.path and not GLOB.search(app.path) and (lack := why_no_program(app.path)):
            yield Finding(Level.WARNING, f"[[app]] #{number} path: {app.path} {lack}, so the rule matches nothing")


def _clients(config: Config) -> Iterator[Finding]:
    for client in (one for one in config.tunnel.client if one.startswith("/")):
        if lack := why_not_roots(client):
            text = f"[tunnel] client: {client} {lack}; expected a program that only root can replace"
            yield Finding(Level.WRONG, text, ConfigError.exit_code)
        elif lack := why_no_program(client):
            yield Finding(Level.WARNING, f"[tunnel] client: {client} {lack}")
        elif is_script(client):
            yield Finding(
                Level.WARNING,
                f"[tunnel] client: {client} is a script, and what runs is its interpreter: name the unit that starts "
                "it, or the programs that it calls",
            )


def _users(config: Config) -> Iterator[Finding]:
    if not _user_exists(config.tunnel.transport_user):
        text = f"[tunnel] transport_user: found {config.tunnel.transport_user}, expected a user of this host"
        yield Finding(Level.WRONG, text, ConfigError.exit_code)
    for number, app in enumerate(config.apps, 1):
        if app.user is not None and not _user_exists(app.user):
            text = f"[[app]] #{number} user: {app.user} does not exist, so the rule matches nothing"
            yield Finding(Level.WARNING, text)


def _rules_of_root(config: Config) -> Iterator[Finding]:
    for number, app in enumerate(config.apps, 1):
        if app.user in ("root", 0) and app.inherit and not (app.path or app.name or app.cmdline or app.cgroup):
            yield Finding(
                Level.WARNING,
                f"[[app]] #{number} user: every process descends from one of root's, so the rule claims them all; add "
                "another key, or inherit = false",
            )


def _user_exists(user: str | int) -> bool:
    if isinstance(user, int):
        return True  # a number is what the kernel compares, with or without a name
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _interfaces(config: Config) -> Iterator[Finding]:
    from tunsplit.kernel.rtnetlink import Rtnetlink

    with Rtnetlink() as rtnetlink:
        snapshot = rtnetlink.snapshot()
    name = config.tunnel.interface
    tunnel = snapshot.link(name)
    if not tunnel:
        yield Finding(Level.NOTE, f"[tunnel] interface: {name} is absent, so the tunnel is down until it appears")
    else:
        addresses = [address for address in snapshot.addresses_of(tunnel) if address.is_global]
        if not tunnel.up or not addresses:
            lack = "has no address" if tunnel.up else "is down"
            yield Finding(Level.NOTE, f"[tunnel] interface: {name} {lack}, so the tunnel counts as down")
        elif not config.tunnel.dns and all(
            address.interface.network.prefixlen == address.interface.max_prefixlen for address in addresses
        ):
            yield Finding(
                Level.WARNING,
                f"[tunnel] dns: not given, and the prefixes of {name} have room for no resolver: name it, or questions "
                "in the tunnel fail",
            )
    uplink = config.uplink.interface
    if uplink != "auto" and not snapshot.link(uplink):
        yield Finding(
            Level.WARNING, f"[uplink] interface: {uplink} is absent, so excluded apps are refused until it appears"
        )


def _resolvers(config: Config) -> Iterator[Finding]:
    from tunsplit.engine.dnstable import DnsTable

    somewhere = (ip_address("192.0.2.1"),)  # theirs is not known before the start
    table = DnsTable(config.dns.platform, config.dns.custom, somewhere, somewhere, config.lan.allow)
    for excluded in (False, True):
        choice = table.choose(excluded=excluded, tunnel_up=True)
        if not choice.servers:
            allowed = DnsTable(config.dns.platform, config.dns.custom, somewhere, somewhere, lan_allow=True)
            remedy = (
                "set [lan] allow = true, or name a public one"
                if allowed.choose(excluded=excluded, tunnel_up=True).servers
                else "name a public one, or choose another platform"
            )
            yield Finding(
                Level.WARNING,
                f"[dns] custom: by the row {choice.row} a private resolver is not asked, so every question of "
                f"{'excluded' if excluded else 'included'} apps fails (SERVFAIL): {remedy}",
            )


def _local_resolvers(config: Config) -> Iterator[Finding]:
    from tunsplit.engine.policy import Verdict
    from tunsplit.kernel.procfs import Processes
    from tunsplit.kernel.sockdiag import SockDiag
    from tunsplit.tasks.localresolvers import LocalResolvers
    from tunsplit.tasks.settings import policy_of

    known = [app for app in config.apps if app.user is None or _user_exists(app.user)]
    policy = policy_of(config.replaced(apps=tuple(known), tunnel=config.tunnel.replaced(client=())))
    try:
        with SockDiag() as diag, Processes() as processes:
            resolvers = LocalResolvers(diag, processes)
            resolvers.listed()
            beside = {one.process.pid for one, _ in resolvers.covered(policy)}

            def side(process: Process) -> Verdict:
                return Verdict.UPLINK if process.pid in beside else Verdict.TUNNEL

            for hint in resolvers.hints(policy.mode, side):
                yield Finding(Level.NOTE, hint)
            if config.tunnel.client and not config.dns.take_over and resolvers.listed():
                yield Finding(
                    Level.WARNING,
                    "[tunnel] client: where it asks a local resolver, its questions go in the tunnel like those of "
                    "others, and fail while that is down: use [dns] listen with take_over, or literal addresses",
                )
            resolvers.refuse_covering(policy)
    except ConfigError as error:
        yield Finding(Level.WRONG, str(error), ConfigError.exit_code)
    except KernelError as error:
        yield Finding(Level.NOTE, f"whether a local resolver is in use cannot be known: {error}")


def capabilities() -> Iterator[Finding]:
    """Yield a finding for each capability that tunsplit uses."""
    there = caps.effective()
    for capability in caps.NEEDED:
        text = f"{capability.name}: {capability.why}"
        if capability in there:
            yield Finding(Level.OK, text)
        elif capability.required:
            code = PermissionMissing.exit_code
            yield Finding(Level.MISSING, f"{text}; {caps.how_to_grant([capability])}", code)
        else:
            yield Finding(Level.NOTE, f"{text}; not needed in that one; else {caps.how_to_grant([capability])}")


def kernel() -> Iterator[Finding]:
    """Yield a finding for each feature of the kernel, tried in a network namespace of its own."""
    from tunsplit.kernel import conntrack, features

    if not TUN_DEVICE.exists():
        yield Finding(Level.MISSING, NO_TUN_DEVICE, KernelError.exit_code)
    try:
        found = features.probe()
    except KernelError as error:
        yield Finding(Level.NOTE, str(error))
        return
    for feature in found:
        if feature.complaint is None:
            yield Finding(Level.OK, feature.name)
        elif feature.denied:
            yield Finding(Level.NOTE, f"{feature.name}: could not be tried ({feature.complaint})")
        elif feature.required:
            text = f"{feature.name} ({feature.complaint}): {feature.otherwise}"
            yield Finding(Level.MISSING, text, KernelError.exit_code)
        else:
            yield Finding(Level.NOTE, f"{feature.name} not available ({feature.complaint}): {feature.otherwise}")
    if lack := conntrack.shortage():
        yield Finding(Level.WARNING, lack)


def programs() -> Iterator[Finding]:
    """Yield a finding for each program that tunsplit calls."""
    path = shutil.which("nft")
    if not path:
        yield Finding(Level.MISSING, NO_NFT, KernelError.exit_code)
        return
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    yield Finding(Level.OK, f"{path}: {version.stdout.strip() or version.stderr.strip()}")
