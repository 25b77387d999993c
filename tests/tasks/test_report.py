"""The contract's shapes, literally."""

from dataclasses import asdict, replace
from ipaddress import ip_address, ip_interface
from types import SimpleNamespace

import pytest

from tests.craft import SYN, ends, tcp
from tests.fakes.devices import ETH0, FAR4, FAR6, ICMPV6, TUN4, TUN6, UDP, WG0, opened
from tests.fakes.judges import EXCLUDED, FakeJudge, Gate, as_real
from tunsplit.config.schema import Config, Tunnel
from tunsplit.engine.attribution import Attribution
from tunsplit.engine.flow import App
from tunsplit.engine.policy import Mode, Policy
from tunsplit.engine.sides import SideFacts, Sides
from tunsplit.tasks.control import Credentials, Request
from tunsplit.tasks.dnsproxy import Recent
from tunsplit.tasks.linksockets import LinkSocket
from tunsplit.tasks.report import Report

UPLINK = SideFacts(
    ETH0,
    (ip_interface("192.168.50.2/24"), ip_interface("2001:db8:50::2/64")),
    ip_address("192.168.50.1"),
    ip_address("fe80::1"),
)
TUNNEL = SideFacts(WG0, (ip_interface("10.64.0.2/32"),))


def a_config(**others):
    return Config(tunnel=Tunnel(interface="wg0", fwmark=1), **others)


def asked_by(uid):
    return Request("flows", {}, Credentials(1, uid, uid))


@pytest.fixture
def gate(monkeypatch):
    monkeypatch.setattr("tunsplit.tasks.report.shortage", lambda: None)
    made = Gate()
    made.network.sides = Sides(UPLINK, UPLINK, TUNNEL)
    made.ports.counters["port_in_use"] += 1
    yield made
    made.close()


def report(gate, *, policy=None, recent=(), captured=False, link_sockets=(), **config):
    judge = FakeJudge(policy) if policy else gate.judge
    dns = SimpleNamespace(
        setting=lambda: "default",
        routes=list,
        statistics=dict,
        recent=lambda: recent,
        capture=SimpleNamespace(has_captured=lambda _: captured),
    )
    return Report(
        as_real(SimpleNamespace(config=a_config(**config), hints=lambda: ["a hint"])),
        as_real(judge),
        gate.nat,
        as_real(gate.network),
        gate.admit,
        gate.forward,
        as_real(gate.ports),
        gate.tuns,
        as_real(dns),
        as_real(SimpleNamespace(listed=lambda: link_sockets)),
        gate.counters,
    )


def test_status_has_the_contract_s_shape(gate):
    status = report(gate).status()
    counters = status.pop("counters")

    assert {
        "state": "active",
        "failure": None,
        "tunnel": {"interface": "wg0", "up": True, "addresses": ["10.64.0.2/32"], "mtu": 1420},
        "uplink": {
            "interface4": "eth0",
            "interface6": "eth0",
            "addresses": ["192.168.50.2/24", "2001:db8:50::2/64"],
            "gateway4": "192.168.50.1",
            "gateway6": "fe80::1",
        },
        "dns": {"platform": "linux", "setting": "default", "routes": []},
        "split": {"enabled": True, "mode": "exclude"},
        "hints": ["a hint"],
        "link_sockets": [],
    } == status
    assert all(isinstance(count, int) for count in counters.values())
    assert {"flows", "held_flows", "port_in_use", "uplink_received", "tunnel_received", "tun_write_dropped"} <= set(
        counters
    )


@pytest.mark.parametrize(("uid", "sees"), [(0, True), (1000, True), (1001, False)])
def test_sockets_below_ip_are_shown_and_whose_to_root_and_their_user(gate, uid, sees):
    app = App(7, "/sbin/dhclient", 1000)
    sockets = LinkSocket("packet", "eth0", app), LinkSocket("xdp", None, None)
    found = report(gate, link_sockets=sockets).status(Request("status", {}, Credentials(1, uid, uid)))["link_sockets"]
    whole = {"pid": 7, "exe": "/sbin/dhclient", "user": 1000}

    assert [
        {"kind": "packet", "interface": "eth0", "app": whole if sees else None},
        {"kind": "xdp", "interface": None, "app": None},
    ] == found


def test_connection_tracking_that_is_full_is_a_hint(gate, monkeypatch):
    monkeypatch.setattr("tunsplit.tasks.report.shortage", lambda: "it is full")

    assert ["a hint", "it is full"] == report(gate).status()["hints"]


def test_without_sides_nothing_is_invented(gate):
    gate.network.sides = Sides()
    status = report(gate).status()

    assert {"interface": "wg0", "up": False, "addresses": [], "mtu": None} == status["tunnel"]
    assert {"interface4": None, "interface6": None, "addresses": [], "gateway4": None, "gateway6": None} == status[
        "uplink"
    ]


