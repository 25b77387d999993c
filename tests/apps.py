"""A network namespace without a name, and programs that hold sockets in it."""

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x1, 0x1000

TUN = "tun0"
OWN4, OWN6 = "10.128.0.1", "2001:2:0:5::1"
FAR4, FAR6 = "198.51.100.1", "2001:db8:100::1"  # by the tun; nobody answers there

CAT = Path("/bin/cat").resolve()

SETUP = f"""
link set lo up
link set {TUN} up
address add {OWN4}/32 dev {TUN}
address add {OWN6}/128 dev {TUN} nodad
route add default dev {TUN}
-6 route add default dev {TUN}
"""

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def own_network() -> Iterator[int]:
    """Put this thread into a new network namespace with a tun, whose descriptor it gives, as default route."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert 0 == _libc.unshare(CLONE_NEWNET)
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", TUN.encode(), IFF_TUN | IFF_NO_PI))
            Path(f"/proc/sys/net/ipv6/conf/{TUN}/addr_gen_mode").write_text(
                "1"
            )  # nothing of the kernel's own enters it
            for command in SETUP.strip().splitlines():
                subprocess.run(["ip", *command.split()], check=True)
            Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
            yield tun
        finally:
            os.close(tun)
    finally:
        assert 0 == _libc.setns(before, CLONE_NEWNET)
        os.close(before)


class Apps:
    """Programs that wait, with the sockets that they are given."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def start(self, *sockets: socket.socket, program: Path = CAT, uid: int | None = None) -> int:
        """Start a program that shares these sockets; its pid. It waits until the test is over."""
        return self.launch([program], *sockets, uid=uid)

    def launch(self, command: Sequence[str | Path], *sockets: socket.socket, uid: int | None = None) -> int:
        """Start a command and wait for its first line; `cat` repeats the one that it is sent. Its pid."""
        descriptors = [one.fileno() for one in sockets]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=descriptors, user=uid, bufsize=0
        )
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdout.readline()
        return process.pid

    def python(self, code: str, *sockets: socket.socket) -> int:
        """Run this and stay; its pid, once it has run."""
        command = [
            sys.executable,
            "-c",
            f"{code}\nimport sys; print(flush=True); sys.stdin.readline(); sys.stdin.read()",
        ]
        return self.launch(command, *sockets)

    def hold(self, *sockets: socket.socket, program: Path = CAT) -> int:
        """Start a program that has these sockets for itself."""
        pid = self.start(*sockets, program=program)
        for one in sockets:
            one.close()
        return pid


@contextmanager
def running_apps() -> Iterator[Apps]:
    """Give the means to start programs; they end here."""
    with ExitStack() as stack:
        yield Apps(stack)


def copy_of_cat(path: Path) -> Path:
    """A program of its own at this path."""
    path.write_bytes(CAT.read_bytes())
    path.chmod(0o755)
    return path


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def key(family: int, source: str, source_port: int, destination: str, destination_port: int) -> bytes:
    """A four-tuple, as it lies on the wire."""
    addresses = socket.inet_pton(family, source) + socket.inet_pton(family, destination)
    return addresses + struct.pack("!HH", source_port, destination_port)


def flow(sock: socket.socket, destination_port: int = 80, *, version: int = 4) -> bytes:
    """The four-tuple of what this socket sends to the far end."""
    port = sock.getsockname()[1]
    if version == 4:
        return key(socket.AF_INET, OWN4, port, FAR4, destination_port)
    return key(socket.AF_INET6, OWN6, port, FAR6, destination_port)


def connecting(port: int = 80, *, version: int = 4, family: int | None = None, device: str = "") -> socket.socket:
    """A TCP socket whose SYN is on its way to the far end; `family` AF_INET6 with `version` 4 is dual-stack."""
    family = family or (socket.AF_INET if version == 4 else socket.AF_INET6)
    sock = socket.socket(family, socket.SOCK_STREAM)
    if device:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    sock.setblocking(False)
    far = FAR6 if version == 6 else FAR4 if family == socket.AF_INET else f"::ffff:{FAR4}"
    sock.connect_ex((far, port))
    return sock


def udp(
    address: str = "", port: int = 0, *, family: int = socket.AF_INET, options: tuple[int, ...] = ()
) -> socket.socket:
    """A bound UDP socket; `options` of SOL_SOCKET are switched on before."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    for option in options:
        sock.setsockopt(socket.SOL_SOCKET, option, 1)
    sock.bind((address, port))
    return sock
