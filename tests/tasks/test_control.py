"""The control socket, over a real one: who may ask, what, and how little harm a bad client does."""

import contextlib
import ctypes
import grp
import logging
import os
import platform
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from tunsplit.client import call
from tunsplit.config import Control
from tunsplit.errors import KernelError, NotRunning, PermissionMissing, TunsplitError
from tunsplit.tasks import control

NOBODY = 65534
GROUP = grp.getgrgid(1).gr_name  # any group that is there
ABSENT = "tunsplit-no-such-group"

# setgroups(2), setresgid(2), setresuid(2): the C library would carry them out for all threads.
SYSTEM_CALLS = {"x86_64": (116, 119, 117), "aarch64": (159, 149, 147)}


PR_SET_DUMPABLE = 4


def as_user(uid: int, groups: list[int], work: Callable[[], object]) -> object:
    """Do some work in a thread that is another user and stays one until it ends."""
    outcome: list[object] = []

    def body() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        setgroups, setresgid, setresuid = SYSTEM_CALLS[platform.machine()]
        for number, *arguments in (
            (setgroups, len(groups), (ctypes.c_uint32 * len(groups))(*groups)),
            (setresgid, uid, uid, uid),
            (setresuid, uid, uid, uid),
        ):
            if libc.syscall(number, *arguments):
                outcome.append(OSError(ctypes.get_errno(), "cannot become another user"))
                return
        try:
            outcome.append(work())
        except (OSError, TunsplitError) as error:
            outcome.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # changed for all threads (kernel/cred.c, commit_creds)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that any user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def file(directory: Path) -> Path:
    return directory / "run" / "control.sock"


@pytest.fixture
def path(file: Path) -> str:
    return str(file)


def who(request: control.Request) -> object:
    credentials = request.credentials
    return {"uid": credentials.uid, "groups": sorted(credentials.groups), "arguments": request.arguments}


def refuse(_: control.Request) -> object:
    raise KernelError("the kernel said no")


def fail(_: control.Request) -> object:
    raise ZeroDivisionError


def begin_and_fail(_: control.Request) -> Iterator[int]:
    yield from range(1000)
    raise ZeroDivisionError


VERBS: dict[str, control.Verb] = {
    "who": who,
    "refuse": refuse,
    "fail": fail,
    "begin_and_fail": begin_and_fail,
    "many": lambda request: iter(range(request.arguments["count"])),
    "large": lambda _: "x" * 5_000_000,
    "mine": lambda request: [uid for uid in (0, NOBODY, None) if request.credentials.may_see(uid)],
}


@contextlib.asynccontextmanager
async def serving(path: str, group: str = ABSENT):
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(control.serve, Control(socket=path, group=group), VERBS))
        yield
        nursery.cancel_scope.cancel()


async def ask(path: str, verb: str, **arguments: object) -> object:
    return await trio.to_thread.run_sync(partial(call, path, verb, **arguments))


async def ask_as(uid: int, groups: list[int], path: str, verb: str) -> object:
    return await trio.to_thread.run_sync(partial(as_user, uid, groups, partial(call, path, verb)))


async def say(path: str, line: bytes) -> object:
    """Send bytes as they are; return the reply, or None where there is none."""
    async with await trio.open_unix_socket(path) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(line)
        reply = await read_line(stream)
        return msgspec.json.decode(reply) if reply else None


async def read_line(stream: trio.SocketStream) -> bytes:
    received = b""
    while not received.endswith(b"\n") and (chunk := await stream.receive_some()):
        received += chunk
    return received


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


async def test_a_question_reaches_its_verb_with_its_arguments_and_who_asks(path):
    async with serving(path):
        answer = await ask(path, "who", limit=3)

    assert isinstance(answer, dict)
    assert (os.geteuid(), {"limit": 3}) == (answer["uid"], answer["arguments"])


async def test_a_client_may_ask_again(path):
    async with serving(path), await trio.open_unix_socket(path) as stream:
        for _ in range(3):
            await stream.send_all(b'{"verb": "mine"}\n')
            assert b'{"result":[0,65534,null]}\n' == await read_line(stream)


async def test_questions_sent_together_are_answered_in_turn(path):
    async with serving(path), await trio.open_unix_socket(path) as stream:
        await stream.send_all(b'{"verb": "mine"}\n{"verb": "refuse"}\n')
        received = b""
        while received.count(b"\n") < 2:
            received += await stream.receive_some()

    assert b'{"result":[0,65534,null]}\n{"error":"the kernel said no","exit_code":4}\n' == received


@pytest.mark.parametrize("count", [0, 1, control.PIECE - 1, control.PIECE, control.PIECE + 1, 10_000])
async def test_an_iterator_is_a_list_for_the_client(path, count):
    async with serving(path):
        assert list(range(count)) == await ask(path, "many", count=count)


