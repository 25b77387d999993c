"""The configuration as a whole: what a file becomes, and what is said about a wrong one."""
# ruff: noqa: E501 -- messages stand here as they are read, unbroken

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_interface

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunsplit.config import App, Config, Endpoint, Listener, Tunnel, parse
from tunsplit.config.schema import SECTIONS, readers
from tunsplit.errors import ConfigError

LEAST = '[tunnel]\ninterface = "wg0"\nfwmark = 51820\n'


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "t.toml")
    return str(caught.value)


def test_what_is_not_given_has_its_default():
    assert Config(tunnel=Tunnel(interface="wg0", fwmark=51820)) == parse(LEAST)


def test_every_key_arrives_typed():
    config = parse("""
        [tun]
        name = "split0"
        address = ["10.128.0.1/32", "2001:2:0:5::1/128"]
        mtu = 1400
        [tunnel]
        interface = "wg0"
        fwmark = 0xca6c
        endpoint = ["203.0.113.10:51820/udp", "[2001:db8::1]:1194/tcp"]
        dns = ["10.64.0.1"]
        transport_user = "openvpn"
        client = ["/usr/sbin/openvpn", "openvpn@work.service"]
        [uplink]
        interface = "eth0"
        [split]
        enabled = false
        mode = "include"
        unattributed = "tunnel"
        ambiguous = "uplink"
        forwarded = "block"
        kernel = "uplink"
        protocols = ["gre", 50]
        hold = "20ms"
        [[app]]
        path = "/usr/bin/firefox"
        [[app]]
        name = "steam"
        cmdline = "python3 .*\\\\.py"
        user = 1000
        cgroup = "/user.slice/*"
        inherit = false
        [dns]
        platform = "android"
        custom = ["9.9.9.9"]
        system = ["192.168.50.53"]
        intercept = "listed"
        listen = ["127.0.0.54:53", "[::1]:53"]
        take_over = true
        filter_aaaa = false
        fallback = true
        [lan]
        allow = true
        routes = ["192.168.60.0/24"]
        discovery = true
        [firewall]
        enabled = false
        on_stop = "block"
        [control]
        socket = "/tmp/s"
        group = "wheel"
        [log]
        level = "debug"
        format = "json"
        """)

    assert (ip_interface("10.128.0.1/32"), ip_interface("2001:2:0:5::1/128")) == config.tun.address
    assert ("split0", 1400) == (config.tun.name, config.tun.mtu)
    tunnel = config.tunnel
    assert ("wg0", 51820, "openvpn") == (tunnel.interface, tunnel.fwmark, tunnel.transport_user)
    assert Endpoint(IPv4Address("203.0.113.10"), 51820, "udp") == tunnel.endpoint[0]
    assert Endpoint(IPv6Address("2001:db8::1"), 1194, "tcp") == tunnel.endpoint[1]
    assert (IPv4Address("10.64.0.1"),) == tunnel.dns
    assert ("/usr/sbin/openvpn", "openvpn@work.service") == tunnel.client
    assert "eth0" == config.uplink.interface
    assert not config.split.enabled
    split = config.split
    assert ("include", "tunnel", "uplink") == (split.mode, split.unattributed, split.ambiguous)
    assert ("block", "uplink", (47, 50), 0.02) == (split.forwarded, split.kernel, split.protocols, split.hold)
    assert App(path="/usr/bin/firefox") == config.apps[0]
    other = App(name="steam", cmdline="python3 .*\\.py", user=1000, cgroup="/user.slice/*", inherit=False)
    assert other == config.apps[1]
    dns = config.dns
    assert ("android", (IPv4Address("9.9.9.9"),), "listed") == (dns.platform, dns.custom, dns.intercept)
    assert (IPv4Address("192.168.50.53"),) == dns.system
    assert (Listener(IPv4Address("127.0.0.54"), 53), Listener(IPv6Address("::1"), 53)) == dns.listen
    assert (False, True, True) == (dns.filter_aaaa, dns.fallback, dns.take_over)
    assert (True, (IPv4Network("192.168.60.0/24"),), True) == (
        config.lan.allow,
        config.lan.routes,
        config.lan.discovery,
    )
    assert (False, "block") == (config.firewall.enabled, config.firewall.on_stop)
    assert ("/tmp/s", "wheel") == (config.control.socket, config.control.group)
    assert ("debug", "json") == (config.log.level, config.log.format)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(AttributeError):
        parse(LEAST).split.enabled = False  # type: ignore[misc]  # what mypy says, at run time


