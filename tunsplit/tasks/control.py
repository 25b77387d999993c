"""The control socket: newline-delimited JSON over a unix stream socket, for `tunsplit status` and its like.

Theory of operation. A client writes `{"verb": "flows", …arguments}` and a line break, and reads `{"result": …}` or
`{"error": "…", "exit_code": n}` and a line break; then it may ask again. Who asks is what the kernel says, as of
connect(2) (kernel/peer.py): so nothing is gained by handing the connection to a program with more rights, as its
standard output, say. A verb that acts on the asker has his process proved first. Nobody can make the daemon hold more
than MAX_CLIENTS requests of MAX_REQUEST bytes, nor wait longer than IDLE_S for one client; a result given as an
iterator is encoded piece by piece, so that a hundred thousand flows neither stall the packets nor lie in memory as one
text.

Some facts about unix sockets:

- bind(2) gives the file the mode of the socket's own inode less the umask (net/unix/af_unix.c, unix_bind_bsd), so an
  fchmod(2) before it closes the file from birth without touching the umask of all threads.
- A socket file outlives its listener: connect(2) tells, ECONNREFUSED is a dead one's.
"""

import errno
import grp
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import trio

from tunsplit.config import Control
from tunsplit.errors import KernelError, PermissionMissing, TunsplitError
from tunsplit.kernel.peer import Subject, peer_of, prove

MAX_CLIENTS = 32
MAX_GUESTS = 24  # of those, clients that are not root: a group's members cannot lock root out
MAX_REQUEST = 16384  # bytes; a path of PATH_MAX in JSON is one of 4096 and its escapes
IDLE_S = 30.0  # for a request to come in, for a piece of an answer to be taken
PIECE = 256  # items of an iterator encoded before packets get their turn again
BACKLOG = 32

DENIED = "permission denied: the control socket is for root, and for the group that [control] group names"

logger = logging.getLogger(__name__)


class Credentials(msgspec.Struct, frozen=True):
    """Who is at the other end, as of its connect(2)."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()

    @property
    def is_root(self) -> bool:
        """Say whether this client may ask everything."""
        return self.uid == 0

    def may_see(self, uid: int | None) -> bool:
        """Say whether this client may see what belongs to a user; None is nobody knows whom."""
        return self.is_root or uid == self.uid


def prove_nobody() -> Subject:
    """Refuse to say which process asks."""
    raise PermissionMissing("nobody asks")


class Request(msgspec.Struct, frozen=True):
    """One question: its verb, its arguments (plain JSON values) and who asks.

    `prove` returns the process that asks, alive and beyond doubt, or raises PermissionMissing.
    """

    verb: str
    arguments: dict[str, Any]
    credentials: Credentials
    prove: Callable[[], Subject] = prove_nobody


Verb = Callable[[Request], object]


class ControlSocket(NamedTuple):
    """A socket that clients connect to, and the number of the group that may use it besides root."""

    listener: trio.SocketListener
    gid: int | None


@contextmanager
def listening(settings: Control) -> Iterator[ControlSocket]:
    """The control socket: clients can connect, and wait until they are served; its file goes with it.

    Raises:
        TunsplitError: another daemon answers on this path.
        KernelError: the socket cannot be created.
    """
    gid = group_id(settings.group)
    listener, identity = open_listener(settings.socket, gid)
    try:
        yield ControlSocket(listener, gid)
    finally:
        listener.socket.close()
        remove(settings.socket, identity)


async def serve(
    clients: ControlSocket,
    verbs: Mapping[str, Verb],
    *,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer clients on the control socket until cancelled.

    Args:
        clients: the socket.
        verbs: what can be asked. A callable returns what msgspec can encode, or an iterator of that (a list for the
            client, encoded piece by piece); it raises TunsplitError for the client to read.
        task_status: told once clients are answered.
    """
    if clients.gid is None:
        logger.info("control group absent: the control socket is root's alone")
    server = Server(verbs, clients.gid)
    await trio.serve_listeners(server.converse, [clients.listener], task_status=task_status)


