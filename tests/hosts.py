"""A host with an uplink, a tunnel and a tun, in network namespaces without names, for the thread that is in it.

host: eth0 ──────── router: toh        wg0, tunsplit0: what the kernel writes into them is read here
192.168.50.2/24     192.168.50.1/24    10.64.0.2/32          (the tun gets its addresses from the plan)
2001:db8:50::2/64   2001:db8:50::1/64  fd64::2/128
"""

import ctypes
import fcntl
import os
import re
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

import dpkt

from tunsplit.engine.sides import Sides, beside, choose_tun_addresses, find_sides
from tunsplit.engine.steering import Endpoint, SteeringSettings, plan
from tunsplit.host import HostPlan, Link, TunFacts, no_tun
from tunsplit.kernel.rtnetlink import Rtnetlink

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x1, 0x1000
ETH_P_ALL = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23

UPLINK, TUNNEL, TUN, FORWARDED = "eth0", "wg0", "tunsplit0", "tunsplit1"
TUN4, TUN6 = "10.128.0.1", "2001:2:0:5::1"
HOST4, HOST6 = "192.168.50.2", "2001:db8:50::2"
ROUTER4, ROUTER6 = "192.168.50.1", "2001:db8:50::1"
LAN4 = "192.168.50.53"
FAR4, FAR6 = "198.51.100.1", "2001:db8:100::1"
RELAY4 = "203.0.113.10"
FWMARK = 51820

SETTINGS = SteeringSettings(tunnel=TUNNEL, fwmark=FWMARK, endpoints=(Endpoint(ip_address(RELAY4), 51820, 17),))
LAN_ALLOWED = replace(SETTINGS, lan_allow=True)
UP, DOWN, STEER = (
    "mark 0x7501",
    "mark 0x7502",
    "mark 0x7503",
)  # for `way`

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Seen:
    """A frame on the wire, or a packet in a tun."""

    what: str  # "UDP 192.168.50.2:4000 > 198.51.100.1:53", "ARP who-has …", "ICMP6 135 …"
    packet: bytes


