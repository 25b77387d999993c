"""What can be changed through the control socket, and by whom."""

import logging
import os

import pytest

from tests.control_server import NOBODY
from tests.fakes.switching import FakeSwitching
from tunsplit.errors import ConfigError, PermissionMissing, TunsplitError
from tunsplit.kernel.peer import Subject
from tunsplit.tasks.control import Credentials, Request
from tunsplit.tasks.verbs import RIGHTS, Right, Switching, Verbs, on_hangup

ROOT, MEMBER = Credentials(10, 0, 0), Credentials(20, NOBODY, NOBODY)
PROCESSES = {
    4711: Subject(4711, 100, 4711, frozenset({NOBODY})),
    4712: Subject(4712, 100, 4711, frozenset({NOBODY})),  # a thread
    5000: Subject(5000, 200, 5000, frozenset({0})),
    6000: Subject(6000, 300, 6000, frozenset({0, NOBODY})),  # set-user-id
}


@pytest.fixture
def switching() -> FakeSwitching:
    return FakeSwitching()


@pytest.fixture
def ask(switching):
    mapping = Verbs(switching, "tunsplit.toml", look=PROCESSES.get).verbs()

    def ask(verb: str, credentials: Credentials = ROOT, **arguments: object) -> object:
        return mapping[verb](Request(verb, arguments, credentials))

    return ask


def test_every_verb_has_its_right_and_every_right_its_verb(switching):
    fits: Switching = switching  # judged by mypy

    assert set(RIGHTS) == {"status", "flows", "dns", *Verbs(fits, "t.toml").verbs()}


def test_who_may_connect_may_what_the_table_says(switching, ask):
    """Of another's: refused or not shown, just where the table says OWN; the rest does not name anybody."""
    switching.processes = [{"pid": 5000, "exe": "/x", "user": 0, "reasons": ["by hand"]}]
    switching.answer["app"] = {"pid": 5000, "exe": "/x", "user": 0}
    arguments: dict[str, dict[str, object]] = {
        "app add": {"path": "/x"},
        "app remove": {"path": "/x"},
        "pid add": {"pid": 5000},
        "pid remove": {"pid": 5000},
        "explain": {"pid": 5000},
    }
    refused = set()
    for verb in set(RIGHTS) - {"status", "flows", "dns", "exec", "pid list", "pid clear"}:
        ask(verb, ROOT, **arguments.get(verb, {}))
        try:
            ask(verb, MEMBER, **arguments.get(verb, {}))
        except PermissionMissing:
            refused.add(verb)
    switching.by_hand = {5000: (200, False)}

    assert [] == ask("pid list", MEMBER)
    assert {"count": 0} == ask("pid clear", MEMBER)
    own = {verb for verb, right in RIGHTS.items() if right is Right.OWN}
    assert own == refused | {"flows", "dns", "pid list", "pid clear"}


def test_the_list_and_the_file_it_is_kept_in(ask):
    entry = {"rule": 1, "path": "/usr/bin/firefox", "saved": True, "matches": []}

    assert {"apps": [entry], "file": os.path.join(os.getcwd(), "tunsplit.toml")} == ask("app list")  # noqa: PTH109, PTH118  as text


def test_adding_and_removing_is_idempotent(switching, ask):
    assert {"changed": True, "warnings": [], "hints": []} == ask("app add", path="/bin/sh")
    assert {"changed": False, "warnings": [], "hints": []} == ask("app add", path="/bin/sh")
    assert "/bin/sh" in switching.paths
    assert {"changed": True} == ask("app remove", path="/bin/sh")
    assert {"changed": False} == ask("app remove", path="/bin/sh")
    assert {"count": 1} == ask("app clear")
    assert {} == switching.paths


def test_a_path_that_does_not_exist_is_a_warning_but_a_glob_is_none(ask):
    assert {
        "changed": True,
        "warnings": ["/nowhere/x does not exist, so it matches nothing yet"],
        "hints": [],
    } == ask("app add", path="/nowhere/x")
    assert {"changed": True, "warnings": [], "hints": []} == ask("app add", path="/nowhere/**")