def test_what_failed_is_said(gate):
    gate.network.failure = "nft: no"
    status = report(gate).status()

    assert ("blocked", "nft: no") == (status["state"], status["failure"])


def test_switched_off_is_disabled(gate):
    status = report(gate, policy=Policy((), Mode.INCLUDE, enabled=False)).status()

    assert ("disabled", {"enabled": False, "mode": "include"}) == (status["state"], status["split"])


async def test_an_open_flow_has_the_contract_s_shape(gate):
    opened(gate.nat, f"{TUN4}:5000 > {FAR4}:53", gate.uplink.way(), app=App(7, EXCLUDED, 1000))
    (flow,) = report(gate).flows(asked_by(0))
    assert flow.pop("age_s") > 0

    assert {
        "protocol": "udp",
        "source": "10.128.0.1:5000",
        "destination": "198.51.100.1:53",
        "nat": "192.168.50.2:50000",
        "verdict": "uplink",
        "state": "open",
        "reason": "default",
        "attribution": "exact",
        "app": {"pid": 7, "exe": EXCLUDED, "user": 1000},
        "packets_out": 0,
        "bytes_out": 0,
        "packets_in": 0,
        "bytes_in": 0,
        "captured": False,
    } == flow


async def test_a_flow_of_questions_is_shown_as_such(gate):
    opened(gate.nat, f"{TUN4}:5000 > {FAR4}:53", gate.uplink.way())
    (flow,) = report(gate, captured=True).flows(asked_by(0))

    assert (True, "uplink") == (flow["captured"], flow["verdict"])


async def test_ipv6_has_brackets_and_echo_its_identifier(gate):
    opened(gate.nat, f"[{TUN6}]:77 > [{FAR6}]:0", gate.network.way("uplink", 6, b""), protocol=ICMPV6)
    (flow,) = report(gate).flows(asked_by(0))

    assert ("icmpv6", f"[{TUN6}]:77", f"[{FAR6}]:0", "[2001:db8:50::2]:50000") == (
        flow["protocol"], flow["source"], flow["destination"], flow["nat"],
    )  # fmt: skip


async def test_what_is_not_translated_has_no_nat(gate):
    key = ends(f"192.168.50.2:80 > {FAR4}:5000").key
    gate.nat.open_untranslated(6, key, gate.uplink.way(), 0.0, app=None, reason="default", attribution="exact")
    (flow,) = report(gate).flows(asked_by(0))

    assert (None, None) == (flow["nat"], flow["app"])


async def test_a_refused_flow_has_the_same_shape_as_an_open_one(gate):
    gate.source.at_once[5000] = Attribution("no socket", None)
    gate.passes(tcp(f"{TUN4}:5000 > {FAR4}:80", flags=SYN))
    opened(gate.nat, f"{TUN4}:5000 > {FAR4}:53", gate.uplink.way())
    flow, refused = report(gate).flows(asked_by(0))

    assert list(flow) == list(refused)
    assert ("block", "refused", "unattributed", "gone", None) == (
        refused["verdict"], refused["state"], refused["reason"], refused["attribution"], refused["app"],
    )  # fmt: skip


@pytest.mark.parametrize(("uid", "sees"), [(0, 4), (1000, 2), (1001, 0)])
async def test_everybody_sees_his_own(gate, uid, sees):
    opened(gate.nat, f"{TUN4}:5000 > {FAR4}:53", gate.uplink.way(), protocol=UDP, app=App(7, EXCLUDED, 1000))
    opened(gate.nat, f"{TUN4}:5001 > {FAR4}:53", gate.uplink.way(), port=50001)
    gate.network.closed = {"uplink"}
    gate.source.knows(6000, EXCLUDED)
    gate.source.at_once[6001] = Attribution("no socket", None)
    gate.passes(*[tcp(f"{TUN4}:{port} > {FAR4}:80", flags=SYN) for port in (6000, 6001)])

    assert sees == len(list(report(gate).flows(asked_by(uid))))


def test_the_verbs_are_those_of_the_command_line(gate):
    verbs = report(gate).verbs()

    assert ["status", "flows", "dns"] == list(verbs)
    assert "active" == verbs["status"](asked_by(0))["state"]


QUESTION = Recent(
    7, 12.5, App(100, "/usr/bin/dig", 1000), "uplink", "tunnel", "linux · default · excluded app", "8.8.8.8",
    "10.64.0.1", "example.org.", "A", "NOERROR", 1.25, cached=False,
)  # fmt: skip


@pytest.mark.parametrize(("uid", "sees"), [(0, 2), (1000, 1), (1001, 0)])
def test_questions_are_shown_to_whom_they_are_of(gate, uid, sees):
    shown = list(report(gate, recent=[QUESTION, replace(QUESTION, app=None)]).dns(asked_by(uid)))

    assert sees == len(shown)
    expected = {**asdict(QUESTION), "app": {"pid": 100, "exe": "/usr/bin/dig", "user": 1000}}
    assert [expected][:sees] == shown[:1]
