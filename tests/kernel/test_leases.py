"""Resolvers by link, from the files of DHCP clients and resolvconf."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunsplit.host import NamedServers
from tunsplit.kernel.leases import dhclient_untrusted, networkd_untrusted, read_leases, read_records

LEASES = """\
default-duid "\\000\\001";
lease {
  interface "eth0";
  option domain-name-servers 192.168.7.1;
  option dhcp-server-identifier 192.168.7.1;
}
lease {
  interface "eth0";
  fixed-address 192.168.50.2;
  option domain-name-servers 192.168.50.53, 9.9.9.9;
}
lease {
  interface "eth1";
  fixed-address 192.168.9.2;
}
lease6 {
  interface "eth0.7";
  ia-na 00:00:00:00 {
    starts 1;
  }
  option dhcp6.name-servers fd00::53 , 2620:fe::9;
}
"""


def servers(link, *texts, source="DHCP lease"):
    return NamedServers(source, tuple(map(ip_address, texts)), link)


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_of_dhclient_s_leases_the_last_one_of_a_link_counts(tmp_path):
    write(tmp_path, "var/lib/dhcp/dhclient.eth0.leases", LEASES)
    write(tmp_path, "var/lib/dhcp/other.txt", LEASES.replace("9.9.9.9", "8.8.8.8"))
    assert [
        servers("eth0", "192.168.50.53", "9.9.9.9"),
        servers("eth0.7", "fd00::53", "2620:fe::9"),
    ] == read_leases(tmp_path)


def test_of_a_file_without_end_the_end_is_read(tmp_path):
    write(tmp_path, "var/lib/dhcp/dhclient.leases", LEASES * 4000)
    assert servers("eth0", "192.168.50.53", "9.9.9.9") in read_leases(tmp_path)


def test_networkd_s_leases_are_by_index(tmp_path):
    write(tmp_path, "run/systemd/netif/leases/2", "# private\nADDRESS=1.2.3.4\nDNS=192.168.50.53 ? 9.9.9.9\n")
    write(tmp_path, "run/systemd/netif/leases/3", "ADDRESS=1.2.3.4\n")
    write(tmp_path, "run/systemd/netif/leases/.4x", "DNS=9.9.9.9\n")
    assert [servers(2, "192.168.50.53", "9.9.9.9")] == read_leases(tmp_path)


def test_resolvconf_s_records_are_by_link_and_program(tmp_path):
    write(tmp_path, "run/resolvconf/interface/eth0.dhclient", "nameserver 192.168.50.53\n")
    write(tmp_path, "run/resolvconf/interfaces/tun0", "nameserver 10.8.0.1\n")
    write(tmp_path, "run/dhcpcd/hook-state/resolv.conf/eth0.7.dhcp", "nameserver 9.9.9.9\n")
    write(tmp_path, "run/resolvconf/interface/empty", "")
    found = read_records(tmp_path)
    for link, address in (("eth0", "192.168.50.53"), ("tun0", "10.8.0.1"), ("eth0.7", "9.9.9.9")):
        assert servers(link, address, source="resolvconf") in found


def test_where_there_is_nothing_nothing_is_named(tmp_path):
    assert [] == read_leases(tmp_path) == read_records(tmp_path)


@given(st.binary() | st.text().map(lambda text: f'lease {{\n interface "{text}";\n option {text};\n}}'.encode()))
def test_whatever_lies_there_is_read_without_an_error(text):
    dhclient_untrusted(text)
    networkd_untrusted(b"DNS=" + text)


@pytest.mark.parametrize("text", ["lease {\n" * 20_000, "lease {" + " " * 200_000, "lease {}\n" * 20_000])
def test_what_is_no_lease_takes_no_time(text):
    assert [] == dhclient_untrusted(text.encode())
