"""The control socket from the command's end: one question, one answer, blocking.

With Python's own json: `tunsplit exec` starts in front of every command, and importing msgspec takes 40 ms.
"""

import json
import socket
from contextlib import suppress

from tunsplit.errors import ConfigError, KernelError, NotRunning, PermissionMissing, TunsplitError

TIMEOUT_S = 10.0  # of silence
KINDS: dict[int, type[TunsplitError]] = {
    kind.exit_code: kind for kind in (ConfigError, PermissionMissing, KernelError, NotRunning)
}


def call(socket_path: str, verb: str, **arguments: object) -> object:
    """Ask the daemon behind a control socket and return what it answers, as plain JSON values.

    Raises:
        NotRunning: nobody listens there.
        PermissionMissing: the caller may not use the socket, or not this verb.
        TunsplitError: the daemon answered with an error, or not at all.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(TIMEOUT_S)
        try:
            connection.connect(socket_path)
            # A daemon that refuses us says so and closes; what it said is still there to be read.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
            line = _line(connection)
        except PermissionError:
            raise PermissionMissing(
                f"no access to {socket_path}: run as root, or as a member of the group that [control] group names"
            ) from None
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            raise NotRunning(
                f"no tunsplit answers at {socket_path}: is `tunsplit run` running, with this [control] socket?"
            ) from None
        except TimeoutError:
            raise TunsplitError(f"the daemon at {socket_path} was silent for {TIMEOUT_S:.0f} s") from None
        except OSError as error:
            raise TunsplitError(f"the control socket {socket_path} failed: {error.strerror or error}") from error
    return _result(line, socket_path)


def _line(connection: socket.socket) -> bytes:
    chunks: list[bytes] = []
    while not chunks or not chunks[-1].endswith(b"\n"):
        chunk = connection.recv(1 << 16)
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks)


def _result(line: bytes, socket_path: str) -> object:
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    match reply:
        case {"result": result}:
            return result
        case {"error": str(message), "exit_code": int(exit_code)}:
            raise KINDS.get(exit_code, TunsplitError)(message)
        case _:
            raise TunsplitError(f"the daemon at {socket_path} broke off in the middle of its answer")
