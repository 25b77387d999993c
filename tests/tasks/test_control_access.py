"""The control socket's file, and who may ask what on it."""

import contextlib
import os
import socket
from functools import partial

import pytest
import trio

from tests.control_server import ABSENT, GROUP, NOBODY, as_user, ask, ask_as, mode, serving
from tunsplit.client import call
from tunsplit.config import Control
from tunsplit.errors import NotRunning, PermissionMissing, TunsplitError
from tunsplit.tasks import control


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
    with pytest.raises(TunsplitError) as caught, control.listening(Control(socket=path, group=ABSENT)):
        pass
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
