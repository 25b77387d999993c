"""The tun device.

Some facts about TUN:
- With IFF_VNET_HDR each read and write carries a virtio_net_hdr, and after TUNSETOFFLOAD the kernel hands
  over TCP super-packets of up to 64 KiB (TUN_F_TSO*) and UDP ones (TUN_F_USO*, Linux 6.2) with unfinished
  checksums (TUN_F_CSUM). This one option is what makes plain Python fast.
- TUN_F_TSO* without TUN_F_CSUM is refused; an unknown flag refuses the whole set with EINVAL
  (drivers/net/tun.c, set_offload), so the sets are tried from the richest to the plainest.
- python-pytun creates the device and no more: its read() allocates, its file descriptor is blocking and
  inheritable. We read and write that by io.FileIO, which tells "nothing there" by None: an exception for
  it would cost as much as a packet.
- The device goes with its last file descriptor, so a killed process leaves none behind.
"""

import errno
import fcntl
import io
import os
import socket
import struct
from types import TracebackType

import pytun

from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.wire import vnet

# include/uapi/linux/if_tun.h
TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
IFF_VNET_HDR = 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x02, 0x04, 0x20, 0x40

# What to ask for, richest first, and what to call it.
OFFLOADS = (
    (TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6, "checksums, TCP and UDP super-packets"),
    (TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6, "checksums, TCP super-packets (UDP ones need Linux 6.2)"),
    (TUN_F_CSUM, "checksums only"),
    (0, "none"),
)

Buffer = bytearray | memoryview


class Tun:
    """A tun device with virtio-net headers, down and without addresses, while the object is open."""

    def __init__(self, name: str) -> None:
        """Create the device.

        Raises:
            PermissionMissing: CAP_NET_ADMIN is not there.
            KernelError: there is no /dev/net/tun, or the name is in use.
        """
        self.name = name
        try:
            self._device = pytun.TunTapDevice(name=name, flags=pytun.IFF_TUN | pytun.IFF_NO_PI | IFF_VNET_HDR)
        except (pytun.Error, OSError) as error:
            raise _explained(name, error) from error
        self._fd: int = self._device.fileno()
        try:
            os.set_blocking(self._fd, False)
            os.set_inheritable(self._fd, False)
            fcntl.ioctl(self._fd, TUNSETVNETHDRSZ, struct.pack("i", vnet.SIZE))
            self.offloads = self._negotiate()
        except OSError as error:
            self._device.close()
            raise _explained(name, error) from error
        except BaseException:
            self._device.close()
            raise
        self._file = io.FileIO(self._fd, "r+", closefd=False)
        # Reads one packet into a buffer: bytes in all, virtio header included, or None where there is none just now.
        # OSError EBADFD when somebody has removed the device; others concern this packet only.
        self.read_into = self._file.readinto
        self.dropped = 0

    def _negotiate(self) -> str:
        for flags, description in OFFLOADS:
            try:
                fcntl.ioctl(self._fd, TUNSETOFFLOAD, flags)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise KernelError(f"TUNSETOFFLOAD on {self.name}: {error.strerror}") from error
            else:
                return description
        raise KernelError(f"{self.name}: the kernel refuses every set of offloads, even none")

    def fileno(self) -> int:
        """The file descriptor, to wait on."""
        return self._fd

    def write(self, packet: bytes | Buffer) -> bool:
        """Write one packet, virtio header first. False, and counted, where the kernel does not take it.

        It refuses packets while the device is down (EIO), malformed ones (EINVAL), and any while memory
        is short (ENOBUFS, ENOMEM, EAGAIN): each of them ends as a dropped packet would on a wire.
        """
        try:
            taken = self._file.write(packet)
        except OSError:
            taken = None
        if taken is None:
            self.dropped += 1
            return False
        return True

    def close(self) -> None:
        """Remove the device, with its addresses and routes."""
        self._device.close()

    def __enter__(self) -> "Tun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _explained(name: str, error: Exception) -> Exception:
    number = error.args[0] if error.args else None
    if number in (errno.EPERM, errno.EACCES):
        return PermissionMissing(f"creating {name} needs CAP_NET_ADMIN: run as root")
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return KernelError("no /dev/net/tun: load the kernel's module with `modprobe tun`")
    # EINVAL: it is there, and no tun (drivers/net/tun.c, tun_set_iff).
    if number == errno.EBUSY or (number == errno.EINVAL and name in (one for _, one in socket.if_nameindex())):
        return KernelError(
            f"an interface called {name} exists already: stop the program that owns it, or set another [tun] name"
        )
    return KernelError(f"creating {name}: {error}")
