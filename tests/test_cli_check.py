"""`tunsplit check`: what it finds, how it says so, and what it ends with."""

import os
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from tunsplit import check
from tunsplit.check import Finding, Level
from tunsplit.cli import main
from tunsplit.config import parse
from tunsplit.errors import ConfigError, KernelError
from tunsplit.kernel import caps, conntrack, features
from tunsplit.kernel.features import Feature
from tunsplit.lab import netns

LEAST = "[tunnel]\ninterface = 'tsnothing'\nfwmark = 1\n"
ABSENT = Finding(Level.NOTE, "[tunnel] interface: tsnothing is absent, so the tunnel is down until it appears")


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A host where nothing is missing."""
    monkeypatch.setattr(caps, "effective", lambda: frozenset(caps.NEEDED))
    monkeypatch.setattr(features, "probe", lambda: [Feature("everything", True, "", None)])
    monkeypatch.setattr(check, "TUN_DEVICE", tmp_path)


def invoke(tmp_path, text: str = LEAST) -> Result:
    path = tmp_path / "t.toml"
    path.write_text(text)
    return CliRunner().invoke(main, ["check", "-c", str(path)])


def about(text: str) -> list[Finding]:
    """What is said about a configuration that is right by itself."""
    return [finding for finding in check.configuration(parse(text), "t.toml") if finding not in (OK, ABSENT)]


OK = Finding(Level.OK, "t.toml")


def test_a_healthy_host_ends_with_0(healthy, tmp_path):
    result = invoke(tmp_path)

    assert (0, "") == (result.exit_code, result.stderr)
    assert ["configuration", "capabilities", "kernel", "programs"] == [
        line for line in result.stdout.splitlines() if not line.startswith(" ")
    ]


def test_connection_tracking_without_room_is_a_warning(healthy, monkeypatch):
    monkeypatch.setattr(conntrack, "shortage", lambda: "it is full")

    assert [Finding(Level.OK, "everything"), Finding(Level.WARNING, "it is full")] == list(check.kernel())


def test_a_wrong_configuration_ends_with_2_and_the_host_is_looked_at_all_the_same(healthy, tmp_path):
    result = invoke(tmp_path, "[tunnel]\ninterface = 1\nfwmark = 0")

    assert 2 == result.exit_code
    assert 2 == len(result.stderr.splitlines())
    assert "  wrong    " in result.stderr
    assert "  ok       everything" in result.stdout


def test_a_missing_capability_ends_with_3(healthy, tmp_path, monkeypatch):
    monkeypatch.setattr(caps, "effective", lambda: frozenset(caps.NEEDED[1:]))
    result = invoke(tmp_path)

    assert 3 == result.exit_code
    assert (
        "  missing  CAP_NET_ADMIN: creates the tun, sets routes, rules and the firewall; run as root, or let systemd "
        "grant it: AmbientCapabilities=CAP_NET_ADMIN\n"
    ) == result.stderr


def test_a_missing_feature_ends_with_4(healthy, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "probe", lambda: [Feature("sock_diag", True, "load it", "no such file")])
    result = invoke(tmp_path)

    assert (4, "  missing  sock_diag (no such file): load it\n") == (result.exit_code, result.stderr)


def test_a_missing_program_ends_with_4(healthy, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result = invoke(tmp_path)

    assert (4, "  missing  the program nft is missing: install the package nftables\n") == (
        result.exit_code,
        result.stderr,
    )


def test_a_missing_tun_driver_ends_with_4(healthy, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "TUN_DEVICE", tmp_path / "absent")

    assert 4 == invoke(tmp_path).exit_code


def test_a_fallback_is_named_and_is_no_failure(healthy, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "probe", lambda: [Feature("USO", False, "UDP super-packets off", "Invalid argument")])
    result = invoke(tmp_path)

    assert 0 == result.exit_code
    assert "  note     USO not available (Invalid argument): UDP super-packets off" in result.stdout


def test_what_could_not_be_tried_is_not_missing(healthy, monkeypatch):
    monkeypatch.setattr(features, "probe", lambda: [Feature("tun", True, "load it", "needs root", denied=True)])

    assert [Finding(Level.NOTE, "tun: could not be tried (needs root)")] == list(check.kernel())


def test_a_host_without_namespaces_is_told_so(healthy, monkeypatch):
    def refuse() -> list[Feature]:
        raise KernelError("could not be tried")

    monkeypatch.setattr(features, "probe", refuse)

    assert [Finding(Level.NOTE, "could not be tried")] == list(check.kernel())


def test_a_capability_for_later_is_a_note(healthy, monkeypatch):
    monkeypatch.setattr(caps, "effective", lambda: frozenset(needed for needed in caps.NEEDED if needed.required))

    assert [Level.OK] * 4 + [Level.NOTE] * 2 == [finding.level for finding in check.capabilities()]


@pytest.mark.parametrize(("codes", "code"), [([], 0), ([0, 0], 0), ([0, 4], 4), ([4, 3], 3), ([4, 2, 3, 0], 2)])
def test_the_first_thing_to_mend_gives_the_exit_code(codes, code):
    assert code == check.exit_code([Finding(Level.OK, "", each) for each in codes])


def test_nothing_is_said_about_an_ordinary_configuration():
    assert [] == about(LEAST + f"[[app]]\npath = '{os.path.realpath('/bin/sh')}'\n[[app]]\npath = '/opt/games/**'")


def test_a_rule_for_a_program_that_is_not_there_is_a_warning():
    (finding,) = about(LEAST + "[[app]]\npath = '/bin/sh'\n[[app]]\npath = '/nowhere/x'")

    assert Finding(Level.WARNING, "[[app]] #2 path: /nowhere/x does not exist, so the rule matches nothing") == finding


@pytest.mark.parametrize(
    ("platform", "more", "classes", "remedy"),
    [
        ("macos", "", ["included", "excluded"], "name a public one, or choose another platform"),
        ("android", "", ["included"], "set [lan] allow = true, or name a public one"),
        ("android", "[lan]\nallow = true", [], ""),
        ("linux", "", [], ""),
    ],
)
def test_a_table_that_answers_nothing_is_a_warning(platform, more, classes, remedy):
    custom = f"[dns]\nplatform = '{platform}'\ncustom = ['192.168.1.1']\n{more}"
    rows = {"included": "normal app", "excluded": "excluded app"}

    assert [
        Finding(
            Level.WARNING,
            f"[dns] custom: by the row {platform} · private custom · {rows[one]} a private resolver is not asked, so "
            f"every question of {one} apps fails (SERVFAIL): {remedy}",
        )
        for one in classes
    ] == about(LEAST + custom)


def test_a_directory_is_no_program():
    assert [Level.WARNING] == [finding.level for finding in about(LEAST + "[[app]]\npath = '/usr'")]


def test_a_client_that_is_not_there_is_a_warning():
    lines = [finding.text for finding in about(LEAST + "client = ['/nowhere/openvpn', 'openvpn.service', '/bin/sh']")]

    assert "[tunnel] client: /nowhere/openvpn does not exist" in lines


def test_a_client_that_others_can_replace_is_wrong(tmp_path):
    program = tmp_path / "openvpn"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o777)
    (finding,) = about(LEAST + f"client = ['{program}']")

    assert (Level.WRONG, 2) == (finding.level, finding.exit_code)
    assert f"[tunnel] client: {program} is not root's alone: " in finding.text


def test_a_client_that_is_a_script_is_a_warning(tmp_path, monkeypatch):
    """Whoever runs this test: the file counts as root's."""
    monkeypatch.setattr("tunsplit.check.why_not_roots", lambda _: None)
    script = tmp_path / "wg-quick"
    script.write_text("#!/bin/bash\n")
    (finding,) = about(LEAST + f"client = ['{script}']")

    assert Level.WARNING is finding.level
    assert "is a script, and what runs is its interpreter" in finding.text