def test_every_key_has_a_reader_that_says_what_it_accepts():
    assert [] == [
        key for section in SECTIONS.values() for key, reader in readers(section).items() if not reader.expected
    ]


MESSAGES = [
    (
        "",
        't.toml: [tunnel] interface: found nothing, expected the name of an interface, such as "wg0" (at most 15 characters, not "lo")',
    ),
    ("[tunnel", "t.toml: found no TOML: Expected ']' at the end of a table declaration (at end of document)"),
    ("a = 1\nb = [}", "t.toml: line 2, column 6: found no TOML: Invalid value"),
    (
        LEAST + "mtu = 1500",
        "t.toml: [tunnel] mtu: found an unknown key, expected interface, fwmark, endpoint, dns, transport_user or client; did you mean [tun] mtu?",
    ),
    (
        LEAST + "[split]\nmod = 1",
        't.toml: [split] mod: found an unknown key, expected enabled, mode, unattributed, ambiguous, forwarded, guests, kernel, protocols or hold; did you mean "mode"?',
    ),
    (
        LEAST + "[fire_wall]",
        "t.toml: [fire_wall]: found an unknown section, expected tun, tunnel, uplink, split, app, dns, lan, firewall, control or log; did you mean [firewall]?",
    ),
    (
        "hold = '1s'\n" + LEAST,
        "t.toml: [hold]: found an unknown section, expected tun, tunnel, uplink, split, app, dns, lan, firewall, control or log; did you mean [split] hold?",
    ),
    ("tun = 3\n" + LEAST, "t.toml: [tun]: found 3, expected a table"),
    (
        LEAST + "[app]\npath = '/x'",
        "t.toml: [[app]]: found a table, expected one [[app]] for each rule, in double brackets",
    ),
    (
        LEAST + "[[app]]\npath = '/x'\n[[app]]\npath = 'firefox'",
        't.toml: [[app]] #2 path: found "firefox", expected an absolute path or glob without "." or ".." parts, such as "/usr/bin/firefox" or "/opt/games/**"',
    ),
    (
        LEAST + "[[app]]\ninherit = false",
        "t.toml: [[app]] #1: found nothing to match, expected at least one of path, name, cmdline, user or cgroup",
    ),
    (
        LEAST + "[dns]\ncustom = ['127.0.0.54']\nlisten = ['127.0.0.54:53']",
        "t.toml: [dns] custom: found 127.0.0.54, which is tunsplit's own resolver ([dns] listen) and would ask itself, "
        "expected a resolver of somebody else's",
    ),
    (
        LEAST + "[dns]\ntake_over = true\nlisten = ['127.0.0.1:5353']",
        "t.toml: [dns] take_over: found true without a resolver of ours to name, expected listen with an address on port "
        '53, such as "127.0.0.54:53"',
    ),
    (LEAST + "[split]\nmode = 'Exclude'", 't.toml: [split] mode: found "Exclude", expected "exclude" or "include"'),
    (
        LEAST + "[split]\nhold = 1",
        't.toml: [split] hold: found 1, expected a duration from "1ms" to "60s", with a unit (us, ms, s, m, h)',
    ),
    (LEAST + "[tun]\nmtu = 1279", 't.toml: [tun] mtu: found 1279, expected "auto" or a number from 1280 to 65535'),
    (
        LEAST + "endpoint = ['vpn.example:51820/udp']",
        't.toml: [tunnel] endpoint #1: found "vpn.example:51820/udp", expected a literal address, port and protocol, such as "203.0.113.10:51820/udp" or "[2001:db8::1]:1194/tcp"',
    ),
    (
        LEAST + "endpoint = 'auto'",
        't.toml: [tunnel] endpoint: found "auto", expected "none" or a list of endpoints, at most 1024',
    ),
    (
        "[tunnel]\ninterface = 'wg0'",
        't.toml: [tunnel] fwmark: found neither fwmark nor endpoint, expected at least one, to know the VPN\'s own packets by (endpoint = "none" if the tunnel sends none on the uplink)',
    ),
    (
        "[tunnel]\ninterface = 'wg0'\nfwmark = 0x7501",
        "t.toml: [tunnel] fwmark: found 29953, expected another mark than 29953, 29954, 29955, which are tunsplit's own",
    ),
    (
        LEAST + "[uplink]\ninterface = 'wg0'",
        't.toml: [uplink] interface: found "wg0", expected another interface than [tunnel] interface',
    ),
    (
        LEAST + "[tun]\naddress = ['10.0.0.1', '10.0.0.2']",
        "t.toml: [tun] address: found 2 IPv4 addresses, expected at most one a family",
    ),
    (
        LEAST + "[dns]\nlisten = ['0.0.0.0:53']",
        't.toml: [dns] listen #1: found "0.0.0.0:53", expected a loopback address with a port, such as "127.0.0.54:53" or "[::1]:53"',
    ),
]


