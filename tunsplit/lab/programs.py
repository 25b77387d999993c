"""Programs that the lab runs: found or named as missing, started, watched, ended.

A program's output is read for as long as it runs, so that it never blocks on a full pipe and an error
can quote it.
"""

import os
import shutil
import subprocess
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import trio

from tunsplit.errors import KernelError, PermissionMissing

PACKAGES = {
    "conntrack": "conntrack",
    "curl": "curl",
    "dig": "bind9-dnsutils",
    "dnsmasq": "dnsmasq-base",
    "ip": "iproute2",
    "iperf3": "iperf3",
    "nft": "nftables",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "openvpn": "openvpn",
    "ping": "iputils-ping",
    "tcpdump": "tcpdump",
    "traceroute": "traceroute",
    "unshare": "util-linux",
    "wg": "wireguard-tools",
    "wireguard-go": "wireguard-go",
}
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"  # not in everybody's PATH, and half of the above live there
KEPT = 1 << 20  # octets of a program's output that are remembered, the latest ones
PATIENCE_S = 5  # from SIGTERM to SIGKILL


def find_program(program: str, path: str | None = None) -> str | None:
    """Where a program lies, or None; `path` is looked through instead of the environment's PATH."""
    return shutil.which(program, path=os.pathsep.join((path or os.environ.get("PATH", os.defpath), SYSTEM_PATH)))


def require(program: str, path: str | None = None) -> str:
    """Where a program lies; `path` is looked through instead of the environment's PATH.

    Raises:
        KernelError: it is not there; names the Debian package that has it.
    """
    if (found := find_program(program, path)) is None:
        package = PACKAGES.get(program)
        advice = f"apt install {package}" if package else "it is neither in PATH nor in the system's directories"
        raise KernelError(f"{program} is missing: {advice}")
    return found


def require_root() -> None:
    """Make sure that we may build networks.

    Raises:
        PermissionMissing: we may not.
    """
    if os.geteuid():
        raise PermissionMissing("the lab builds network namespaces, which needs root: run it with sudo")


def execute(argv: Sequence[str], *, text: str = "") -> str:
    """Run a program that ends at once, and give its stdout.

    Raises:
        KernelError: it is missing, or failed; quotes what it wrote on stderr.
    """
    done = subprocess.run([require(argv[0]), *argv[1:]], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"{' '.join(argv)}: exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@asynccontextmanager
async def background() -> AsyncGenerator[trio.Nursery]:
    """A nursery whose tasks end with the block, and whose body's exception comes out as it went in.

    A plain nursery wraps it in a group, which no `pytest.raises` and no exit code of a lab's user expects.
    """
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as exception:
            error = _get_error(exception)
            if error is None:
                raise
        finally:
            nursery.cancel_scope.cancel()
    if error is not None:
        raise error


def _get_error(exception: BaseException) -> BaseException | None:
    """What is left of an exception without trio's own cancellations, which are the nursery's to catch."""
    if isinstance(exception, BaseExceptionGroup):
        return exception.split(trio.Cancelled)[1]
    return None if isinstance(exception, trio.Cancelled) else exception


class Program:
    """A running program, with what it has written so far."""

    def __init__(self, argv: Sequence[str], process: trio.Process) -> None:
        self.argv = argv
        self.process = process
        self._written = {1: bytearray(), 2: bytearray()}
        self._news = trio.Event()
        self._open = 0

    @property
    def pid(self) -> int:
        """Process id of the program itself, no wrapper's."""
        return self.process.pid

    @property
    def output(self) -> str:
        """What it wrote on stdout, at most the last mebibyte."""
        return self._written[1].decode(errors="replace")

    @property
    def log(self) -> str:
        """What it wrote on stderr, at most the last mebibyte."""
        return self._written[2].decode(errors="replace")

    async def wait_written(self, text: str) -> None:
        """Wait until the program has written this, on stdout or stderr.

        Raises:
            KernelError: it closed both without having done so.
        """
        while text not in self.output and text not in self.log:
            if not self._open:
                code = await self.process.wait()
                command = " ".join(self.argv)
                raise KernelError(f"{command}: exit code {code} before it wrote {text!r}\n{self.output}{self.log}")
            await self._news.wait()

    async def stop(self) -> int:
        """End it with SIGTERM, or SIGKILL if that is not heeded; give its exit code."""
        if self.process.returncode is None:
            self.process.terminate()
        with trio.move_on_after(PATIENCE_S):
            return await self.process.wait()
        self.process.kill()
        return await self.process.wait()

    def collect(self, nursery: trio.Nursery) -> None:
        """Read what it writes, in this nursery."""
        for number, stream in ((1, self.process.stdout), (2, self.process.stderr)):
            if stream is not None:
                self._open += 1
                nursery.start_soon(self._collect, stream, self._written[number])

    async def _collect(self, stream: trio.abc.ReceiveStream, written: bytearray) -> None:
        try:
            async with stream:
                async for chunk in stream:
                    written += chunk
                    del written[:-KEPT]
                    self._tell()
        finally:
            self._open -= 1
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait_closed(self) -> None:
        """Wait until it, and whoever it left them to, has closed stdout and stderr."""
        while self._open:
            await self._news.wait()


@asynccontextmanager
async def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
) -> AsyncGenerator[Program]:
    """Run a program beside the block, and end it with the block."""
    async with background() as nursery:
        process = await trio.lowlevel.open_process(
            argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        program = Program(argv, process)
        program.collect(nursery)
        try:
            yield program
        finally:
            with trio.CancelScope(shield=True):
                if process.stdin is not None:
                    await process.stdin.aclose()
                await program.stop()
                # A child that it leaves behind may hold the pipes open for ever.
                with trio.move_on_after(1):
                    await program.wait_closed()


async def run(
    argv: Sequence[str],
    *,
    text: str = "",
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Args:
        text: its stdin.
        env: its whole environment, instead of ours.
        check: an exit code other than 0 is an error.

    Raises:
        subprocess.CalledProcessError: with stdout and stderr as notes.
    """
    done = await trio.run_process(
        argv, stdin=text.encode(), capture_stdout=True, capture_stderr=True, check=False, env=env
    )
    output, log = (part.decode(errors="replace") for part in (done.stdout, done.stderr))
    if check and done.returncode:
        error = subprocess.CalledProcessError(done.returncode, argv, output, log)
        _quote(error, (("stdout", output), ("stderr", log)))
        raise error
    return subprocess.CompletedProcess(argv, done.returncode, output, log)


def _quote(error: BaseException, written: Iterable[tuple[str, str]]) -> None:
    for name, text in written:
        if text:
            error.add_note(f"{name}: {text.rstrip()}")
