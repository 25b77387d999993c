"""Values under /proc/sys, and port ranges in them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hosts import own_namespace
from tunsplit.errors import KernelError
from tunsplit.kernel import sysctl

RANGES = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 40)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=8
)


@pytest.mark.netns
def test_a_value_is_written_in_this_namespace_alone():
    before = sysctl.read("net/ipv4/ip_local_reserved_ports")
    with own_namespace():
        sysctl.write("net/ipv4/ip_local_reserved_ports", "4000-4010,5000")
        assert "4000-4010,5000" == sysctl.read("net/ipv4/ip_local_reserved_ports")
        sysctl.write("net/ipv4/ip_local_reserved_ports", "")
        assert sysctl.read("net/ipv4/ip_local_reserved_ports") == ""
    assert before == sysctl.read("net/ipv4/ip_local_reserved_ports")


def test_what_is_not_there_reads_as_nothing_and_cannot_be_written():
    assert sysctl.read("net/ipv4/conf/none/rp_filter") is None
    with pytest.raises(KernelError, match="sysctl net/ipv4/conf/none/rp_filter = 1: No such file"):
        sysctl.write("net/ipv4/conf/none/rp_filter", "1")
    with pytest.raises(KernelError, match="sysctl net/ipv4: Is a directory"):
        sysctl.read("net/ipv4")


@pytest.mark.netns
def test_a_value_that_the_kernel_refuses_is_an_error():
    with own_namespace(), pytest.raises(KernelError, match="Invalid argument"):
        sysctl.write("net/ipv4/ip_local_reserved_ports", "nonsense")


def test_ranges_are_read_and_written_as_the_kernel_does():
    assert [] == sysctl.parse_ranges("")
    assert [(80, 80), (1000, 1010)] == sysctl.parse_ranges("80,1000-1010")
    assert "80,1000-1010" == sysctl.format_ranges([(80, 80), (1000, 1010)])


def numbers(ranges: sysctl.Ranges) -> set[int]:
    return {number for first, last in ranges for number in range(first, last + 1)}


@given(RANGES, RANGES)
def test_ranges_are_sets_of_numbers(some, others):
    joined, left = sysctl.merged([*some, *others]), sysctl.without(some, others)

    assert numbers(some) | numbers(others) == numbers(joined)
    assert numbers(some) - numbers(others) == numbers(left)
    assert joined == sysctl.parse_ranges(sysctl.format_ranges(joined))
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(joined))