def test_an_unknown_user_of_the_transport_is_wrong():
    (finding,) = about(LEAST + "transport_user = 'tsnobody'")

    assert (Level.WRONG, 2) == (finding.level, finding.exit_code)
    assert "[tunnel] transport_user: found tsnobody, expected a user of this host" == finding.text


def test_an_unknown_user_of_a_rule_is_a_warning():
    lines = [
        finding.text
        for finding in about(LEAST + "[[app]]\nuser = 'tsnobody'\n[[app]]\nuser = 4242\n[[app]]\nuser = 'root'")
    ]

    assert "[[app]] #1 user: tsnobody does not exist, so the rule matches nothing" in lines
    assert not [line for line in lines if "exist" in line and "#1" not in line]


@pytest.mark.parametrize(
    ("rule", "warned"),
    [
        ("user = 'root'", True),
        ("user = 0", True),
        ("user = 'root'\ninherit = false", False),
        ("user = 'root'\nname = 'sh'", False),
        ("user = 4242", False),
    ],
)
def test_a_rule_that_every_process_inherits_from_root_is_a_warning(rule, warned):
    lines = [finding.text for finding in about(f"{LEAST}[[app]]\n{rule}") if finding.level is Level.WARNING]

    assert [warned] * warned == ["the rule claims them all" in line for line in lines]