@pytest.mark.parametrize(("text", "message"), MESSAGES, ids=[message[8:60] for _, message in MESSAGES])
def test_a_message_names_file_and_key_and_what_to_write_instead(text, message):
    assert message == complaint(text)


def test_all_problems_are_told_at_once():
    lines = complaint(
        "[tun]\nmtu = 1\nnam = 'x'\n[tunnel]\ninterface = ''\nfwmark = 0\ndns = ['a', '10.0.0.1', 'b']"
    ).splitlines()

    assert [
        "[tun] mtu",
        "[tun] nam",
        "[tunnel] interface",
        "[tunnel] fwmark",
        "[tunnel] dns #1",
        "[tunnel] dns #3",
    ] == [line.split(": ")[1] for line in lines]


def test_a_tunnel_without_a_transport_of_its_own_says_so():
    assert () == parse("[tunnel]\ninterface = 'wg0'\nendpoint = 'none'").tunnel.endpoint


def test_an_empty_list_of_endpoints_is_not_given():
    assert "expected at least one" in complaint("[tunnel]\ninterface = 'wg0'\nendpoint = []")


def test_a_wrong_value_cannot_talk_to_the_terminal():
    assert "\x1b" not in complaint(LEAST + '[split]\nmode = "\\u001b[2J"\n"\\u001b" = 1')


def test_a_long_value_is_shortened():
    assert 300 > len(complaint(LEAST + f"[split]\nmode = '{'x' * 5000}'"))


TOML_KEYS = st.sampled_from([*SECTIONS, *(key for section in SECTIONS.values() for key in readers(section)), "x"])
TOML_VALUES = st.recursive(
    st.one_of(
        st.integers().map(str),
        st.floats().map(str),
        st.sampled_from(["true", "false", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "0x" + "f" * 5000]),
        st.text(st.characters(exclude_characters="'\n\r", exclude_categories=["Cs"])).map(lambda text: f"'{text}'"),
        st.sampled_from(["'none'", "'auto'", "'10.0.0.1/8'", "'[::1]:53'", "'(a+'", "'/usr/bin/x'", "'1h'", "'[[a]'"]),
        st.ip_addresses().map(lambda address: f"'{address}'"),
    ),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(TOML_KEYS, inner, max_size=3).map(
            lambda table: "{" + ", ".join(f"{key} = {value}" for key, value in table.items()) + "}"
        )
    ),
    max_leaves=8,
)
HEADINGS = st.sampled_from(sorted(SECTIONS)).map(lambda name: f"[{name}]") | st.sampled_from(
    ["[[app]]", "[[tun]]", "[x.y]"]
)
PAIRS = st.tuples(TOML_KEYS, TOML_VALUES).map(" = ".join)


@given(st.lists(HEADINGS | PAIRS | st.text(max_size=10), max_size=12).map("\n".join))
@example("a = " + "[" * 100_000)
@example("a = " + "9" * 5000)
@example(LEAST + f"[tun]\nmtu = 0x{'f' * 5000}")
@example(LEAST + "[[app]]\ncmdline = 'a{99999999999999999999}'")
@example(LEAST + "[[app]]\ncmdline = '[[a]'")
@example(LEAST + f"[[app]]\ncmdline = '{'(' * 5000}'")
@example(LEAST + "[tunnel.client]")
def test_any_text_is_a_configuration_or_a_configuration_error(text):
    try:
        parse(text, "t.toml")
    except ConfigError as error:
        for line in str(error).split("\n"):
            assert re.match(r"t\.toml: .*found .*", line)


@pytest.mark.parametrize("section", SECTIONS)
@given(st.data())
def test_any_value_of_any_key_is_read_or_refused(section, data):
    key = data.draw(st.sampled_from(sorted(readers(SECTIONS[section]))))
    heading = "[[app]]" if section == "app" else f"[{section}]"
    try:
        parse(f"{heading}\n{key} = {data.draw(TOML_VALUES)}")
    except ConfigError:
        return
