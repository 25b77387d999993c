"""Copies of programs: split tunnelling goes by executable, so a test wants one that is nobody else's."""

import shutil
import sys
from pathlib import Path

from tunsplit.errors import KernelError
from tunsplit.lab import programs

PYTHON = "python"


def copy_program(program: str, target: Path) -> Path:
    """Copy an executable and give where it now is; `python` is the interpreter that runs us.

    Raises:
        KernelError: it is missing; or it is a script, whose executable is its interpreter.
    """
    source = _find_python() if program == PYTHON else Path(programs.require(program)).resolve()
    with source.open("rb") as file:
        if file.read(2) == b"#!":
            raise KernelError(f"{source} is a script: copied or not, its executable is its interpreter")
    shutil.copy(source, target)
    if program == PYTHON:
        # A pyvenv.cfg beside an interpreter says where its library is (Modules/getpath.py, "home").
        Path(target.parent, "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\n")
    return target


def _find_python() -> Path:
    # In a virtual environment this is a link to the interpreter it was made with, or a copy of it.
    return Path(sys.executable).resolve()