class Server:
    """Holds the count of clients, and what they may ask."""

    def __init__(self, verbs: Mapping[str, Verb], gid: int | None) -> None:
        self._verbs = verbs
        self._gid = gid
        self._clients = 0

    async def converse(self, stream: trio.SocketStream) -> None:
        """Answer one client until it leaves, errs in form, or is silent for too long. Never fails."""
        try:
            await self._converse(stream)
        except Exception:  # the kernel's no to who asks, or a fault of ours: as in `_reply`
            logger.exception("a client cannot be answered")

    async def _converse(self, stream: trio.SocketStream) -> None:
        async with stream:
            peer = peer_of(stream.socket)
            credentials = Credentials(peer.pid, peer.uid, peer.gid, peer.groups)
            self._clients += 1
            try:
                if not (credentials.is_root or self._gid in {credentials.gid, *credentials.groups}):
                    await send(stream, error_reply(PermissionMissing(DENIED)))
                elif self._clients > (MAX_CLIENTS if credentials.is_root else MAX_GUESTS):
                    await send(stream, error_reply(TunsplitError("too many clients")))
                else:
                    await self._answer_all(stream, credentials, partial(prove, stream.socket, peer))
            except trio.BrokenResourceError:
                logger.debug("client left in the middle of an answer", extra={"pid": credentials.pid})
            except trio.TooSlowError:
                logger.debug("client was too slow", extra={"pid": credentials.pid})
            finally:
                self._clients -= 1

    async def _answer_all(
        self, stream: trio.SocketStream, credentials: Credentials, prove_peer: Callable[[], Subject]
    ) -> None:
        received = bytearray()
        while True:
            with trio.fail_after(IDLE_S):
                while b"\n" not in received and len(received) <= MAX_REQUEST:
                    chunk = await stream.receive_some(MAX_REQUEST)
                    if not chunk:
                        return
                    received += chunk
            line, _, rest = received.partition(b"\n")
            if len(line) > MAX_REQUEST:
                await send(stream, error_reply(TunsplitError(f"a request has at most {MAX_REQUEST} bytes")))
                return
            received = rest
            for piece in self._reply(bytes(line), credentials, prove_peer):
                await send(stream, piece)

    def _reply(self, line: bytes, credentials: Credentials, prove_peer: Callable[[], Subject]) -> Iterator[bytes]:
        begun = False
        try:
            request = parse_untrusted(line, credentials, prove_peer)
            verb = self._verbs.get(request.verb)
            if verb is None:
                raise TunsplitError(f"unknown verb {request.verb!r:.60}, expected {', '.join(sorted(self._verbs))}")
            for piece in encoded(verb(request)):
                yield piece
                begun = True
        except TunsplitError as error:
            yield b"\n" if begun else error_reply(error)
        except Exception:  # a fault of ours in a report must not end the daemon, and with it everybody's network
            logger.exception("control request failed", extra={"pid": credentials.pid})
            # What has begun can only be broken off: an unfinished line is no JSON, and the client says so.
            yield b"\n" if begun else error_reply(TunsplitError("internal error; the daemon's log has the details"))


def parse_untrusted(line: bytes, credentials: Credentials, prove_peer: Callable[[], Subject] = prove_nobody) -> Request:
    """Return the request that a client's line holds; TunsplitError is the only error."""
    try:
        message = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        raise TunsplitError("the request is no JSON") from None
    if not isinstance(message, dict) or not isinstance(verb := message.pop("verb", None), str):
        raise TunsplitError('a request is an object with a "verb"')
    return Request(verb, message, credentials, prove_peer)


def encoded(result: object) -> Iterator[bytes]:
    """Yield the reply that carries a result, in one piece, or an iterator's in many."""
    if not isinstance(result, Iterator):
        yield encode({"result": result}) + b"\n"
        return
    separator = b'{"result":['
    while items := list(islice(result, PIECE)):
        yield separator + encode(items)[1:-1]
        separator = b","
    yield (b"" if separator == b"," else separator) + b"]}\n"


def encode(value: object) -> bytes:
    """Return a value as JSON, also one that names files whose names are no UTF-8, as any user can have them."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(spelled(value))


def spelled(value: object) -> object:
    """Return a value whose texts are UTF-8: other bytes of a file's name are spelled by their hexadecimal digits."""
    match value:
        case str():
            return value.encode(errors="surrogateescape").decode(errors="backslashreplace")
        case dict():
            return {spelled(key): spelled(item) for key, item in value.items()}
        case list() | tuple():
            return [spelled(item) for item in value]
        case _:
            return value


def error_reply(error: TunsplitError) -> bytes:
    """Return the reply that carries an error, and what the client's command is to end with."""
    return encode({"error": str(error), "exit_code": error.exit_code}) + b"\n"


async def send(stream: trio.SocketStream, piece: bytes) -> None:
    """Send a piece of an answer; TooSlowError if nobody takes it."""
    with trio.fail_after(IDLE_S):
        await stream.send_all(piece)


def group_id(name: str) -> int | None:
    """Return a group's number, or None where there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def open_listener(path: str, gid: int | None) -> tuple[trio.SocketListener, tuple[int, int]]:
    """Create the socket, in place of a dead daemon's; return it and its file's (device, inode)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        remove_stale(path)
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        if gid is not None:
            os.chown(path, -1, gid)
            Path(path).chmod(0o660)
        listener.listen(BACKLOG)
        file = Path(path).stat()
        return trio.SocketListener(trio.socket.from_stdlib_socket(listener)), (file.st_dev, file.st_ino)
    except OSError as error:
        listener.close()
        raise KernelError(f"the control socket {path} cannot be created: {error.strerror or error}") from error
    except TunsplitError:
        listener.close()
        raise


def remove_stale(path: str) -> None:
    """Remove a dead daemon's socket; refuse to touch anything else."""
    try:
        mode = Path(path).lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise TunsplitError(f"{path} exists and is no socket; set [control] socket to another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)  # a live one with a full backlog answers EAGAIN
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise TunsplitError(
                f"another tunsplit answers at {path}, perhaps in another network namespace; set [control] socket to "
                "another path"
            )
    Path(path).unlink()


def remove(path: str, identity: tuple[int, int]) -> None:
    """Remove our socket's file, unless somebody has put another one in its place."""
    try:
        file = Path(path).lstat()
        if (file.st_dev, file.st_ino) == identity:
            Path(path).unlink()
    except FileNotFoundError:
        return
