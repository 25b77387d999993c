"""Policies of IPsec are read as they were made, and their changes heard of."""

import errno
import subprocess
from ipaddress import ip_network

import pytest

from tests.apps import own_network
from tunsplit.errors import KernelError
from tunsplit.host import IpsecPolicy
from tunsplit.kernel import xfrm
from tunsplit.kernel.netlink import NetlinkSocket, Refused

ESP = ("tmpl", "src", "192.0.2.1", "dst", "192.0.2.2", "proto", "esp", "mode", "tunnel")
FROM, TO = "192.168.50.2/32", "198.51.100.0/24"


def policy(*words):
    subprocess.run(["ip", "xfrm", "policy", *words], check=True)


def made(source=FROM, destination=TO, protocol=0, port=0, mask=0, device=0, priority=0, *, demands=True):
    networks = ip_network(source), ip_network(destination)
    return IpsecPolicy(*networks, protocol, port, mask, device, priority, demands=demands)


@pytest.fixture
def network():
    with own_network():
        yield


@pytest.mark.netns
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("src", FROM, "dst", TO, "dir", "out", *ESP), made()),
        (
            ("src", FROM, "dst", TO, "proto", "tcp", "dport", "443", "dir", "out", "priority", "7", *ESP),
            made(protocol=6, port=443, mask=0xFFFF, priority=7),
        ),
        (("src", FROM, "dst", TO, "dev", "lo", "dir", "out", *ESP), made(device=1)),
        (("src", "2001:db8::/32", "dst", "::/0", "dir", "out", "action", "block"), made("2001:db8::/32", "::/0")),
        (("src", FROM, "dst", TO, "dir", "out"), made(demands=False)),
        (("src", FROM, "dst", TO, "dir", "out", "mark", "0", "mask", "0", *ESP), made()),
    ],
)
def test_a_policy_is_read_as_it_was_made(network, words, expected):
    policy("add", *words)
    assert (expected,) == xfrm.policies()


@pytest.mark.netns
@pytest.mark.parametrize(
    "others", [("dir", "in"), ("dir", "fwd"), ("dir", "out", "if_id", "7"), ("dir", "out", "mark", "5")]
)
def test_others_are_none_for_what_leaves(network, others):
    policy("add", "src", FROM, "dst", TO, *others, *ESP)
    assert () == xfrm.policies()


@pytest.mark.netns
def test_the_lowest_priority_number_comes_first_and_of_equals_the_older(network):
    for number, priority in enumerate((7, 3, 7)):
        policy("add", "src", FROM, "dst", f"10.{number}.0.0/16", "dir", "out", "priority", f"{priority}", *ESP)
    assert ["10.1.0.0/16", "10.0.0.0/16", "10.2.0.0/16"] == [str(one.destination) for one in xfrm.policies()]


@pytest.mark.netns
def test_changes_are_heard_of(network):
    with xfrm.XfrmEvents() as events:
        heard = [events.waiting()]
        policy("add", "src", FROM, "dst", TO, "dir", "out", *ESP)
        heard += [events.waiting(), events.any(), events.waiting(), events.any()]
        policy("delete", "src", FROM, "dst", TO, "dir", "out")
        heard += [events.any()]
    assert [False, True, True, False, False, True] == heard


@pytest.mark.parametrize("code", sorted(xfrm.ABSENT))
def test_a_kernel_without_ipsec_has_no_policies(monkeypatch, code):
    def absent(*_):
        raise KernelError("socket(AF_NETLINK, 6)") from OSError(code, "")

    monkeypatch.setattr(xfrm, "NetlinkSocket", absent)
    monkeypatch.setattr(xfrm, "XfrmEvents", absent)
    assert ((), None) == (xfrm.policies(), xfrm.follow())


@pytest.mark.netns
@pytest.mark.parametrize("code", sorted(xfrm.ABSENT))
def test_one_that_says_so_later_has_none_either(network, monkeypatch, code):
    def absent(*_):
        raise Refused("IPsec policies", code)

    monkeypatch.setattr(NetlinkSocket, "dump", absent)
    assert () == xfrm.policies()


@pytest.mark.netns
def test_any_other_failure_is_one(network, monkeypatch):
    def fail(*_):
        raise Refused("IPsec policies", errno.ENOMEM)

    with monkeypatch.context() as patch:
        patch.setattr(NetlinkSocket, "dump", fail)
        with pytest.raises(KernelError, match="IPsec policies"):
            xfrm.policies()

    def cannot(*_):
        raise KernelError("socket(AF_NETLINK, 6)") from OSError(errno.EMFILE, "")

    monkeypatch.setattr(xfrm, "NetlinkSocket", cannot)
    monkeypatch.setattr(xfrm, "XfrmEvents", cannot)
    for ask in (xfrm.policies, xfrm.follow):
        with pytest.raises(KernelError):
            ask()


@pytest.mark.parametrize("size", [0, 55, 151, 161])
def test_a_message_that_is_cut_is_an_error(size):
    with pytest.raises(KernelError, match="cut"):
        xfrm.parse_policy(bytes(size))
