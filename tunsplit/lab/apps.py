"""Apps that do what they are told: a copied interpreter that runs Python, line by line (`tunsplit.lab.agent`)."""

import ast
import itertools
import json
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tunsplit.lab import addresses, agent
from tunsplit.lab.netns import Namespace
from tunsplit.lab.programs import Program

AGENT = Path(agent.__file__)
PATIENCE_S = 20  # nothing that an app is told takes so long
NAMES = {
    "SERVER4": str(addresses.SERVER[4].ip),
    "SERVER6": str(addresses.SERVER[6].ip),
    "ROUTER4": str(addresses.ROUTER_LAN[4].ip),
    "ROUTER6": str(addresses.ROUTER_LAN[6].ip),
}


class App:
    """A program that runs the Python it is given; `start_app` starts one."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._numbers = itertools.count()
        self.names: dict[str, Any] = dict(NAMES)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.program.pid

    async def __call__(self, code: str, /, **names: Any) -> Any:
        """Run code; what it comes to, or None if that is no plain value.

        Raises:
            OSError: with errno, as the app got it.
            AssertionError: the app met with anything else.
        """
        number = next(self._numbers)
        told = {"code": code, "names": {**self.names, **names}, "number": number}
        self.names = {}
        stdin = self.program.process.stdin
        assert stdin is not None
        await stdin.send_all(f"{json.dumps(told)}\n".encode())
        with trio.fail_after(PATIENCE_S):
            await self.program.wait_written(f"\n#{number}\n")
        answer = json.loads(self.program.output.partition(f"\n#{number}\n")[0].rpartition("\n")[2])
        if "error" in answer:
            raise OSError(*answer["error"])
        assert "failure" not in answer, answer["failure"]
        return ast.literal_eval(answer["value"])


@asynccontextmanager
async def start_app(namespace: Namespace, program: Path) -> AsyncGenerator[App]:
    """Run an app in a namespace beside the block."""
    async with namespace.start([program, "-I", "-S", "-u", AGENT], stdin=subprocess.PIPE) as running:
        yield App(running)
