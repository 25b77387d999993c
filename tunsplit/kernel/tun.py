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
- Anybody who may can remove it, rename it or move it to another namespace while the descriptor is open. Reads of one
  that was removed are EBADFD (drivers/net/tun.c, tun_chr_read_iter), for ever.
"""

import errno
import fcntl
import io
import os
import socket
import struct

import pytun

from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel.closing import Closing
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


class Tun(Closing):
    """A tun device with virtio-net headers, down and without addresses, while the object is open.

    Attributes:
        name: the device's.
        index: the device's, in the network namespace in which it was made.
        offloads: what the kernel hands over and takes, in words.
        read_into: reads one packet into a buffer: bytes in all, virtio header included, or None where there is none
            just now. OSError EBADFD when somebody has removed the device; others concern this packet only.
        dropped: packets that the kernel did not take.
        renewals: how often the device had to be made anew.
    """

    def __init__(self, name: str) -> None:
        """Create the device.

        Raises:
            PermissionMissing: CAP_NET_ADMIN is not there.
            KernelError: there is no /dev/net/tun, or the name is in use.
        """
        self.name = name
        self.dropped = 0
        self.renewals = 0
        self._open()

    def _open(self) -> None:
        try:
            device = pytun.TunTapDevice(name=self.name, flags=pytun.IFF_TUN | pytun.IFF_NO_PI | IFF_VNET_HDR)
        except (pytun.Error, OSError) as error:
            raise _explained(self.name, error) from error
        fd = device.fileno()
        try:
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", vnet.SIZE))
            self.offloads = self._negotiate(fd)
            self.index = socket.if_nametoindex(self.name)
        except OSError as error:
            device.close()
            raise _explained(self.name, error) from error
        except BaseException:
            device.close()
            raise
        self._device = device
        self._fd: int = fd
        self._file = io.FileIO(fd, "r+", closefd=False)
        self.read_into = self._file.readinto

    def renew(self) -> None:
        """Make the device anew, since somebody has removed it, renamed it or taken it away. Its index is another.

        Raises:
            PermissionMissing: as at the start; the old descriptor stays, and leads nowhere.
            KernelError: as at the start, the same.
        """
        lost = self._device
        self._open()
        lost.close()
        self.renewals += 1

    def _negotiate(self, fd: int) -> str:
        for flags, description in OFFLOADS:
            try:
                fcntl.ioctl(fd, TUNSETOFFLOAD, flags)
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
