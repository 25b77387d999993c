"""Routes and rules in ip's words (ip-route(8), ip-rule(8)): for people, and for `ip -batch`."""

from collections.abc import Mapping

from tunsplit.host import SCOPE_HOST, SCOPE_LINK, Action, Route, RouteType, Rule

SCOPES = {SCOPE_LINK: " scope link", SCOPE_HOST: " scope host"}


def route_words(route: Route, names: Mapping[int, str]) -> str:
    """The command that adds a route.

    Args:
        route: any.
        names: of devices, by index.
    """
    kind = "" if route.type == RouteType.UNICAST else f"{route.type.name.lower()} "
    words = f"route add {kind}{'default' if route.is_default else route.destination}"
    if route.gateway is not None:
        other = "" if route.gateway.version == route.family else f"inet{'6' if route.gateway.version == 6 else ''} "
        words += f" via {other}{route.gateway}"
    if route.oif is not None:
        words += f" dev {names.get(route.oif, route.oif)}"
    words += f" table {route.table}"
    if route.metric:
        words += f" metric {route.metric}"
    words += f" protocol {route.protocol}"
    if route.family == 4 and route.type == RouteType.UNICAST:
        words += SCOPES.get(route.scope, " scope global")
    if route.prefsrc is not None:
        words += f" src {route.prefsrc}"
    if route.mtu is not None:
        words += f" mtu {route.mtu}"
    if route.advmss is not None:
        words += f" advmss {route.advmss}"
    return f"ip -{route.family} {words}{' onlink' if route.onlink else ''}"


def rule_words(rule: Rule) -> str:
    """The command that adds a rule."""
    words = f"rule add priority {rule.priority} from {rule.source or 'all'}"
    for word, value in (("to", rule.to), ("iif", rule.iif), ("oif", rule.oif)):
        if value is not None:
            words += f" {word} {value}"
    if rule.fwmark is not None:
        # Without a mask, ip would take 0 for "any".
        words += f" fwmark {rule.fwmark:#x}{'' if rule.fwmark else '/0xffffffff'}"
    if rule.uidrange is not None:
        words += f" uidrange {rule.uidrange[0]}-{rule.uidrange[1]}"
    if rule.ipproto is not None:
        words += f" ipproto {rule.ipproto}"
    for word, ports in (("sport", rule.sport), ("dport", rule.dport)):
        if ports is not None:
            words += f" {word} {ports[0]}" if ports[0] == ports[1] else f" {word} {ports[0]}-{ports[1]}"
    ending = f"lookup {rule.table}" if rule.action == Action.TABLE else rule.action.name.lower()
    return f"ip -{rule.family} {words} {ending} protocol {rule.protocol}"