def test_a_named_uplink_that_is_absent_is_a_warning():
    (finding,) = about(LEAST + "[uplink]\ninterface = 'tsnone'")

    assert "[uplink] interface: tsnone is absent, so excluded apps are refused until it appears" == finding.text


def test_what_has_no_effect_yet_is_a_note():
    (finding,) = about(LEAST + "[split]\nkernel = 'uplink'")

    assert Level.NOTE == finding.level
    assert finding.text.startswith("[split] kernel is accepted but has no effect yet")


def test_a_wrong_configuration_is_told_line_by_line():
    findings = list(check.configuration(ConfigError("a\nb"), "t.toml"))

    assert [Finding(Level.WRONG, "a", 2), Finding(Level.WRONG, "b", 2)] == findings


# --------------------------------------------------------------- on real interfaces


@pytest.fixture
def host() -> Iterator[netns.Namespace]:
    """A network namespace with a device wg9 that is down."""
    name = f"ts{os.getpid()}check"
    netns.create([name])
    namespace = netns.Namespace(name)
    namespace.ip("link add wg9 type veth peer name wg9p\nlink set wg9p up\n")
    yield namespace
    netns.delete([name])


def tunnel_findings(host: netns.Namespace, more: str = "") -> list[str]:
    config = parse("[tunnel]\ninterface = 'wg9'\nfwmark = 1\n" + more)
    findings = host.call_sync(lambda: list(check.configuration(config, "t.toml")))
    return [finding.text for finding in findings if "no effect yet" not in finding.text][1:]


@pytest.mark.netns
def test_a_tunnel_that_is_down_is_said_to_be(host):
    assert ["[tunnel] interface: wg9 is down, so the tunnel counts as down"] == tunnel_findings(host)


@pytest.mark.netns
def test_a_tunnel_without_an_address_counts_as_down(host):
    host.ip("link set wg9 up\n")

    assert ["[tunnel] interface: wg9 has no address, so the tunnel counts as down"] == tunnel_findings(host)


@pytest.mark.netns
def test_a_tunnel_with_a_subnet_has_a_resolver(host):
    host.ip("link set wg9 up\naddress add 10.64.0.2/24 dev wg9\naddress add fd64::2/128 dev wg9 nodad\n")

    assert [] == tunnel_findings(host)


@pytest.mark.netns
def test_a_tunnel_without_room_for_a_resolver_wants_its_name(host):
    host.ip("link set wg9 up\naddress add 10.64.0.2/32 dev wg9\naddress add fd64::2/128 dev wg9 nodad\n")

    (warning,) = tunnel_findings(host)
    assert warning.startswith("[tunnel] dns: not given, and the prefixes of wg9 have room for no resolver")
    assert [] == tunnel_findings(host, "dns = ['10.64.0.1']")
