"""A control server for tests, and clients of several kinds and users."""

import contextlib
import ctypes
import grp
import platform
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import msgspec
import trio
import trio.testing

from tunsplit.client import call
from tunsplit.config import Control
from tunsplit.errors import KernelError, TunsplitError
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
async def serving(path: str, group: str = ABSENT, verbs: Mapping[str, control.Verb] = VERBS):
    with control.listening(Control(socket=path, group=group)) as clients:
        async with trio.open_nursery() as nursery:
            await nursery.start(control.serve, clients, verbs)
            yield
            nursery.cancel_scope.cancel()


@contextlib.contextmanager
def serving_beside(path: str, group: str = ABSENT, verbs: Mapping[str, control.Verb] = VERBS) -> Iterator[None]:
    """Answer in a thread of its own."""
    ready = threading.Event()
    token: list[trio.lowlevel.TrioToken] = []
    stop = trio.CancelScope()

    async def serve() -> None:
        with stop:
            async with serving(path, group, verbs):
                token.append(trio.lowlevel.current_trio_token())
                ready.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    ready.wait(10)
    try:
        yield
    finally:
        trio.from_thread.run_sync(stop.cancel, trio_token=token[0])
        thread.join()


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
