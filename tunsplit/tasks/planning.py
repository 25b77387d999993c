"""What is done and said about the host without a daemon: the way closed, and what a start would change."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tunsplit.config import Config
from tunsplit.engine.hostwords import route_words, rule_words
from tunsplit.engine.sides import choose_tun_addresses, find_sides
from tunsplit.engine.steering import plan
from tunsplit.host import HostPlan, Link, Snapshot, TunFacts
from tunsplit.kernel import nft, resolvconf
from tunsplit.kernel.hostconfig import HostConfig, is_ours, preview
from tunsplit.kernel.instance import Instance
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
    with Instance.acquire(), Rtnetlink() as rtnetlink:
        nowhere = Link(0, config.tun.name, 0, up=False, kind="tun", is_layer2=False)
        HostConfig(rtnetlink).apply(_planned(config, rtnetlink.snapshot(), nowhere))


def parts(config: Config) -> list[Part]:
    """What a start would put on the host, in that order, beside what is there of it now.

    Raises:
        ConfigError: [tunnel] transport_user is unknown on this host.
        KernelError: the host cannot be looked at.
    """
    with Rtnetlink() as rtnetlink:
        now = rtnetlink.snapshot()
    name = config.tun.name
    tun = now.link(name)
    to_come = Link(max(link.index for link in now.links) + 1, name, 0, up=False, kind="tun", is_layer2=False)
    wanted = _planned(config, now, tun or to_come)
    names = {link.index: link.name for link in (*now.links, to_come)}
    bodies, sysctls = preview(wanted)
    normal = nft.normal_form(bodies)
    standing = {family: nft.listing(family) or "" for family in nft.FAMILIES}
    return [
        *(
            Part(f"nftables, {family}", tuple(standing[family].splitlines()), tuple(text.splitlines()), is_text=True)
            for family, text in normal.items()
        ),
        Part(
            "sysctls",
            tuple(f"sysctl -w {path}={before}" for path, before, _ in sysctls if before is not None),
            tuple(f"sysctl -w {path}={after}" for path, _, after in sysctls),
        ),
        Part("device", _device_words(now, tun) if tun else (), tuple(_wanted_device_words(wanted))),
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


def _planned(config: Config, snapshot: Snapshot, tun: Link) -> HostPlan:
    settings = steering_of(config)
    sides = find_sides(snapshot, tunnel=settings.tunnel, uplink=settings.uplink, tun=tun.name)
    addresses = config.tun.address or choose_tun_addresses(snapshot, tun=tun.name)
    wanted = plan(settings, snapshot, sides, TunFacts(tun, addresses))
    return wanted if config.tun.mtu is None else replace(wanted, tun_mtu=config.tun.mtu)


def _device_words(now: Snapshot, tun: Link) -> tuple[str, ...]:
    addresses = [one.interface for one in now.addresses_of(tun) if not one.interface.is_link_local]
    return (*_made(tun.name, tun.mtu, addresses), *([f"ip link set {tun.name} up"] if tun.up else ()))


def _wanted_device_words(wanted: HostPlan) -> tuple[str, ...]:
    return (*_made(wanted.tun.name, wanted.tun_mtu, wanted.tun_addresses), f"ip link set {wanted.tun.name} up")


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