async def test_a_large_answer_arrives_whole(path):
    async with serving(path):
        assert "x" * 5_000_000 == await ask(path, "large")


async def test_an_error_of_ours_keeps_its_kind(path):
    async with serving(path):
        with pytest.raises(KernelError, match="the kernel said no"):
            await ask(path, "refuse")


async def test_a_fault_in_a_verb_is_logged_and_harms_nobody(path, caplog):
    async with serving(path):
        with pytest.raises(TunsplitError, match="internal error; the daemon's log has the details"):
            await ask(path, "fail")
        await ask(path, "who")

    assert [ZeroDivisionError] == [record.exc_info[0] for record in caplog.records if record.exc_info]


async def test_an_answer_that_cannot_be_finished_is_no_answer(path, caplog):
    async with serving(path):
        with pytest.raises(TunsplitError, match="broke off in the middle of its answer"):
            await ask(path, "begin_and_fail")
        await ask(path, "who")

    assert [logging.ERROR] == [record.levelno for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"\n", "the request is no JSON"),
        (b"{\n", "the request is no JSON"),
        (b"\xff\xfe\x00\n", "the request is no JSON"),
        (b'"' + b"[" * 4000 + b"\n", "the request is no JSON"),
        (b"[" * 4000 + b"\n", "the request is no JSON"),
        (b"[]\n", 'a request is an object with a "verb"'),
        (b"{}\n", 'a request is an object with a "verb"'),
        (b'{"verb": 1}\n', 'a request is an object with a "verb"'),
        (b'{"verb": "explode"}\n', f"unknown verb 'explode', expected {', '.join(sorted(VERBS))}"),
        (b'{"verb": "who", "x": "' + b"a" * 5000 + b'"}\n', "a request has at most 4096 bytes"),
        (b"a" * 100_000, "a request has at most 4096 bytes"),
    ],
)
async def test_nonsense_gets_an_error(path, line, error):
    async with serving(path):
        assert {"error": error, "exit_code": 1} == await say(path, line)
        await ask(path, "who")


async def test_clients_that_leave_early_are_let_go(path):
    async with serving(path):
        for line in (b"", b'{"verb"', b'{"verb": "large"}\n', b'{"verb": "large"}\n' * 10):
            async with await trio.open_unix_socket(path) as stream:
                await stream.send_all(line)
        await ask(path, "who")


async def test_a_silent_client_is_let_go(path, autojump_clock):
    async with serving(path), await trio.open_unix_socket(path) as stream:
        await stream.send_all(b'{"verb": ')
        assert b"" == await stream.receive_some()
        assert control.IDLE_S <= autojump_clock.current_time()


async def test_a_client_that_does_not_read_is_let_go(path, autojump_clock):
    async with serving(path), await trio.open_unix_socket(path) as stream:
        await stream.send_all(b'{"verb": "large"}\n')
        await trio.sleep(control.IDLE_S + 1)
        received = 0
        while chunk := await stream.receive_some():
            received += len(chunk)

    assert 5_000_000 > received


async def test_too_many_clients_are_turned_away(path):
    async with serving(path), trio.open_nursery() as nursery:
        idle = [await trio.open_unix_socket(path) for _ in range(control.MAX_CLIENTS)]
        for stream in idle:  # each is being served
            await stream.send_all(b'{"verb": "mine"}\n')
            await read_line(stream)
        assert {"error": "too many clients", "exit_code": 1} == await say(path, b'{"verb": "who"}\n')
        await idle.pop().aclose()
        await trio.testing.wait_all_tasks_blocked()
        await ask(path, "who")
        for stream in idle:
            nursery.start_soon(stream.aclose)


async def test_a_hundred_clients_at_once_are_all_answered(path):
    answers: list[object] = []
    limit = trio.CapacityLimiter(20)

    async def one() -> None:
        async with limit:
            answers.append(await say(path, b'{"verb": "mine"}\n'))

    async with serving(path), trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(one)

    assert [{"result": [0, NOBODY, None]}] * 100 == answers


async def test_the_socket_is_roots_alone_where_the_group_is_absent(path, file):
    async with serving(path):
        assert (0o600, 0o755) == (mode(file), mode(file.parent))


async def test_the_socket_is_the_groups_where_there_is_one(path, file):
    async with serving(path, GROUP):
        assert (0o660, 0, 1) == (mode(file), file.stat().st_uid, file.stat().st_gid)


async def test_the_socket_is_closed_from_birth(path, file, monkeypatch):
    births = []
    monkeypatch.setattr(os, "chown", lambda *_: births.append(mode(file)))
    before = os.umask(0)
    try:
        async with serving(path, GROUP):
            pass
    finally:
        os.umask(before)

    assert [0o600] == births


@pytest.mark.netns
async def test_strangers_cannot_even_connect(path):
    async with serving(path):
        with pytest.raises(PermissionMissing, match="no access to"):
            await ask_as(NOBODY, [], path, "who")


