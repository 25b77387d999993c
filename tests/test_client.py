"""What a command makes of a daemon that answers badly or not at all."""

import socket
import threading
from pathlib import Path

import pytest

from tunsplit.client import call
from tunsplit.errors import TunsplitError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def answered_with(file: Path, reply: bytes) -> str:
    """What a client says of a daemon that answers with these bytes and closes."""
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


def test_a_daemon_that_is_silent_is_not_waited_for_for_ever(file, monkeypatch):
    monkeypatch.setattr("tunsplit.client.TIMEOUT_S", 0.01)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(file))
        silent.listen()
        with pytest.raises(TunsplitError, match="was silent for"):
            call(str(file), "who")
