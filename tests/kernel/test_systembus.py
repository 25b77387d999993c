"""What the system bus tells, by a busctl that answers as the real one does."""

import json
import os
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunsplit.host import NamedServers
from tunsplit.kernel import systembus

RESOLVED = [[2, 2, [192, 168, 50, 53]], [2, 10, [0x26, 0x20, 0, 0xFE, *[0] * 11, 9]], [0, 2, [9, 9, 9, 9]]]
NETWORK_MANAGER = [
    {"nameservers": {"type": "as", "data": ["10.8.0.1"]}, "interface": {"type": "s", "data": "tun0"},
     "priority": {"type": "i", "data": 50}, "vpn": {"type": "b", "data": True}},
    {"nameservers": {"type": "as", "data": ["192.168.50.53", "9.9.9.9#dns.quad9.net", "?"]},
     "interface": {"type": "s", "data": "wlan0"}, "vpn": {"type": "b", "data": False}},
    {"nameservers": {"type": "as", "data": ["1.1.1.1"]}, "priority": {"type": "i", "data": 1}},
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["nameservers", "interface", "vpn", "data"]), inner)
    ),
)


def servers(source, *texts, **more):
    return NamedServers(source, tuple(map(ip_address, texts)), **more)


@pytest.fixture
def busctl(tmp_path, monkeypatch):
    """Answer by the last word; `pids` are those of services."""

    def install(values, pid=None):
        program = tmp_path / "busctl"
        owner = json.dumps({"type": "u", "data": [os.getpid() if pid is None else pid]})
        cases = "\n".join(
            f"{word}) echo '{json.dumps({'type': '?', 'data': data})}';;" for word, data in values.items()
        )
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nfor last; do :; done\n'
            f"case $last in\norg.*) echo '{owner}';;\n{cases}\n*) exit 1;;\nesac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return tmp_path / "asked"

    return install


@pytest.fixture
def namespace():
    return os.readlink("/proc/self/ns/net")  # noqa: PTH115  as it is compared


def test_both_tell_of_links(busctl, namespace):
    asked = busctl({"DNS": RESOLVED, "Configuration": NETWORK_MANAGER})
    assert [
        servers("systemd-resolved", "192.168.50.53", "2620:fe::9", link=2),
        servers("systemd-resolved", "9.9.9.9"),
    ] == systembus.ask_resolved(namespace)
    assert [
        servers("NetworkManager", "10.8.0.1", link="tun0", is_vpn=True),
        servers("NetworkManager", "192.168.50.53", "9.9.9.9", link="wlan0"),
        servers("NetworkManager", "1.1.1.1"),
    ] == systembus.ask_networkmanager(namespace)
    assert all("--auto-start=no" in line for line in asked.read_text().splitlines())


def test_a_service_of_another_network_namespace_is_not_asked(busctl, namespace):
    asked = busctl({"DNS": RESOLVED})
    assert [] == systembus.ask_resolved("net:[1]")
    assert [] == systembus.ask_resolved(None)
    assert "get-property" not in asked.read_text()


def test_a_service_that_is_not_there_tells_nothing(busctl, namespace):
    busctl({})
    assert [] == systembus.ask_networkmanager(namespace)
    busctl({"DNS": RESOLVED}, pid=1 << 23)
    assert [] == systembus.ask_resolved(namespace)


def test_without_a_bus_or_without_busctl_nothing_is_told(tmp_path, monkeypatch, namespace):
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/nowhere")
    assert [] == systembus.ask_resolved(namespace)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [] == systembus.ask_resolved(namespace)


@pytest.mark.parametrize("fault", ["sleep 30", "exec /nowhere", "echo '['"])
def test_a_busctl_that_fails_tells_nothing(fault, tmp_path, monkeypatch, namespace):
    program = tmp_path / "busctl"
    program.write_text(f"#!/bin/sh\n{fault}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(systembus, "TIMEOUT_S", 0.2)
    assert [] == systembus.ask_resolved(namespace)


@given(JSON, st.binary())
def test_whatever_is_told_is_read_without_an_error(value, text):
    for read in (systembus.resolved_untrusted, systembus.networkmanager_untrusted):
        for one in (value, [value], [{"nameservers": value}], [[2, 2, value]]):
            assert len(read(one)) <= systembus.MOST_SERVERS
    systembus.answer_untrusted(text)
    systembus.answer_untrusted(b"[" * 100_000)


@pytest.mark.parametrize(
    "item", [[2, 2, [1, 2, 3]], [2, 10, [1, 2, 3, 4]], [2, 2, [256] * 4], [2, 2, ["1"] * 4], [2], 2]
)
def test_what_is_no_address_is_passed_over(item):
    assert [] == systembus.resolved_untrusted([item])
