"""What keys must be towards each other, once each is right by itself."""

from collections import Counter
from collections.abc import Iterator, Mapping

from tunsplit.config.schema import MATCHERS, Config
from tunsplit.config.values import shown
from tunsplit.names import MARK_STEER, MARK_TUNNEL, MARK_UPLINK

DNS_PORT = 53  # resolv.conf(5) names no other
OWN_MARKS = (MARK_UPLINK, MARK_TUNNEL, MARK_STEER)


def contradictions(config: Config, tunnel: Mapping[str, object]) -> Iterator[str]:
    """Yield a line for each contradiction; `tunnel` is the [tunnel] table as it was written."""
    yield from _transport(config, tunnel)
    yield from _interfaces(config)
    yield from _tun_addresses(config)
    if config.dns.take_over and all(one.port != DNS_PORT for one in config.dns.listen):
        yield (
            "[dns] take_over: found true without a resolver of ours to name, expected listen with an address on port "
            f'{DNS_PORT}, such as "127.0.0.54:53"'
        )
    for own in dict.fromkeys(one.address for one in config.dns.listen if one.port == DNS_PORT):
        if own in config.dns.custom:
            yield (
                f"[dns] custom: found {own}, which is tunsplit's own resolver ([dns] listen) and would ask itself, "
                "expected a resolver of somebody else's"
            )
    for number, app in enumerate(config.apps, 1):
        if all(getattr(app, matcher) is None for matcher in MATCHERS):
            *others, last = MATCHERS
            yield f"[[app]] #{number}: found nothing to match, expected at least one of {', '.join(others)} or {last}"


def _transport(config: Config, tunnel: Mapping[str, object]) -> Iterator[str]:
    fwmark = config.tunnel.fwmark
    if fwmark is None and not config.tunnel.endpoint and tunnel.get("endpoint") != "none":
        yield (
            "[tunnel] fwmark: found neither fwmark nor endpoint, expected at least one, to know the VPN's own packets "
            'by (endpoint = "none" if the tunnel sends none on the uplink)'
        )
    if fwmark in OWN_MARKS:
        yield (
            f"[tunnel] fwmark: found {fwmark}, expected another mark than {', '.join(map(str, OWN_MARKS))}, "
            "which are tunsplit's own"
        )


def _interfaces(config: Config) -> Iterator[str]:
    names = {
        "[tun] name": config.tun.name,
        "[tun] forwarded": config.tun.forwarded,
        "[tunnel] interface": config.tunnel.interface,
        "[uplink] interface": config.uplink.interface,
    }
    first: dict[str, str] = {}
    for key, name in names.items():
        if name in first:
            yield f"{key}: found {shown(name)}, expected another interface than {first[name]}"
        first.setdefault(name, key)


def _tun_addresses(config: Config) -> Iterator[str]:
    for family, count in Counter(address.version for address in config.tun.address).items():
        if count > 1:
            yield f"[tun] address: found {count} IPv{family} addresses, expected at most one a family"
