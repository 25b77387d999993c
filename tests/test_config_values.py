"""Every key, with what it takes and what it does not."""

import pytest

from tunsplit.config import parse
from tunsplit.config.schema import SECTIONS, readers
from tunsplit.errors import ConfigError

INTERFACES = (
    ["'eth0'", "'wg-home.7'", "'abcdefghijklmno'"],
    ["''", "'lo'", "'abcdefghijklmnop'", "'a/b'", "'a b'", "'a:1'", "'w*'", "'é'", "'..'", "7"],
)
FLAGS = (["true", "false"], ["0", "1", "'true'", "[]"])
ADDRESSES = (
    ["[]", "['10.64.0.1']", "['fd64::1', '10.64.0.1']"],
    [
        "'10.64.0.1'",
        "['10.64.0']",
        "['224.0.0.1']",
        "['0.0.0.0']",
        "['fe80::1%eth0']",
        "['::']",
        "[1]",
        "['10.0.0.1/32']",
    ],
)
USERS = (["'root'", "'_vpn'", "'svc$'", "0", "1000"], ["''", "-1", "4294967295", "'a b'", "'0x'", "true", "['root']"])
VERDICTS = (["'tunnel'", "'uplink'", "'block'"], ["'Block'", "''", "'drop'", "true"])

KEYS = {
    "tun name": INTERFACES,
    "tun forwarded": INTERFACES,
    "tun address": (
        ["'auto'", "[]", "['10.128.0.1/32']", "['10.128.0.1', 'fd00::1/64']"],
        [
            "'none'",
            "'10.128.0.1'",
            "['127.0.0.1']",
            "['::1']",
            "['224.0.0.1']",
            "['fe80::1']",
            "['10.0.0.1/33']",
            "['x']",
            "[1]",
        ],
    ),
    "tun mtu": (["'auto'", "1280", "1500", "65535"], ["1279", "65536", "'1500'", "true", "1500.0", "[]"]),
    "tunnel interface": INTERFACES,
    "tunnel fwmark": (["1", "51820", "0xffffffff"], ["0", "-1", "0x100000000", "'0xca6c'", "true", "1.0"]),
    "tunnel endpoint": (
        ["'none'", "['203.0.113.10:51820/udp']", "['[2001:db8::1]:1194/tcp', '203.0.113.10:53/udp']"],
        [
            "'203.0.113.10:51820/udp'",
            "['203.0.113.10:51820']",
            "['203.0.113.10/udp']",
            "['203.0.113.10:0/udp']",
            "['203.0.113.10:65536/udp']",
            "['203.0.113.10:051820/udp']",
            "['2001:db8::1:1194/tcp']",
            "['[203.0.113.10]:1/tcp']",
            "['[2001:db8::1:1194/tcp']",
            "['vpn.example:1/udp']",
            "['203.0.113.10:1/sctp']",
            "['127.0.0.1:1/udp']",
            "['0.0.0.0:1/udp']",
            "['[fe80::1%eth0]:1/udp']",
            "[['203.0.113.10:1/udp']]",
            "[1]",
        ],
    ),
    "tunnel dns": ADDRESSES,
    "tunnel transport_user": USERS,
    "tunnel client": (
        ["[]", "['/usr/sbin/openvpn']", "['openvpn@work.service', 'vpn.slice', 'a.scope']"],
        [
            "'/usr/sbin/openvpn'",
            "['openvpn']",
            "['/opt/vpn/*']",
            "['./openvpn']",
            "['/usr/../x']",
            "['a.target']",
            "[1]",
        ],
    ),
    "uplink interface": (["'auto'", *INTERFACES[0]], INTERFACES[1]),
    "split enabled": FLAGS,
    "split mode": (["'exclude'", "'include'"], ["'EXCLUDE'", "''", "'both'", "1"]),
    "split unattributed": VERDICTS,
    "split ambiguous": VERDICTS,
    "split forwarded": VERDICTS,
    "split guests": (
        ["'auto'", "[]", "['docker0', 'br-*', 've-?']"],
        ["'docker0'", "['']", "['sixteen-letters-']", "['a b']", "['a\"b']", "[1]"],
    ),
    "split kernel": VERDICTS,
    "split protocols": (
        ["[]", "['gre', 'esp', 132]", "[254]"],
        [
            "'gre'",
            "['tcp']",
            "['udp']",
            "['icmp']",
            "[6]",
            "[17]",
            "[1]",
            "[58]",
            "[0]",
            "[60]",
            "[256]",
            "[-1]",
            "['GRE']",
            "[true]",
        ],
    ),
    "split hold": (
        ["'1ms'", "'20ms'", "'1.5s'", "'60s'", "'1m'", "'5000us'"],
        ["'0s'", "'61s'", "'1h'", "'1'", "1", "'-1s'", "'1 s'", "'1e1s'", "''"],
    ),
    "app path": (
        ["'/usr/bin/firefox'", "'/opt/games/**'", "'/opt/*/bin/[a-z]?'", "'/a b'"],
        [
            "'firefox'",
            "''",
            "'./x'",
            "'/usr/../x'",
            "'/usr/./x'",
            "'/usr//x'",
            "'//usr/x'",
            "'/usr/bin/'",
            "1",
            "['/x']",
            '"/x\\u0000"',
            '"/x\\n"',
        ],
    ),
    "app name": (["'firefox'", "'a b'"], ["''", "'/usr/bin/firefox'", "1"]),
    "app cmdline": (["'python3 .*'", "'^a|b$'", "'[[a]'"], ["'('", "'a{9999999999999}'", "''", "1", "'*'"]),
    "app user": USERS,
    "app cgroup": (["'/user.slice/**'", "'app-steam-*.scope'"], ["''", "1"]),
    "app inherit": FLAGS,
    "app force": FLAGS,
    "dns platform": (
        ["'windows'", "'linux'", "'android'", "'linux-2021'", "'macos'", "'per-app'"],
        ["'Linux'", "''", "1"],
    ),
    "dns custom": ADDRESSES,
    "dns system": (["'auto'", *ADDRESSES[0]], ADDRESSES[1]),
    "dns intercept": (["'all'", "'listed'"], ["'none'", "true"]),
    "dns listen": (
        ["[]", "['127.0.0.54:53']", "['[::1]:5353']"],
        [
            "'127.0.0.54:53'",
            "['127.0.0.54']",
            "['0.0.0.0:53']",
            "['192.168.1.1:53']",
            "['::1:53']",
            "['[::]:53']",
            "['127.0.0.1:0']",
        ],
    ),
    "dns take_over": (["false"], ["1", "'true'"]),  # true wants `listen`
    "dns filter_aaaa": FLAGS,
    "dns fallback": FLAGS,
    "lan allow": FLAGS,
    "lan routes": (
        ["[]", "['192.168.60.0/24', '10.0.0.0/8', 'fd00:1::/32']", "['172.16.5.0/24']"],
        [
            "['192.168.60.1/24']",
            "['0.0.0.0/1']",
            "['198.51.100.0/24']",
            "['::/0']",
            "['8.0.0.0/6']",
            "'10.0.0.0/8'",
            "['2001:db8::/32']",
        ],
    ),
    "lan discovery": FLAGS,
    "firewall enabled": FLAGS,
    "firewall on_stop": (["'open'", "'block'"], ["'close'", "true"]),
    "control socket": (
        ["'/run/tunsplit/tunsplit.sock'", "'/tmp/a b'"],
        ["''", "'tunsplit.sock'", f"'/{'x' * 107}'", "'/a/../b'", "1"],
    ),
    "control group": (["'tunsplit'", "'wheel'"], ["''", "'a b'", "0"]),
    "log level": (["'debug'", "'info'", "'warning'", "'error'"], ["'INFO'", "'trace'", "10"]),
    "log format": (["'text'", "'json'"], ["'logfmt'", "1"]),
}


