"""The control socket, over a real one: what may be asked, and how little harm a bad client does."""

import logging
import os

import pytest
import trio
import trio.testing

from tests.control_server import NOBODY, VERBS, ask, read_line, say, serving
from tunsplit.errors import KernelError, PermissionMissing, TunsplitError
from tunsplit.tasks import control


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
        (b'{"verb": "who", "x": "' + b"a" * 20_000 + b'"}\n', "a request has at most 16384 bytes"),
        (b"a" * 100_000, "a request has at most 16384 bytes"),
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


async def test_names_of_files_that_are_no_utf8_are_spelled_out(path):
    names = [{"app": {"exe": "/tmp/\udcff", "user": 1}, "\udc80": ("ä", None)}]
    async with serving(path, verbs={"one": lambda _: names, "many": lambda _: iter(names)}):
        spelled = [{"app": {"exe": "/tmp/\\xff", "user": 1}, "\\x80": ["ä", None]}]
        assert spelled == await ask(path, "one")
        assert spelled == await ask(path, "many")


async def test_the_process_that_asks_is_proved(path):
    async with serving(path, verbs={"prove": lambda request: request.prove().pid}):
        assert os.getpid() == await ask(path, "prove")


def test_where_nobody_is_connected_nobody_is_proved():
    request = control.parse_untrusted(b'{"verb": "exec"}', control.Credentials(1, 0, 0))
    with pytest.raises(PermissionMissing, match="nobody asks"):
        request.prove()
