"""A tunsplit that runs in the lab's host, used as a user does: by its command line."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

import tunsplit
from tunsplit.errors import KernelError
from tunsplit.lab.netns import Namespace
from tunsplit.lab.programs import Program

COMMAND = (sys.executable, "-m", "tunsplit")
START_S = 30  # a very busy machine's; the daemon's own aim is one second
STOP_S = 10


class Daemon:
    """A running tunsplit."""

    def __init__(self, namespace: Namespace, program: Program, environment: Mapping[str, str]) -> None:
        self._namespace = namespace
        self._program = program
        self._environment = environment
        self.killed = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._program.pid

    @property
    def log(self) -> str:
        """What it has written on stderr."""
        return self._program.log

    @property
    def output(self) -> str:
        """What it has written on stdout: the line `ready`."""
        return self._program.output

    async def status(self) -> dict[str, Any]:
        """What `tunsplit status --json` says."""
        answer: dict[str, Any] = json.loads((await self.command("status", "--json")).stdout)
        return answer

    async def flows(self) -> list[dict[str, Any]]:
        """What `tunsplit flows --json` says."""
        answer: list[dict[str, Any]] = json.loads((await self.command("flows", "--json")).stdout)
        return answer

    async def command(
        self, *words: str, check: bool = True, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run any verb of tunsplit that talks to this daemon; `env` is added to its environment."""
        environment = {**self._environment, **(env or {})}
        return await self._namespace.run([*COMMAND, *words], env=environment, check=check)

    async def wait(self) -> int:
        """Wait for its end; its exit code."""
        return await self._program.process.wait()

    async def terminate(self) -> int:
        """End it by SIGTERM; its exit code.

        Raises:
            KernelError: it does not end.
        """
        if self._program.process.returncode is None:
            self._program.process.terminate()
        with trio.move_on_after(STOP_S):
            return await self.wait()
        raise KernelError(f"tunsplit does not end on SIGTERM\n{self.log}")

    async def kill(self) -> None:
        """End it by SIGKILL; what it leaves behind stays until the block's end, which runs `tunsplit undo`."""
        self.killed = True
        self._program.process.kill()
        await self.wait()


def make_environment(config_file: Path, socket: Path) -> dict[str, str]:
    """The environment in which every verb finds this configuration and this socket."""
    # Ours need not be installed: the same sources are to run that run now.
    sources = str(Path(tunsplit.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (sources, os.environ.get("PYTHONPATH"))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "TUNSPLIT_CONFIG": str(config_file),
        "TUNSPLIT_SOCKET": str(socket),
    }


@asynccontextmanager
async def start(namespace: Namespace, config_file: Path, socket: Path) -> AsyncGenerator[Daemon]:
    """Run tunsplit in a namespace beside the block; traffic is split once the block is entered.

    Raises:
        KernelError: it does not become ready; or it ends with another exit code than 0 without having been
            killed. Quotes its log.
    """
    environment = make_environment(config_file, socket)
    async with namespace.start([*COMMAND, "run", "-c", config_file], env=environment) as program:
        daemon = Daemon(namespace, program, environment)
        with trio.move_on_after(START_S) as patience:
            await program.wait_written("ready\n")
        if patience.cancelled_caught:
            raise KernelError(f"tunsplit was not ready after {START_S} s\n{daemon.log}")
        try:
            yield daemon
        except BaseException as error:
            error.add_note(f"tunsplit's log:\n{daemon.log}")
            raise
        finally:
            with trio.CancelScope(shield=True):
                code = 0 if daemon.killed else await daemon.terminate()
                if daemon.killed:
                    await daemon.command("undo")
        if code:
            raise KernelError(f"tunsplit ended with exit code {code}\n{daemon.log}")
