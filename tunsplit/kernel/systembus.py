"""What services on the system bus tell of resolvers: systemd-resolved and NetworkManager.

Some facts about where they keep what they know of each link:

systemd-resolved's property `DNS` (org.freedesktop.resolve1(5)) and NetworkManager's `Configuration` of its DnsManager
(since 1.6) are documented, and anybody may read them. The files of both that name links (/run/systemd/resolve/netif,
/run/systemd/netif, /run/NetworkManager/devices) say of themselves that they are private and not to be parsed;
resolved's Varlink socket is root's, and tells of servers only since systemd 254. So they are asked on the bus.

They are asked by `busctl`, which comes with systemd: a message a minute is worth neither a library nor an
implementation of the protocol. Where it is missing, what both write for everybody, their merged lists, does.

The bus is reached by a unix socket in /run, which all network namespaces share: a service's links are ours only if its
process is in our network namespace.

With --auto-start=no a question starts no service.
"""

import json
import shutil
import socket
import subprocess
from ipaddress import IPv4Address, IPv6Address

from tunsplit.host import IPAddress, NamedServers
from tunsplit.kernel.descriptors import read_link
from tunsplit.kernel.resolvconf import address_untrusted

RESOLVED, NETWORK_MANAGER = "systemd-resolved", "NetworkManager"
RESOLVED_NAME, NETWORK_MANAGER_NAME = "org.freedesktop.resolve1", "org.freedesktop.NetworkManager"
PROPERTIES = {
    RESOLVED_NAME: ("/org/freedesktop/resolve1", f"{RESOLVED_NAME}.Manager", "DNS"),
    NETWORK_MANAGER_NAME: (
        "/org/freedesktop/NetworkManager/DnsManager", f"{NETWORK_MANAGER_NAME}.DnsManager", "Configuration",
    ),
}  # fmt: skip
OWNER_PID = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetConnectionUnixProcessID", "s")
TIMEOUT_S = 2
MOST_SERVERS = 64


def ask_resolved(namespace: str | None) -> list[NamedServers]:
    """What systemd-resolved knows of each link, if it runs in this network namespace (as /proc/PID/ns/net shows it)."""
    return resolved_untrusted(_property(RESOLVED_NAME, namespace))


def ask_networkmanager(namespace: str | None) -> list[NamedServers]:
    """What NetworkManager knows of each link, if it runs in this network namespace."""
    return networkmanager_untrusted(_property(NETWORK_MANAGER_NAME, namespace))


def resolved_untrusted(value: object) -> list[NamedServers]:
    """Read the value of `DNS`, a(iiay): link, address family, address; link 0 is for all links."""
    found: dict[int, list[IPAddress]] = {}
    for item in value[:MOST_SERVERS] if isinstance(value, list) else ():
        match item:
            case [int(link), int(family), list(octets)] if (address := _packed_untrusted(family, octets)) is not None:
                found.setdefault(link, []).append(address)
    return [NamedServers(RESOLVED, tuple(addresses), link or None) for link, addresses in found.items()]


def networkmanager_untrusted(value: object) -> list[NamedServers]:
    """Read the value of `Configuration`, aa{sv}: nameservers, and perhaps interface and vpn; the best come first."""
    found = []
    for item in value[:MOST_SERVERS] if isinstance(value, list) else ():
        entry = {key: _variant(one) for key, one in item.items()} if isinstance(item, dict) else {}
        names, link = entry.get("nameservers"), entry.get("interface")
        texts = names[:MOST_SERVERS] if isinstance(names, list) else []
        addresses = [address for text in texts if isinstance(text, str) and (address := _server_untrusted(text))]
        if addresses:
            is_vpn = entry.get("vpn") is True
            found.append(
                NamedServers(
                    NETWORK_MANAGER, tuple(addresses), link if isinstance(link, str) and link else None, is_vpn
                )
            )
    return found


def _property(service: str, namespace: str | None) -> object:
    pid = _ask("call", *OWNER_PID, service)
    # A service that is not there has no pid; one that ends now has no namespace.
    match pid:
        case [int(number)] if namespace is not None and read_link(f"/proc/{number}/ns/net") == namespace:
            return _ask("get-property", service, *PROPERTIES[service])
    return None


def _ask(*words: str) -> object:
    """What a question comes to; None: nothing."""
    if not (program := shutil.which("busctl")):
        return None
    options = ["--system", "--json=short", "--auto-start=no", f"--timeout={TIMEOUT_S}"]
    try:
        done = subprocess.run(
            [program, *options, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer_untrusted(done.stdout) if done.returncode == 0 else None


def answer_untrusted(text: bytes) -> object:
    """The data in busctl's JSON; None if it is none."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _variant(answer)


def _variant(value: object) -> object:
    """A value of busctl's comes with its type."""
    return value.get("data") if isinstance(value, dict) else None


def _packed_untrusted(family: int, octets: list[object]) -> IPAddress | None:
    try:
        packed = bytes(octets)  # type: ignore[arg-type]  # what is no list of octets raises
        if family == socket.AF_INET and len(packed) == 4:
            return IPv4Address(packed)
        if family == socket.AF_INET6 and len(packed) == 16:
            return IPv6Address(packed)
    except (TypeError, ValueError):
        return None
    return None


def _server_untrusted(text: str) -> IPAddress | None:
    """A server as NetworkManager writes it; of one with a name for TLS behind "#" the address."""
    return address_untrusted(text.partition("#")[0])
