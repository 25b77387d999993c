"""Turns the configuration into what the engines want, with paths and users as they are on this host now."""

import pwd

from tunsplit.config import Config
from tunsplit.engine.matchers import CgroupRule, CmdlineRule, Matcher, NameRule, UserRule, path_rule
from tunsplit.engine.policy import Mode, Policy, Verdict
from tunsplit.engine.rules import Rule
from tunsplit.engine.steering import Endpoint, SteeringSettings
from tunsplit.errors import ConfigError
from tunsplit.kernel.procpid import identify, resolve
from tunsplit.wire.ip import TCP, UDP

PROTOCOLS = {"tcp": TCP, "udp": UDP}


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
        rules.append(Rule(number, label, tuple(matchers), entry.inherit, entry.force))
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
