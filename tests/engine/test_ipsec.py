"""Which flows a policy of IPsec claims."""

from dataclasses import replace
from ipaddress import ip_network

import pytest

from tests.craft import GRE, TCP, UDP, ends
from tunsplit.engine.ipsec import demands
from tunsplit.host import IpsecPolicy

OUT = "192.168.50.2:50000 > 198.51.100.1:443"
POLICY = IpsecPolicy(
    ip_network("192.168.50.2/32"), ip_network("198.51.100.0/24"), TCP, 443, 0xFFFF, 2, priority=7, demands=True
)
ANY4 = ip_network("0.0.0.0/0")
PASS = IpsecPolicy(ANY4, ANY4, 0, 0, 0, 0, priority=0, demands=False)
ALL = replace(PASS, demands=True)


def are_demanded(*policies, text=OUT, protocol=TCP, device=2):
    return demands(policies, protocol, ends(text).key, device)


def test_without_policies_nothing_is_claimed():
    assert not are_demanded()


def test_what_has_all_of_a_policys_traits_is_claimed():
    assert are_demanded(POLICY)


@pytest.mark.parametrize(
    "other",
    [
        {"text": "192.168.50.3:50000 > 198.51.100.1:443"},
        {"text": "192.168.50.2:50000 > 198.51.101.1:443"},
        {"text": "192.168.50.2:50000 > 198.51.100.1:444"},
        {"text": "[2001:db8::2]:50000 > [2001:db8::1]:443"},
        {"protocol": UDP},
        {"device": 3},
    ],
)
def test_what_lacks_one_of_them_is_not(other):
    assert not are_demanded(POLICY, **other)


def test_of_several_the_first_counts():
    assert [False, True] == [are_demanded(PASS, POLICY), are_demanded(POLICY, PASS)]


def test_only_the_masked_bits_of_a_port_count():
    policy = replace(POLICY, port=0x0100, port_mask=0xFF00)
    assert [True, False] == [are_demanded(policy), are_demanded(policy, text=OUT.replace("443", "700"))]


def test_protocols_without_ports_are_claimed_by_policies_that_name_none():
    text = OUT.replace(":443", ":99")  # of an echo: not a port
    assert [True, False] == [
        are_demanded(one, text=text, protocol=GRE) for one in (ALL, replace(ALL, port=99, port_mask=0xFFFF))
    ]