class Host:
    """The host, which the calling thread is in."""

    def __init__(self, tun: int, tunnel: int, wire: socket.socket, router: int) -> None:
        self.tun = tun
        self.tunnel = tunnel
        self.wire = wire
        self._router = router

    def ip(self, command: str) -> str:
        """Run `ip` on the host."""
        return run("ip", *command.split())

    @contextmanager
    def at_router(self) -> Iterator[None]:
        """Put the thread into the router for the while."""
        with entered(self._router):
            yield

    def way(self, arguments: str) -> str:
        """Ask `ip route get`: the device, with "via" where there is a gateway; "closed" where there is no way."""
        family = "-6" if ":" in arguments else "-4"
        command = ["ip", family, "route", "get", *arguments.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        words = done.stdout.split()
        if done.returncode or words[0] in ("unreachable", "blackhole"):
            return "closed"
        device = words[words.index("dev") + 1]
        return f"{device} via {words[words.index('via') + 1]}" if "via" in words else device

    def sysctl(self, path: str, value: str | None = None) -> str:
        """Read or write a value under /proc/sys."""
        file = Path("/proc/sys", path)
        if value is not None:
            file.write_text(value)
        return file.read_text().strip()

    def state(self) -> str:
        """Everything that steering can change, as text."""
        commands = (
            "ip -d address", "ip -4 route show table all", "ip -6 route show table all", "ip -4 rule", "ip -6 rule",
            "nft -s list ruleset", "sysctl -a -r ^net.(ipv4|ipv6).(conf|ip_local)",
        )  # fmt: skip
        return "\n".join(
            line
            for command in commands
            for line in run(*command.split()).splitlines()
            # The kernel writes these as it goes.
            if not any(word in line for word in ("stable_secret", "valid_lft"))
        )

    def sides(self, uplink: str = "auto") -> Sides:
        """Find the sides as they are now."""
        with Rtnetlink() as rtnetlink:
            return find_sides(rtnetlink.snapshot(), tunnel=TUNNEL, uplink=uplink, tun=TUN)

    def plan(self, settings: SteeringSettings = SETTINGS) -> HostPlan:
        """Plan for the host as it is now."""
        with Rtnetlink() as rtnetlink:
            now = rtnetlink.snapshot()
        sides = find_sides(now, tunnel=TUNNEL, uplink=settings.uplink, tun=TUN)
        link = now.link(TUN)
        assert link is not None
        own = choose_tun_addresses(now, tuns=(TUN, FORWARDED))
        forwarded = now.link(FORWARDED) or no_tun(FORWARDED)
        return plan(settings, now, sides, TunFacts(link, own), TunFacts(forwarded, beside(own)))

    def link(self, name: str) -> Link:
        """A device as it is now."""
        with Rtnetlink() as rtnetlink:
            found = rtnetlink.snapshot().link(name)
        assert found is not None
        return found

    def in_tun(self, wanted: str) -> Seen | None:
        """Wait for a packet that shows `wanted` to come out of the tun."""
        return awaited(self.tun, lambda: os.read(self.tun, 65536), wanted, describe_packet)

    def on_wire(self, wanted: str) -> Seen | None:
        """Wait for a frame that shows `wanted` to come out of eth0."""
        return awaited(self.wire.fileno(), lambda: self.wire.recv(65536), wanted, describe_frame)

    def drained(self) -> list[str]:
        """Take what is on the wire now, after a marker frame has gone by."""
        # As EAPOL, which our netdev table lets pass.
        marker = b"\x02\x00\x00\x00\x00\x01" + b"\x02\x00\x00\x00\x00\x02" + b"\x88\x8e" + os.urandom(46)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind((UPLINK, 0))
            sender.send(marker)
        seen = []
        while (frame := self.wire.recv(65536)) != marker:
            seen.append(describe_frame(frame))
        return seen

    def drained_tun(self) -> list[str]:
        """Take what has come out of the tun by now."""
        seen = []
        while True:
            try:
                seen.append(describe_packet(os.read(self.tun, 65536)))
            except BlockingIOError:
                return seen


@contextmanager
def open_host() -> Iterator[Host]:
    """Build the host and put this thread into it; wg0 and tunsplit0 are tuns that this process holds."""
    with ExitStack() as stack:
        router = new_namespace()
        stack.callback(os.close, router)
        namespace = new_namespace()
        stack.callback(os.close, namespace)
        stack.enter_context(entered(namespace))
        for scope in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/accept_dad").write_text("0")
        batch(f"""
            link set lo up
            link add {UPLINK} type veth peer name toh netns /proc/{os.getpid()}/fd/{router}
        """)
        with entered(router):
            Path("/proc/sys/net/ipv6/conf/toh/accept_dad").write_text("0")
            batch(f"""
                link set lo up
                link set toh up
                address add {ROUTER4}/24 dev toh
                address add {LAN4}/24 dev toh
                address add {ROUTER6}/64 dev toh nodad
            """)
            wire = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
            wire.bind(("toh", ETH_P_ALL))
            wire.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
            wire.settimeout(5)
        tunnel, tun = open_tun(TUNNEL), open_tun(TUN)
        stack.callback(close_once, tun)
        stack.callback(close_once, tunnel)
        batch(f"""
            link set {UPLINK} up
            address add {HOST4}/24 dev {UPLINK}
            address add {HOST6}/64 dev {UPLINK} nodad
            route add default via {ROUTER4}
            -6 route add default via {ROUTER6}
            link set {TUNNEL} up mtu 1420
            address add 10.64.0.2/32 dev {TUNNEL}
            address add fd64::2/128 dev {TUNNEL} nodad
        """)
        wait_settled()
        with entered(router):
            wait_settled()
        yield Host(tun, tunnel, wire, router)


def wait_settled() -> None:
    """Wait until the kernel has finished with all IPv6 addresses here: a work queue brings the local route, at last."""
    while True:
        addresses = run("ip", "-6", "-o", "address")
        local = run("ip", "-6", "route", "show", "table", "local", "type", "local")
        if "tentative" not in addresses and all(
            f"local {one} " in local for one in re.findall(r"inet6 ([^/ ]+)", addresses)
        ):
            return
        time.sleep(0.001)


def new_namespace() -> int:
    """Make a network namespace; it lives as long as its descriptor or something in it."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert 0 == _libc.unshare(CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        assert 0 == _libc.setns(before, CLONE_NEWNET)
        os.close(before)


@contextmanager
def own_namespace() -> Iterator[None]:
    """Put this thread into a new network namespace for the while."""
    namespace = new_namespace()
    try:
        with entered(namespace):
            yield
    finally:
        os.close(namespace)


@contextmanager
def entered(namespace: int) -> Iterator[None]:
    """Put this thread into a network namespace for the while."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert 0 == _libc.setns(namespace, CLONE_NEWNET)
        yield
    finally:
        assert 0 == _libc.setns(before, CLONE_NEWNET)
        os.close(before)


def open_tun(name: str) -> int:
    """Create a tun; it goes with its descriptor."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return tun


def close_once(descriptor: int) -> None:
    """Close it, unless the test has."""
    try:
        os.close(descriptor)
    except OSError:
        return


def run(*command: str, text: str = "") -> str:
    """Run a program, which has to succeed; return what it prints."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def batch(commands: str) -> None:
    """Run `ip` commands, one a line."""
    for command in commands.strip().splitlines():
        run("ip", *command.split())


def awaited(
    descriptor: int, read: Callable[[], bytes], wanted: str, describe: Callable[[bytes], str], patience_s: float = 3.0
) -> Seen | None:
    """Read until something shows `wanted`; None when nothing has in time."""
    deadline = time.monotonic() + patience_s
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            return None
        packet = read()
        if wanted in (what := describe(packet)):
            return Seen(what, packet)
    return None


def describe_frame(frame: bytes) -> str:
    """A frame in a few words."""
    parsed = dpkt.ethernet.Ethernet(frame)
    if isinstance(parsed.data, dpkt.arp.ARP):
        return f"ARP {parsed.data.op} {socket.inet_ntoa(parsed.data.spa)} asks for {socket.inet_ntoa(parsed.data.tpa)}"
    return describe_packet(frame[14:]) if parsed.type in (0x0800, 0x86DD) else f"frame {parsed.type:#06x}"


def describe_packet(packet: bytes) -> str:
    """A packet in a few words, tcpdump's way."""
    parsed = dpkt.ip.IP(packet) if packet[0] >> 4 == 4 else dpkt.ip6.IP6(packet)
    source, destination = ip_address(parsed.src), ip_address(parsed.dst)
    data = parsed.data
    if isinstance(data, dpkt.tcp.TCP):
        flags = "".join(name for bit, name in ((2, "S"), (4, "R"), (1, "F"), (16, ".")) if data.flags & bit)
        return f"TCP {source}:{data.sport} > {destination}:{data.dport} [{flags}]"
    if isinstance(data, dpkt.udp.UDP):
        return f"UDP {source}:{data.sport} > {destination}:{data.dport}"
    if isinstance(data, (dpkt.icmp.ICMP, dpkt.icmp6.ICMP6)):
        return f"ICMP{'' if parsed.v == 4 else '6'} type {data.type} {source} > {destination}"
    return f"protocol {parsed.p} {source} > {destination}"


def without_tun(after: str, before: str) -> list[str]:
    """The state, with the tun's own lines as they were: it is no host's but ours, and ends with us."""
    old, new = before.splitlines(), after.splitlines()
    tun = [line for line in old if TUN in line]
    own = [line for line in new if TUN in line]
    assert len(tun) == len(own)
    swapped = dict(zip(own, tun, strict=True))
    return [swapped.get(line, line) for line in new]
