"""What is done and said about the host without a daemon: the way closed, and what a start would change."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tunsplit.config import Config
from tunsplit.engine.hostwords import route_words, rule_words
from tunsplit.engine.sides import beside, choose_tun_addresses, find_sides
from tunsplit.engine.steering import plan
from tunsplit.host import HostPlan, Link, Snapshot, TunFacts, no_tun
from tunsplit.kernel import nft, nftegress, nftguard, resolvconf
from tunsplit.kernel.hostconfig import HostConfig, is_ours, preview
from tunsplit.kernel.instance import Instance
from tunsplit.kernel.nftguard import Guard
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.names import TABLES
from tunsplit.tasks.settings import steering_of

NAMES = 53  # the port at which the C library asks


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of thing on the host: what stands there now, and what a start wants there; a line each."""

    heading: str
    now: tuple[str, ...]
    wanted: tuple[str, ...]
    is_text: bool = False  # the lines' order and neighbourhood matter


def block(config: Config) -> None:
    """Close the way, as a stopped daemon leaves it with `firewall.on_stop = "block"`. May be repeated.

    Raises:
        ConfigError: [tunnel] transport_user is unknown on this host.
        TunsplitError: a daemon is at work.
        KernelError: some steps failed; all others are done.
    """
    with Instance.acquire(), Rtnetlink() as rtnetlink, Guard() as guard:
        nowhere = no_tun(config.tun.name), no_tun(config.tun.forwarded)
        HostConfig(rtnetlink, guard=guard).apply(_planned(config, rtnetlink.snapshot(), nowhere))


def parts(config: Config) -> list[Part]:
    """What a start would put on the host, in that order, beside what is there of it now.

    Raises:
        ConfigError: [tunnel] transport_user is unknown on this host.
        KernelError: the host cannot be looked at.
    """
    with Rtnetlink() as rtnetlink:
        now = rtnetlink.snapshot()
    first = max(link.index for link in now.links) + 1
    to_come = [
        replace(no_tun(name), index=first + number)
        for number, name in enumerate((config.tun.name, config.tun.forwarded))
    ]
    tun, forwarded = (now.link(one.name) or one for one in to_come)
    wanted = _planned(config, now, (tun, forwarded))
    names = {link.index: link.name for link in (*to_come, *now.links)}
    wanted, sysctls = preview(wanted)
    normal = nft.normal_form(wanted.rulesets, wanted.sets)
    normal[nftegress.FAMILY] = nftegress.normal_form(wanted.egress)
    standing = {family: nft.listing(family) or "" for family in nft.ALL_FAMILIES}
    guards = nftguard.listing(), nftguard.normal_form(wanted.guard)
    return [
        *(
            Part(f"nftables, {family}", tuple(standing[family].splitlines()), tuple(text.splitlines()), is_text=True)
            for family, text in normal.items()
        ),
        Part("nftables, guard", tuple(guards[0].splitlines()), tuple(guards[1].splitlines()), is_text=True),
        Part(
            "sysctls",
            tuple(f"sysctl -w {path}={before}" for path, before, _ in sysctls if before is not None),
            tuple(f"sysctl -w {path}={after}" for path, _, after in sysctls),
        ),
        Part("devices", tuple(_devices_words(now, to_come)), tuple(_wanted_devices_words(wanted))),
        Part(
            "routes",
            tuple(route_words(route, names) for route in now.routes if route.table in TABLES),
            tuple(route_words(route, names) for route in wanted.routes),
        ),
        Part(
            "rules",
            tuple(rule_words(rule) for rule in now.rules if is_ours(rule)),
            tuple(rule_words(rule) for rule in wanted.rules),
        ),
        *_resolvers(config),
    ]


def _planned(config: Config, snapshot: Snapshot, tuns: tuple[Link, Link]) -> HostPlan:
    settings = steering_of(config)
    tun, forwarded = tuns
    sides = find_sides(snapshot, tunnel=settings.tunnel, uplink=settings.uplink, tun=tun.name)
    addresses = config.tun.address or choose_tun_addresses(snapshot, tuns=(tun.name, forwarded.name))
    wanted = plan(settings, snapshot, sides, TunFacts(tun, addresses), TunFacts(forwarded, beside(addresses)))
    return wanted if config.tun.mtu is None else replace(wanted, tun_mtu=config.tun.mtu)


def _devices_words(now: Snapshot, tuns: Iterable[Link]) -> Iterator[str]:
    for tun in filter(None, (now.link(one.name) for one in tuns)):
        addresses = [one.interface for one in now.addresses_of(tun) if not one.interface.is_link_local]
        yield from (*_made(tun.name, tun.mtu, addresses), *([f"ip link set {tun.name} up"] if tun.up else ()))


def _wanted_devices_words(wanted: HostPlan) -> Iterator[str]:
    for one in wanted.tuns:
        yield from (*_made(one.link.name, wanted.tun_mtu, one.addresses), f"ip link set {one.link.name} up")


def _made(name: str, mtu: int, addresses: Iterable[object]) -> tuple[str, ...]:
    return (
        f"ip tuntap add {name} mode tun",
        f"ip link set {name} mtu {mtu}",
        *(f"ip address add {address} dev {name}" for address in addresses),
    )


def _resolvers(config: Config) -> list[Part]:
    if not config.dns.take_over:
        return []
    own = [one.address for one in config.dns.listen if one.port == NAMES]
    now = own if resolvconf.is_taken() else resolvconf.read().servers
    return [
        Part(
            str(resolvconf.PATH),
            tuple(f"nameserver {server}" for server in now),
            tuple(f"nameserver {server}" for server in own),
        )
    ]