def document(key: str, value: str) -> str:
    section = key.split()[0]
    pairs = {"tunnel interface": "'wg9'", "tunnel fwmark": "51820"} | {key: value}
    if section == "app":
        pairs = {"app name": "'x'"} | pairs
    heading = {"app": "[[app]]"}
    return "\n".join(
        line
        for of in SECTIONS
        if (lines := [f"{pair.split()[1]} = {text}" for pair, text in pairs.items() if pair.split()[0] == of])
        for line in [heading.get(of, f"[{of}]"), *lines]
    )


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (good, _) in KEYS.items() for value in good])
def test_accepted(key, value):
    parse(document(key, value))


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (_, bad) in KEYS.items() for value in bad])
def test_refused_by_its_name_and_with_what_is_accepted(key, value):
    section, name = key.split()
    where = f"[[app]] #1 {name}" if section == "app" else f"[{section}] {name}"

    with pytest.raises(ConfigError, match="expected") as caught:
        parse(document(key, value), "t.toml")

    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"t.toml: {where}")


def test_a_list_has_an_end():
    parse(document("tunnel dns", str(["10.64.0.1"] * 1024)))
    with pytest.raises(
        ConfigError, match=r"\[tunnel\] dns: found 1025 items, expected a list of addresses, at most 1024"
    ):
        parse(document("tunnel dns", str(["10.64.0.1"] * 1025)))


def test_no_key_is_left_out_here():
    assert {f"{name} {key}" for name, section in SECTIONS.items() for key in readers(section)} == set(KEYS)
