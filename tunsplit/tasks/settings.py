"""Turns the configuration into what the engines want, with paths and users as they are on this host now."""

import pwd
from collections.abc import Iterator
from dataclasses import replace

from tunsplit.config import Config
from tunsplit.engine.clients import client_of_path, client_of_unit
from tunsplit.engine.matchers import CgroupRule, CmdlineRule, Matcher, NameRule, PathRule, UserRule, path_rule
from tunsplit.engine.policy import Mode, Policy, Verdict
from tunsplit.engine.rules import Rule
from tunsplit.engine.steering import Endpoint, SteeringSettings
from tunsplit.errors import ConfigError
from tunsplit.kernel.procpid import identify, resolve
from tunsplit.kernel.trust import why_not_roots
from tunsplit.wire.ip import TCP, UDP

PROTOCOLS = {"tcp": TCP, "udp": UDP}


def policy_of(config: Config) -> Policy:
    """The policy that a configuration asks for, with paths and users as they are on this host now.

    Raises:
        ConfigError: an [[app]] names a user that this host does not know; [tunnel] client, a program that is not root's
            alone.
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
    return Policy(
        tuple(rules),
        Mode(split.mode),
        split.enabled,
        Verdict(split.unattributed),
        Verdict(split.ambiguous),
        Verdict(split.forwarded),
        tuple(_clients(config)),
    )


def followed(policy: Policy) -> Policy:
    """The same policy with its paths as they lead by now; this very one where they lead where they did.

    A symlink may have got another end. And another program may have the inode number of one that was replaced.
    """
    rules, clients = (tuple(map(_followed, rules)) for rules in (policy.rules, policy.clients))
    if (rules, clients) == (policy.rules, policy.clients):
        return policy
    return replace(policy, rules=rules, clients=clients)


def _followed(rule: Rule) -> Rule:
    return replace(
        rule,
        matchers=tuple(
            path_rule(one.path, identify, resolve) if isinstance(one, PathRule) else one for one in rule.matchers
        ),
    )


def _clients(config: Config) -> Iterator[Rule]:
    for number, client in enumerate(config.tunnel.client, start=1):
        if not client.startswith("/"):
            yield client_of_unit(number, client)
            continue
        if lack := why_not_roots(client):
            raise ConfigError(
                f"[tunnel] client #{number}: found {client}, which {lack}; expected a program that only root can "
                "replace, since it has the uplink while the tunnel is down"
            )
        yield client_of_path(number, client, path_rule(client, identify, resolve), _transport_uid(config))


def _uid_of(user: str | int, where: str) -> int:
    try:
        return user if isinstance(user, int) else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"{where}: found {user!r}, expected a user of this host") from None


def _transport_uid(config: Config) -> int:
    return _uid_of(config.tunnel.transport_user, "[tunnel] transport_user")


def steering_of(config: Config) -> SteeringSettings:
    """What the configuration says about steering.

    Raises:
        ConfigError: [tunnel] transport_user is unknown on this host.
    """
    return SteeringSettings(
        tunnel=config.tunnel.interface,
        uplink=config.uplink.interface,
        fwmark=config.tunnel.fwmark,
        endpoints=tuple(Endpoint(one.address, one.port, PROTOCOLS[one.protocol]) for one in config.tunnel.endpoint),
        transport_uid=_transport_uid(config),
        resolvers=config.tunnel.dns,
        lan_allow=config.lan.allow,
        lan_routes=config.lan.routes,
        lan_discovery=config.lan.discovery,
        firewall=config.firewall.enabled,
        guests=config.split.guests,
    )
