"""The tun device."""

import errno
import fcntl
import os

import pytest

from tests.hosts import TUNNEL, UPLINK, run
from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel.tun import OFFLOADS, TUNSETOFFLOAD, TUNSETVNETHDRSZ, Tun
from tunsplit.wire import vnet

pytestmark = pytest.mark.netns

NAME = "ts-tun"
IOCTL = fcntl.ioctl


def kernel_that_knows(*accepted, error=errno.EINVAL, refused=TUNSETOFFLOAD):
    """An ioctl that accepts these offloads only."""

    def ioctl(descriptor, request, argument=0):
        if request == refused and argument not in accepted:
            raise OSError(error, os.strerror(error))
        return IOCTL(descriptor, request, argument)

    return ioctl


def test_here_all_offloads_are_there(host):
    with Tun(NAME) as tun:
        assert OFFLOADS[0][1] == tun.offloads


@pytest.mark.parametrize("best", range(len(OFFLOADS)))
def test_an_older_kernel_gives_what_it_has(host, monkeypatch, best):
    flags, description = OFFLOADS[best]
    monkeypatch.setattr("tunsplit.kernel.tun.fcntl.ioctl", kernel_that_knows(flags))
    with Tun(NAME) as tun:
        assert description == tun.offloads


@pytest.mark.parametrize(
    ("ioctl", "message"),
    [
        (kernel_that_knows(), "refuses every set of offloads"),
        (kernel_that_knows(error=errno.EIO), "TUNSETOFFLOAD on ts-tun: Input/output error"),
        (kernel_that_knows(refused=TUNSETVNETHDRSZ), "creating ts-tun"),
    ],
)
def test_a_kernel_that_will_not_is_an_error_and_leaves_nothing(host, monkeypatch, ioctl, message):
    monkeypatch.setattr("tunsplit.kernel.tun.fcntl.ioctl", ioctl)
    with pytest.raises(KernelError, match=message):
        Tun(NAME)

    assert NAME not in run("ip", "link")


@pytest.mark.parametrize("name", [UPLINK, TUNNEL])
def test_a_name_in_use_is_told_whatever_holds_it(host, name):
    with pytest.raises(KernelError, match=f"an interface called {name} exists already"):
        Tun(name)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EPERM, PermissionMissing, "CAP_NET_ADMIN"),
        (errno.ENOENT, KernelError, "modprobe tun"),
        (errno.EINVAL, KernelError, "creating ts-tun: "),
    ],
)
def test_why_it_cannot_be_created_is_said_in_words(host, monkeypatch, number, kind, message):
    def fail(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tunsplit.kernel.tun.pytun.TunTapDevice", fail)
    with pytest.raises(kind, match=message):
        Tun(NAME)


def test_nobody_waits_for_it_nor_inherits_it(host):
    with Tun(NAME) as tun:
        assert (False, False) == (os.get_blocking(tun.fileno()), os.get_inheritable(tun.fileno()))


def test_it_is_born_down_and_without_addresses(host):
    with Tun(NAME):
        shown = run("ip", "address", "show", NAME)
        assert "state DOWN" in shown
        assert "inet" not in shown


def test_what_the_kernel_does_not_take_is_counted(host):
    with Tun(NAME) as tun:
        assert not tun.write(vnet.NONE + bytes(40))
        host.ip(f"link set {NAME} up")
        assert not tun.write(vnet.NONE + bytes(40))
        assert tun.write(vnet.NONE + b"\x45" + bytes(39))
        assert 2 == tun.dropped


def test_a_full_kernel_is_a_dropped_packet(host, monkeypatch):
    with Tun(NAME) as tun:
        monkeypatch.setattr(tun, "_file", type("Full", (), {"write": lambda *_: None})())
        assert not tun.write(vnet.NONE)
        assert 1 == tun.dropped


def test_it_goes_when_it_is_closed(host):
    with Tun(NAME):
        assert NAME in run("ip", "link")
    assert NAME not in run("ip", "link")


def test_one_that_was_removed_is_made_anew(host):
    with Tun(NAME) as tun:
        first, descriptor = tun.index, tun.fileno()
        host.ip(f"link delete {NAME}")
        with pytest.raises(OSError, match=os.strerror(errno.EBADFD)):
            tun.read_into(bytearray(2000))
        tun.renew()

        assert tun.index != first
        assert (host.link(NAME).index, 1, None) == (tun.index, tun.renewals, tun.read_into(bytearray(2000)))
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(descriptor)


def test_one_whose_name_is_taken_cannot_be_and_stays_as_it_is(host):
    with Tun(NAME) as tun:
        descriptor = tun.fileno()
        host.ip(f"link delete {NAME}")
        host.ip(f"link add {NAME} type bridge")
        with pytest.raises(KernelError, match=f"an interface called {NAME} exists already"):
            tun.renew()

        assert (descriptor, 0) == (tun.fileno(), tun.renewals)
        with pytest.raises(OSError, match=os.strerror(errno.EBADFD)):
            tun.read_into(bytearray(2000))
        host.ip(f"link delete {NAME}")
