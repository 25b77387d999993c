"""The whole configuration: every section, key, type, default and accepted value, in one place.

A key's annotation carries the reader of its value, so what the daemon gets, what a message says is accepted, and
what the documentation shows cannot drift apart. `None` and `()` stand for "auto" and "not given", as each says.
"""

from typing import Annotated, Any, Self

import msgspec

from tunsplit.config import addresses as a
from tunsplit.config import values as v
from tunsplit.config.addresses import Address, Endpoint, Interface, Listener, Network
from tunsplit.config.values import Reader

VERDICTS = ("tunnel", "uplink", "block")


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """One table of the file; immutable."""

    def replaced(self, **values: Any) -> Self:
        """Return a copy with other values."""
        return msgspec.structs.replace(self, **values)

    def given(self) -> dict[str, Any]:
        """Return the keys that have a value."""
        return {key: value for key, value in msgspec.structs.asdict(self).items() if value is not None}


class Tun(Section, frozen=True):
    """[tun]: our own capture device."""

    name: Annotated[str, a.interface("tunsplit0")] = "tunsplit0"
    forwarded: Annotated[str, a.interface("tunsplit1")] = "tunsplit1"  # the device of what this host forwards
    # (): addresses that the host does not use are chosen.
    address: Annotated[
        tuple[Interface, ...], v.word_or("auto", (), v.each(a.own_address(), "addresses, one a family"))
    ] = ()
    # None: the smaller of both sides'. Below 1280 the kernel takes IPv6 from a device.
    mtu: Annotated[int | None, v.word_or("auto", None, v.integer(1280, 65535))] = None


class Tunnel(Section, frozen=True):
    """[tunnel]: the VPN's interface and its transport."""

    interface: Annotated[str, a.interface("wg0")]
    # 0 is what packets without a mark carry.
    fwmark: Annotated[int | None, v.integer(1, 0xFFFFFFFF, "a packet mark")] = None
    endpoint: Annotated[tuple[Endpoint, ...], v.word_or("none", (), v.each(a.endpoint(), "endpoints"))] = ()
    dns: Annotated[
        tuple[Address, ...], v.each(a.address(), "addresses")
    ] = ()  # (): the tunnel's subnet's first address
    transport_user: Annotated[str | int, v.user()] = "root"
    client: Annotated[tuple[str, ...], v.each(v.program_or_unit(), "executables or units")] = ()


class Uplink(Section, frozen=True):
    """[uplink]: the physical interface; "auto" is the default route's, per family."""

    interface: Annotated[str, v.word_or("auto", "auto", a.interface("eth0"))] = "auto"


class Split(Section, frozen=True):
    """[split]: what happens to whom."""

    enabled: Annotated[bool, v.flag()] = True
    mode: Annotated[str, v.choice("exclude", "include")] = "exclude"
    unattributed: Annotated[str, v.choice(*VERDICTS)] = "block"
    ambiguous: Annotated[str, v.choice(*VERDICTS)] = "block"
    forwarded: Annotated[str, v.choice(*VERDICTS)] = "tunnel"
    # None: bridges whose ports are all virtual.
    guests: Annotated[
        tuple[str, ...] | None, v.word_or("auto", None, v.each(a.interfaces("docker0", "ve-*"), "interfaces"))
    ] = None
    kernel: Annotated[str, v.choice(*VERDICTS)] = "tunnel"
    protocols: Annotated[tuple[int, ...], v.each(a.protocol(), "protocols")] = ()
    hold: Annotated[float, v.duration("1ms", "60s")] = 1.0  # seconds


class App(Section, frozen=True):
    """One [[app]]: the keys that are given must all match."""

    path: Annotated[str | None, v.program_path()] = None
    name: Annotated[str | None, v.text('the basename of an executable, such as "firefox"', "[^/]+")] = None
    cmdline: Annotated[str | None, v.regex()] = None
    user: Annotated[str | int | None, v.user()] = None
    cgroup: Annotated[str | None, v.text('a control group or glob, such as "/user.slice/**/app-steam-*.scope"')] = None
    inherit: Annotated[bool, v.flag()] = True
    force: Annotated[bool, v.flag()] = False


MATCHERS = ("path", "name", "cmdline", "user", "cgroup")


class Dns(Section, frozen=True):
    """[dns]: where questions go."""

    platform: Annotated[str, v.choice("windows", "linux", "android", "linux-2021", "macos", "per-app")] = "linux"
    custom: Annotated[tuple[Address, ...], v.each(a.address(), "addresses")] = ()
    system: Annotated[
        tuple[Address, ...], v.word_or("auto", (), v.each(a.address(), "addresses"))
    ] = ()  # (): what was there
    intercept: Annotated[str, v.choice("all", "listed")] = "all"
    listen: Annotated[tuple[Listener, ...], v.each(a.loopback_listener(), "loopback addresses with ports")] = ()
    # resolv.conf names our own resolver while it runs; `listen` has to have one on port 53.
    take_over: Annotated[bool, v.flag()] = False
    filter_aaaa: Annotated[bool, v.flag()] = True
    fallback: Annotated[bool, v.flag()] = False


class Lan(Section, frozen=True):
    """[lan]: what included apps reach beside the tunnel."""

    allow: Annotated[bool, v.flag()] = False
    routes: Annotated[tuple[Network, ...], v.each(a.lan_prefix(), "prefixes")] = ()
    discovery: Annotated[bool, v.flag()] = False


class Firewall(Section, frozen=True):
    """[firewall]: the kill switch."""

    enabled: Annotated[bool, v.flag()] = True
    on_stop: Annotated[str, v.choice("open", "block")] = "open"


class Control(Section, frozen=True):
    """[control]: the socket that the other commands talk to."""

    socket: Annotated[str, v.socket_path()] = "/run/tunsplit/tunsplit.sock"
    group: Annotated[str, v.group()] = "tunsplit"


class Log(Section, frozen=True):
    """[log]: what goes to stderr."""

    level: Annotated[str, v.choice("debug", "info", "warning", "error")] = "info"
    format: Annotated[str, v.choice("text", "json")] = "text"


class Config(Section, frozen=True):
    """A whole configuration that passed every check."""

    tunnel: Tunnel
    tun: Tun = Tun()
    uplink: Uplink = Uplink()
    split: Split = Split()
    apps: tuple[App, ...] = ()  # [[app]], in the file's order
    dns: Dns = Dns()
    lan: Lan = Lan()
    firewall: Firewall = Firewall()
    control: Control = Control()
    log: Log = Log()


# The file's sections in the order in which they are explained.
SECTIONS: dict[str, type[Section]] = {
    "tun": Tun,
    "tunnel": Tunnel,
    "uplink": Uplink,
    "split": Split,
    "app": App,
    "dns": Dns,
    "lan": Lan,
    "firewall": Firewall,
    "control": Control,
    "log": Log,
}


def readers(section: type[Section]) -> dict[str, Reader]:
    """Return each key of a section with its reader."""
    return {field.name: _reader(field.type) for field in msgspec.structs.fields(section)}


def required(section: type[Section]) -> list[str]:
    """Return the keys of a section that must be given."""
    return [field.name for field in msgspec.structs.fields(section) if field.required]


def _reader(annotation: Any) -> Reader:
    (reader,) = annotation.__metadata__
    assert isinstance(reader, Reader)
    return reader