def test_a_local_resolver_is_refused_but_for_force_and_then_told_of(switching, ask):
    with pytest.raises(ConfigError, match="covers a local resolver"):
        ask("app add", path="/usr/sbin/dnsmasq")
    hints = ["names are resolved in the tunnel"]
    assert hints == ask("app add", path="/usr/sbin/dnsmasq", force=True)["hints"]
    with pytest.raises(TunsplitError, match="app add: force: found 1, expected bool"):
        ask("app add", path="/x", force=1)


@pytest.mark.parametrize("path", ["x", "", "/a/../b", "/a\nb"])
@pytest.mark.parametrize("verb", ["app add", "app remove"])
def test_a_path_that_is_none_is_refused(verb, path, ask, switching):
    with pytest.raises(ConfigError, match="path: found"):
        ask(verb, path=path)
    assert ["/usr/bin/firefox"] == list(switching.paths)


@pytest.mark.parametrize(
    ("verb", "arguments", "error"),
    [
        ("app add", {}, "app add: path: found None, expected str"),
        ("app add", {"path": 1}, "app add: path: found 1, expected str"),
        ("pid add", {}, "pid add: pid: found None, expected int"),
        ("pid add", {"pid": True}, "pid add: pid: found True, expected int"),
        ("pid add", {"pid": 0}, "pid add: pid: found 0, expected a number from 1 to 4194304"),
        ("pid remove", {"pid": 1 << 80}, "expected a number from 1 to 4194304"),
        ("exec", {"include": 1}, "exec: include: found 1, expected bool"),
        ("explain", {}, "expected one of a pid, an exe, or protocol, source and destination"),
        ("explain", {"pid": 1, "exe": "/x"}, "expected one of"),
        ("explain", {"protocol": "udp"}, "expected one of"),
        ("explain", {"exe": []}, "explain: exe: found"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(verb, arguments, error, ask):
    with pytest.raises(TunsplitError) as caught:
        ask(verb, **arguments)
    assert error in str(caught.value)


def test_a_process_is_named_with_its_start_time(switching, ask):
    assert {"changed": True, "warnings": []} == ask("pid add", MEMBER, pid=4711)
    assert {4711: (100, False)} == switching.by_hand
    assert {"changed": True} == ask("pid remove", MEMBER, pid=4711)
    assert {"changed": False} == ask("pid remove", MEMBER, pid=4711)


@pytest.mark.parametrize(
    ("below", "warnings"), [(5, []), (6, ["6 of 10 processes descend from process 5000, and are excluded with it"])]
)
def test_whom_most_descend_from_is_excluded_with_a_warning(below, warnings, switching, ask):
    """As an init, or a session's service manager: few who name it mean everybody."""
    switching.below = {5000: below}

    assert {"changed": True, "warnings": warnings} == ask("pid add", pid=5000)
    assert 5000 in switching.by_hand


@pytest.mark.parametrize(
    ("pid", "error"), [(4712, "4712 is a thread of process 4711: name the process"), (9999, "there is no process 9999")]
)
def test_what_is_no_process_is_refused(pid, error, ask):
    with pytest.raises(TunsplitError, match=error):
        ask("pid add", pid=pid)


@pytest.mark.parametrize("pid", [5000, 6000])
@pytest.mark.parametrize("verb", ["pid add", "pid remove"])
def test_members_do_not_name_what_is_not_wholly_theirs(verb, pid, switching, ask):
    with pytest.raises(PermissionMissing, match=f"process {pid} is not yours"):
        ask(verb, MEMBER, pid=pid)
    ask(verb, ROOT, pid=pid)


def test_a_process_that_has_ended_can_still_be_taken_off(switching, ask):
    switching.by_hand = {9999: (1, False)}

    assert {"changed": True} == ask("pid remove", pid=9999)


def test_members_see_and_clear_their_own(switching, ask):
    users = {4711: NOBODY, 5000: 0, 6000: NOBODY, 9999: NOBODY}
    switching.processes = [{"pid": pid, "user": user} for pid, user in users.items()]
    switching.by_hand = dict.fromkeys(users, (1, False))

    assert list(users) == [entry["pid"] for entry in ask("pid list")]
    assert [4711, 6000, 9999] == [entry["pid"] for entry in ask("pid list", MEMBER)]
    assert {"count": 1} == ask("pid clear", MEMBER)
    assert {"count": 3} == ask("pid clear")


@pytest.mark.parametrize("include", [False, True])
def test_exec_names_the_process_that_is_proved_to_ask(include, switching):
    request = Request("exec", {"include": include}, MEMBER, lambda: PROCESSES[4711])

    assert {"pid": 4711} == Verbs(switching, "t").exec(request)
    assert {4711: (100, include)} == switching.by_hand


def test_exec_of_nobody_is_refused(ask, switching):
    with pytest.raises(PermissionMissing):
        ask("exec", pid=5000)
    assert {} == switching.by_hand


def test_on_and_off(switching, ask):
    assert {"enabled": False} == ask("off")
    assert not switching.enabled
    assert {"enabled": True} == ask("on")
    assert switching.enabled


def test_a_reload_says_what_changed_or_what_is_wrong(switching, ask):
    assert ["[[app]] #2 is new"] == ask("reload")
    switching.wrong = "t.toml: [dns]: no"
    with pytest.raises(ConfigError, match=r"t\.toml: \[dns\]: no"):
        ask("reload")


def test_sighup_reloads_and_the_log_says_how_it_went(switching, caplog):
    caplog.set_level(logging.INFO)
    on_hangup(switching)
    switching.wrong = "t.toml: [dns]: no"
    on_hangup(switching)

    assert [
        (logging.INFO, "reloaded"),
        (logging.ERROR, "reload failed, the configuration in force stays: t.toml: [dns]: no"),
    ] == [(record.levelno, record.getMessage()) for record in caplog.records]


FLOW = {"protocol": "udp", "source": "10.0.0.1:1", "destination": "10.0.0.2:2"}
NOTHING = dict.fromkeys(("pid", "exe", "protocol", "source", "destination"))


@pytest.mark.parametrize("question", [{"pid": 4711}, {"exe": "/usr/bin/curl"}, FLOW])
def test_a_question_reaches_who_can_explain(question, switching, ask):
    assert switching.answer == ask("explain", **question)
    assert [NOTHING | question] == switching.asked


@pytest.mark.parametrize("question", [{"pid": 4711}, FLOW])
@pytest.mark.parametrize(("user", "allowed"), [(NOBODY, True), (0, False), (None, False)])
def test_members_have_their_own_explained(question, user, allowed, switching, ask):
    switching.answer["app"] = user if user is None else {"pid": 4711, "exe": "/x", "user": user}
    if allowed:
        assert switching.answer == ask("explain", MEMBER, **question)
    else:
        with pytest.raises(PermissionMissing, match="only root may ask about others"):
            ask("explain", MEMBER, **question)


@pytest.mark.parametrize(("other", "allowed"), [(NOBODY, True), (0, False)])
def test_members_do_not_learn_who_else_holds_their_socket(other, allowed, switching, ask):
    switching.answer = {"app": {"user": NOBODY}, "holders": [{"user": NOBODY}, {"user": other}]}
    if allowed:
        assert switching.answer == ask("explain", MEMBER, **FLOW)
    else:
        with pytest.raises(PermissionMissing, match="only root may ask about others"):
            ask("explain", MEMBER, **FLOW)


def test_what_the_rules_say_of_a_program_is_no_secret(switching, ask):
    assert switching.answer == ask("explain", MEMBER, exe="/usr/bin/curl")


def test_who_changed_what_is_logged(ask, caplog):
    caplog.set_level(logging.INFO)
    ask("app add", MEMBER, path="/bin/sh")

    (record,) = caplog.records
    assert ("app add", 20, NOBODY, "/bin/sh") == (
        record.getMessage(),
        record.__dict__["by_pid"],
        record.__dict__["by_uid"],
        record.__dict__["path"],
    )