@pytest.mark.netns
async def test_strangers_are_refused_though_the_file_let_them_in(path, file):
    async with serving(path, GROUP):
        file.chmod(0o666)
        with pytest.raises(PermissionMissing, match="permission denied: the control socket is for root, and for"):
            await ask_as(NOBODY, [2, 3], path, "who")


@pytest.mark.netns
async def test_strangers_are_refused_where_the_group_is_absent(path, file):
    async with serving(path):
        file.chmod(0o666)
        with pytest.raises(PermissionMissing, match="permission denied"):
            await ask_as(NOBODY, [1], path, "who")


@pytest.mark.netns
async def test_members_of_the_group_see_what_is_theirs(path):
    async with serving(path, GROUP):
        assert [NOBODY] == await ask_as(NOBODY, [1], path, "mine")


@pytest.mark.netns
async def test_a_member_of_more_groups_than_can_be_asked_for_is_a_stranger(path, file):
    async with serving(path, GROUP):
        file.chmod(0o666)
        with pytest.raises(PermissionMissing, match="permission denied"):
            await ask_as(NOBODY, [1, *range(1000, 1300)], path, "mine")


@pytest.mark.netns
async def test_members_cannot_lock_root_out(path):
    def connect() -> list[socket.socket]:
        clients = []
        for _ in range(control.MAX_CLIENTS):
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            clients.append(client)
            with contextlib.suppress(BrokenPipeError):  # those too many are sent away before they ask
                client.send(b'{"verb": "mine"}\n')
            client.recv(100)
        return clients

    async with serving(path, GROUP):
        clients = await trio.to_thread.run_sync(partial(as_user, NOBODY, [1], connect))
        assert isinstance(clients, list)
        with pytest.raises(TunsplitError, match="too many clients"):
            await ask_as(NOBODY, [1], path, "mine")
        await ask(path, "who")
        for client in clients:
            client.close()


async def test_the_file_is_gone_afterwards(path, file):
    async with serving(path):
        assert file.exists()

    assert not file.exists()
    with pytest.raises(NotRunning, match="is `tunsplit run` running"):
        call(path, "who")


async def test_somebody_elses_file_is_left_alone_afterwards(path, file):
    async with serving(path):
        file.unlink()
        file.write_text("mine")

    assert "mine" == file.read_text()


async def test_a_file_that_vanished_is_no_trouble_afterwards(path, file):
    async with serving(path):
        file.unlink()


async def test_a_dead_daemons_socket_is_replaced(path, file):
    file.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    with pytest.raises(NotRunning):
        call(path, "who")

    async with serving(path):
        await ask(path, "who")


async def refused(path: str) -> str:
    with pytest.raises(TunsplitError) as caught:
        await control.serve(Control(socket=path, group=ABSENT), VERBS)
    return str(caught.value)


async def test_a_living_daemons_socket_is_not(path):
    async with serving(path):
        assert f"another tunsplit answers at {path}" in await refused(path)
        await ask(path, "who")


async def test_a_living_daemon_with_a_full_backlog_is_alive(path, file):
    file.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(path)
        busy.listen(0)
        waiting.connect(path)
        assert "another tunsplit answers" in await refused(path)


async def test_a_file_that_is_no_socket_is_not_touched(path, file):
    file.parent.mkdir()
    file.write_text("precious")

    assert f"{path} exists and is no socket; set [control] socket to another path" == await refused(path)
    assert "precious" == file.read_text()


async def test_a_directory_that_cannot_be_made_is_named(directory):
    (directory / "file").write_text("")

    assert "cannot be created: " in await refused(str(directory / "file" / "control.sock"))


async def test_a_daemon_that_is_silent_is_not_waited_for_for_ever(path, file, monkeypatch):
    monkeypatch.setattr("tunsplit.client.TIMEOUT_S", 0.01)
    file.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        with pytest.raises(TunsplitError, match="was silent for"):
            call(path, "who")


def answered_with(file: Path, reply: bytes) -> str:
    """What a client says of a daemon that answers with these bytes and closes."""
    file.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(file))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(TunsplitError) as caught:
            call(str(file), "who")
        thread.join()
    assert TunsplitError is caught.type
    return str(caught.value)


@pytest.mark.parametrize("reply", [b"", b"{", b"[]\n", b'{"result', b'{"error": 1}\n', b"\xff\n"])
def test_an_answer_that_is_none_is_an_error(file, reply):
    assert answered_with(file, reply).endswith("broke off in the middle of its answer")


def test_an_unknown_kind_of_error_is_an_error(file):
    assert "strange" == answered_with(file, b'{"error": "strange", "exit_code": 77}\n')


def test_a_path_that_cannot_be_a_socket_is_an_error():
    with pytest.raises(TunsplitError, match="failed: AF_UNIX path too long"):
        call("/tmp/" + "x" * 200, "who")
