"""Words: of clients on the control socket, of configurations and leases, of other services, of our own memory."""

import json
from pathlib import Path

from tests.engine.story import CURL, FIREFOX, INIT, SH, Story, firefox, runs
from tests.fakes.switching import FakeSwitching
from tests.fuzz.target import Target, joined, split, target
from tunsplit.config import parse
from tunsplit.config.saving import with_app, without_app, without_apps
from tunsplit.engine.processstate import dump, load
from tunsplit.errors import ConfigError, TunsplitError
from tunsplit.kernel import leases, resolvconf, systembus
from tunsplit.kernel.peer import Subject
from tunsplit.tasks import control
from tunsplit.tasks.verbs import Verbs

TARGETS: dict[str, Target] = {}

SAMPLE = (Path(__file__).parent.parent.parent / "config" / "wireguard.toml").read_bytes()
USER = 1000
PROCESSES = {10: Subject(10, 1, 10, frozenset({USER})), 11: Subject(11, 1, 10, frozenset({0}))}


def requests() -> list[bytes]:
    asked: list[dict[str, object]] = [
        {"verb": "status"},
        {"verb": "app add", "path": "/usr/bin/firefox", "force": True},
        {"verb": "app remove", "path": "/usr/bin/firefox"},
        {"verb": "app list"},
        {"verb": "app clear"},
        {"verb": "pid add", "pid": 10},
        {"verb": "pid remove", "pid": 11},
        {"verb": "pid list"},
        {"verb": "pid clear"},
        {"verb": "exec", "include": True},
        {"verb": "on"},
        {"verb": "off"},
        {"verb": "reload"},
        {"verb": "explain", "pid": 10},
        {"verb": "explain", "exe": "/bin/sh"},
        {"verb": "explain", "protocol": "udp", "source": "10.0.0.1:1", "destination": "[::1]:2"},
    ]
    return [json.dumps(one).encode() for one in asked]


@target(TARGETS, requests)
def a_client_s_line(data: bytes) -> None:
    """Whoever says whatever, the answer is one for him to read, and can be encoded."""
    verbs = Verbs(FakeSwitching(), "tunsplit.toml", look=PROCESSES.get).verbs()
    for credentials in (control.Credentials(10, USER, USER), control.Credentials(1, 0, 0)):
        try:
            request = control.parse_untrusted(data, credentials, lambda: PROCESSES[10])
            answer = verbs[request.verb](request) if request.verb in verbs else None
        except TunsplitError as error:
            answer = control.error_reply(error).decode()
        assert b"".join(control.encoded(answer)).endswith(b"\n")


@target(TARGETS, lambda: [SAMPLE, b'[tunnel]\ninterface = "wg0"\nfwmark = 1\n[[app]]\npath = "/bin/sh"\n'])
def a_configuration(data: bytes) -> None:
    """It is understood, or every problem in it is told; a list that is written back is what was meant."""
    text = data.decode(errors="replace")
    try:
        parse(text)
    except ConfigError:
        return
    for change in (
        lambda: with_app(text, "/bin/cat", "FILE"), lambda: without_app(text, "/bin/sh", "FILE"),
        lambda: without_apps(text, "FILE"),
    ):  # fmt: skip
        try:
            changed = change()
        except ConfigError:
            continue  # to be done by hand
        parse(changed)


LEASE = b'lease {\n  interface "eth0";\n  option domain-name-servers 192.0.2.1, 192.0.2.2;\n}\n'
BUS = {"type": "a(iiay)", "data": [[2, 2, [192, 0, 2, 1]], [0, 10, [0] * 15 + [1]]]}
MANAGED = {"data": [{"nameservers": {"data": ["192.0.2.1", "2001:db8::1#name"]}, "interface": {"data": "eth0"}}]}


@target(
    TARGETS,
    lambda: [
        LEASE,
        b"nameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch a b\noptions edns0\n",
        b"ADDRESS=192.0.2.7\nDNS=192.0.2.1 2001:db8::1\n",
        json.dumps(BUS).encode(),
        json.dumps(MANAGED).encode(),
    ],
)
def a_word_about_resolvers(data: bytes) -> None:
    """From files and services: no more resolvers than we take, whatever they say."""
    assert len(resolvconf.parse_untrusted(data).servers) <= resolvconf.MOST_SERVERS
    assert len(leases.networkd_untrusted(data)) <= resolvconf.MOST_SERVERS
    resolvconf.address_untrusted(data.decode(errors="surrogateescape"))
    found = leases.dhclient_untrusted(data)
    value = systembus.answer_untrusted(data)
    found += systembus.resolved_untrusted(value) + systembus.networkmanager_untrusted(value)
    assert all(len(one.addresses) <= resolvconf.MOST_SERVERS for one in found)


def memories() -> list[bytes]:
    story = Story(firefox)
    for parent, child, program in ((1, 10, FIREFOX), (10, 11, SH), (11, 12, CURL)):
        story.fork(parent, child)
        story.exec(child, program)
    story.exit(11)
    return [json.dumps(dump(story.tree)).encode()]


@target(TARGETS, memories)
def what_a_daemon_has_left(data: bytes) -> None:
    """Nobody is excluded by a memory that contradicts itself; the tree can be told again."""
    try:
        saved = json.loads(data)
    except (ValueError, RecursionError):
        return
    tree = load(saved, [firefox], [INIT, runs(12, CURL), runs(20, FIREFOX)])
    json.dumps(dump(tree))
    tree.reasons(12, 12)


@target(TARGETS, lambda: [joined(b"%s", b"1"), joined(*requests()[:3])])
def several_lines(data: bytes) -> None:
    """One client asks for several things."""
    for line in split(data, 4):
        a_client_s_line(line)
