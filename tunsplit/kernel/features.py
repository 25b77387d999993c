"""What this kernel can do, found out by doing it in a network namespace of its own: the host is not changed.

Some facts that shape the probes:

- Version numbers tell little: distributions port features back, and containers lack modules. So each thing is tried.
- A new network namespace needs CAP_SYS_ADMIN; a user namespace around it needs nothing, but a single-threaded
  process and a kernel that allows it (user_namespaces(7)). Hence a forked child.
- Process events exist in the initial network namespace only; elsewhere the connector refuses (drivers/connector).
  /proc/1/ns/net may be closed even to root; kthreadd, pid 2, lives in the same namespace.
"""

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunsplit.errors import KernelError, PermissionMissing, TunsplitError
from tunsplit.host import Rule
from tunsplit.kernel import netlink, packet, rtnetlink, sockdiag, tun
from tunsplit.kernel.nftguard import TABLE, Guard
from tunsplit.kernel.probewords import EGRESS, RULESET
from tunsplit.names import PRIORITY_TRANSPORT, ROUTE_PROTOCOL, TABLE_UPLINK

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
TIMEOUT_S = 20  # for all probes together; modules may have to be loaded

NETLINK_CONNECTOR, NLMSG_DONE = 11, 3  # linux/netlink.h
SOCK_DESTROY = 21  # linux/sock_diag.h
CN_IDX_PROC, CN_VAL_PROC, PROC_CN_MCAST_LISTEN, PROC_EVENT_NONE = 1, 1, 1, 0  # linux/connector.h, linux/cn_proc.h


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of the kernel, as found.

    `complaint` is None where it is there, else what the kernel said, and `denied` says that it only did not let this
    process try. `otherwise` is what to do about it where it is required, and what tunsplit does without it where not.
    """

    name: str
    required: bool
    otherwise: str
    complaint: str | None
    denied: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """How to find out about a feature; `attempt` raises OSError or TunsplitError where it is not there."""

    name: str
    required: bool
    otherwise: str
    attempt: Callable[[], None]


def probe() -> list[Feature]:
    """Try all features; takes about a tenth of a second.

    Raises:
        KernelError: no network namespace could be made to try them in.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        _probe_and_exit(writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    found = json.loads(answer) if answer else f"the probing process ended with status {status}"
    if isinstance(found, str):
        raise KernelError(f"kernel features could not be tried in a network namespace of their own: {found}")
    return [
        Feature(probe.name, probe.required, probe.otherwise, *outcome)
        for probe, outcome in zip(PROBES, found, strict=True)
    ]


def _probe_and_exit(writer: int) -> None:
    """Write a list of outcomes, or a string, why there is no such list."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TIMEOUT_S)
        events, *others = PROBES
        outcomes = [_outcome(events)]  # where the daemon will be: the others must not be tried there
        try:
            _enter_own_network()
        except OSError as error:
            answer = json.dumps(str(error))
        else:
            answer = json.dumps(outcomes + [_outcome(probe) for probe in others])
        os.write(writer, answer.encode())
        code = 0
    finally:
        os._exit(code)  # nothing of the parent's may run a second time, whatever went wrong


def _enter_own_network() -> None:
    try:
        _libc("unshare", CLONE_NEWNET)
    except PermissionError:
        uid, gid = os.geteuid(), os.getegid()
        _libc("unshare", CLONE_NEWUSER | CLONE_NEWNET)
        # A rule for root's packets wants a root; without a say about groups only our own may be mapped.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _libc(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments):
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def _outcome(probe: Probe) -> tuple[str | None, bool]:
    """Return a feature's `complaint` and `denied`."""
    try:
        probe.attempt()
    except (PermissionError, PermissionMissing) as error:
        return str(error), True
    except OSError as error:
        return error.strerror or str(error), False
    except TunsplitError as error:
        return str(error), False
    return None, False


def _process_events() -> None:
    """Subscribe as the daemon would, from the initial network namespace if this is another one."""
    try:
        _subscribe_to_process_events()
    except ConnectionRefusedError:
        _libc("setns", initial_network(), CLONE_NEWNET)
        _subscribe_to_process_events()


def initial_network() -> int:
    """Return a descriptor of the initial network namespace; OSError where it is closed to us."""
    try:
        return os.open("/proc/1/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        if Path("/proc/2/comm").read_text() != "kthreadd\n":
            raise
        return os.open("/proc/2/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _subscribe_to_process_events() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_CONNECTOR) as events:
        events.bind((0, CN_IDX_PROC))
        events.settimeout(1)
        operation = struct.pack("=I", PROC_CN_MCAST_LISTEN)
        message = struct.pack("=IIIIHH", CN_IDX_PROC, CN_VAL_PROC, 0, 0, len(operation), 0) + operation
        events.send(netlink.message(NLMSG_DONE, 0, 0, message))
        while True:  # until the acknowledgement; what other processes do may come before it
            what, _, _, refused = struct.unpack_from("=IIQI", events.recv(1024), 16 + 20)
            if what == PROC_EVENT_NONE:
                if refused:
                    raise OSError(refused, os.strerror(refused))
                return


def _tun() -> None:
    with tun.Tun("probe"):
        return


def offload(flags: int) -> Callable[[], None]:
    """Return an attempt to have a set of offloads granted (TUN_F_*)."""

    def attempt() -> None:
        with tun.Tun("probe") as device:
            fcntl.ioctl(device.fileno(), tun.TUNSETOFFLOAD, flags)

    return attempt


def _packet_socket() -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as side:
        side.setsockopt(packet.SOL_PACKET, packet.PACKET_VNET_HDR, 1)
        side.setsockopt(packet.SOL_PACKET, packet.PACKET_IGNORE_OUTGOING, 1)


def _tcp_diag() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as known:
        known.bind(("0.0.0.0", 0))
        known.listen(1)
        _must_be_found(socket.IPPROTO_TCP, known.getsockname()[1])


def _udp_diag() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as known:
        known.bind(("0.0.0.0", 0))
        _must_be_found(socket.IPPROTO_UDP, known.getsockname()[1])


LOOPBACK, DISCARD = socket.inet_aton("127.0.0.1"), 9


def _must_be_found(protocol: int, port: int) -> None:
    with sockdiag.SockDiag() as diag:
        if not diag.find(protocol, LOOPBACK * 2 + struct.pack("!HH", port, DISCARD)):
            raise KernelError("it does not find a socket that is there")


def _sock_destroy() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as victim,
        netlink.NetlinkSocket(sockdiag.NETLINK_SOCK_DIAG) as kernel,
    ):
        victim.bind(("0.0.0.0", 0))
        victim.listen(1)
        ports = struct.pack("!H", victim.getsockname()[1]), struct.pack("!H", DISCARD)
        wanted = (socket.AF_INET, socket.IPPROTO_TCP, 0, sockdiag.ALL_STATES, *ports, LOOPBACK, LOOPBACK, 0)
        request = sockdiag.pack_request(sockdiag.REQUEST_SIZE, 0, 0, 0, 0, *wanted, sockdiag.NO_COOKIE)
        kernel.request("SOCK_DESTROY", SOCK_DESTROY, 0, request[netlink.HEADER.size :])


def _routing_rule(family: int) -> None:
    rule = Rule(
        family=family,
        priority=PRIORITY_TRANSPORT,
        table=TABLE_UPLINK,
        fwmark=1,
        iif="lo",
        ipproto=socket.IPPROTO_UDP,
        dport=(53, 53),
        uidrange=(0, 0),
        protocol=ROUTE_PROTOCOL,
    )
    with rtnetlink.Rtnetlink() as routes:
        routes.add_rule(rule)
        if rule not in routes.rules(family):
            raise KernelError("the kernel ignores a part of such a rule")


def _ipv6() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC):
        _routing_rule(6)


def _nftables() -> None:
    _load(RULESET)


def _egress() -> None:
    with tun.Tun("probe"):
        _load(EGRESS)


def _load(words: str) -> None:
    try:
        loaded = subprocess.run(
            ["nft", "-f", "-"], input=words, capture_output=True, text=True, timeout=TIMEOUT_S / 2, check=False
        )
    except FileNotFoundError:
        raise KernelError("the program nft is missing") from None
    if loaded.returncode:
        raise KernelError(loaded.stderr.splitlines()[0] if loaded.stderr else f"nft ended with {loaded.returncode}")


def _guard() -> None:
    with Guard() as guard:
        guard.apply(PROBE_CHAIN)


def _guard_persists() -> None:
    with Guard() as guard:
        guard.apply(PROBE_CHAIN)
        if not guard.persists:
            raise KernelError(os.strerror(errno.EOPNOTSUPP))


PROBE_CHAIN = f"add chain {TABLE} probe\n"
CHECKSUMS, TCP4, TCP6 = tun.TUN_F_CSUM, tun.TUN_F_TSO4, tun.TUN_F_TSO6
UDP_BOTH = tun.TUN_F_USO4 | tun.TUN_F_USO6

# The first is tried where the daemon will be, the others in a network namespace of their own.
PROBES = (
    Probe(
        "process events",
        False,
        "nothing in this release: processes are looked up when a flow opens",
        _process_events,
    ),
    Probe("tun device with virtio-net headers", True, "load the kernel's module with `modprobe tun`", _tun),
    Probe("tun: checksum offload", False, "tunsplit gets finished packets only: slow", offload(CHECKSUMS)),
    Probe("tun: TCP super-packets, IPv4", False, "TCP packet by packet: slow", offload(CHECKSUMS | TCP4)),
    Probe("tun: TCP super-packets, IPv6", False, "TCP packet by packet: slow", offload(CHECKSUMS | TCP6)),
    Probe(
        "tun: UDP super-packets",
        False,
        "UDP super-packets off, they need Linux 6.2",
        offload(CHECKSUMS | TCP4 | TCP6 | UDP_BOTH),
    ),
    Probe(
        "packet sockets with virtio-net headers", True, "load the module af_packet, Linux 4.20 or later", _packet_socket
    ),
    Probe("sock_diag for TCP", True, "load the module tcp_diag", _tcp_diag),
    Probe("sock_diag for UDP", True, "load the module udp_diag", _udp_diag),
    Probe(
        "sock_diag: ending sockets",
        False,
        "connections that are older than tunsplit run on until they time out (CONFIG_INET_DIAG_DESTROY)",
        _sock_destroy,
    ),
    Probe(
        "routing rules by mark, owner, protocol and port",
        True,
        "Linux 4.17 or later",
        lambda: _routing_rule(4),
    ),
    Probe("IPv6", False, "IPv4 only", _ipv6),
    Probe("nftables with fib, ct, sets and reject", True, "install the package nftables; load nf_tables", _nftables),
    Probe(
        "egress hook of nftables",
        False,
        "what other programs send by packet sockets (nmap, scapy) leaves beside the firewall; Linux 5.16 or later",
        _egress,
    ),
    Probe("tables with an owner", True, "Linux 5.12 or later; libnftables, of the package nftables", _guard),
    Probe(
        "tables that outlive their owner",
        False,
        "killed right after somebody has flushed nftables, tunsplit leaves a way to sockets that name a device; "
        "Linux 6.9 or later",
        _guard_persists,
    ),
)
