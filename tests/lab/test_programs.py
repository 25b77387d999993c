"""Programs: missing, failing, copied, watched."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

import tunsplit
from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.lab import copies, programs


@pytest.mark.parametrize(
    ("program", "advice"), [("dnsmasq", "apt install dnsmasq-base"), ("nonesuch", "neither in PATH")]
)
def test_a_missing_program_is_named_with_its_package(monkeypatch, program, advice):
    monkeypatch.setattr(programs, "SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(KernelError, match=f"{program} is missing: .*{advice}"):
        programs.require(program)


def test_what_lies_in_sbin_is_found_from_a_short_path(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")

    assert programs.require("ip").endswith("/ip")


def test_without_root_the_lab_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(PermissionMissing, match="needs root"):
        programs.require_root()


def test_a_failed_command_quotes_what_it_wrote():
    with pytest.raises(KernelError, match="exit code 3: no way"):
        programs.execute(["sh", "-c", "echo no way >&2; exit 3"])


async def test_a_run_program_gives_its_output_and_code():
    done = await programs.run(["sh", "-c", "cat; echo err >&2; exit 4"], text="in", check=False)

    assert (4, "in", "err\n") == (done.returncode, done.stdout, done.stderr)


async def test_a_checked_program_that_fails_quotes_what_it_wrote():
    with pytest.raises(subprocess.CalledProcessError) as failure:
        await programs.run(["sh", "-c", "echo out; echo err >&2; exit 4"])

    assert ["stdout: out", "stderr: err"] == failure.value.__notes__


async def test_a_started_program_is_read_and_ended_with_the_block():
    async with programs.start(["sh", "-c", "echo one; echo two >&2; exec sleep 1000"]) as program:
        await program.wait_written("one\n")
        await program.wait_written("two\n")
        assert ("one\n", "two\n") == (program.output, program.log)
    assert -15 == program.process.returncode


async def test_a_program_that_ends_too_early_says_why():
    async with programs.start(["sh", "-c", "echo cannot >&2; exit 2"]) as program:
        with pytest.raises(KernelError, match=r"(?s)exit code 2 before it wrote 'ready'.*cannot"):
            await program.wait_written("ready")


async def test_what_a_program_writes_last_is_not_lost():
    async with programs.start(
        ["sh", "-c", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done"]
    ) as it:
        await it.wait_written("up\n")
    assert "up\nbye\n" == it.output


async def test_one_that_does_not_heed_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(programs, "PATIENCE_S", 0.1)
    async with programs.start(["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.01; done"]) as program:
        await program.wait_written("up\n")
    assert -9 == program.process.returncode


async def test_an_endless_writer_does_not_eat_the_memory(monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 1000)
    async with programs.start(["sh", "-c", "seq 100000; echo end; exec sleep 1000"]) as program:
        await program.wait_written("end\n")
        assert 1000 == len(program.output)


async def test_an_exception_beside_a_program_comes_out_as_it_is():
    with pytest.raises(ZeroDivisionError):
        async with programs.start(["sleep", "1000"]):
            _ = 1 / 0


async def test_a_failing_task_beside_the_block_ends_it():
    async def fail() -> None:
        raise ValueError("background")

    with pytest.RaisesGroup(ValueError):
        async with programs.background() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()


# Copies


async def test_a_copied_interpreter_finds_its_library_and_is_its_own_executable(tmp_path):
    copy = copies.copy_program("python", tmp_path / "excluded-client")
    script = "import json, os, socket, ssl, sys; print(os.readlink('/proc/self/exe'), sys.version_info[:2])"

    done = await programs.run([str(copy), "-I", "-S", "-c", script], env={})

    assert f"{copy} {sys.version_info[:2]}\n" == done.stdout


@pytest.mark.parametrize("interpreter", ["/usr/bin/python3", sys.executable])
async def test_so_does_a_copy_made_by_another_interpreter(tmp_path, interpreter):
    """The system's has its library elsewhere than one that was built from source."""
    make = (
        "import pathlib, sys; from tunsplit.lab import copies; copies.copy_program('python', pathlib.Path(sys.argv[1]))"
    )
    modules = [str(Path(inspect.getfile(package)).parent.parent) for package in (tunsplit, trio)]
    copy = tmp_path / "copy"
    await programs.run([interpreter, "-c", make, str(copy)], env={"PYTHONPATH": os.pathsep.join(modules)})

    assert "{}\n" == (await programs.run([str(copy), "-I", "-S", "-c", "import json; print(json.dumps({}))"])).stdout


async def test_a_copied_program_runs(tmp_path):
    copy = copies.copy_program("curl", tmp_path / "excluded-curl")

    assert (await programs.run([str(copy), "--version"])).stdout.startswith("curl ")


def test_a_script_is_not_copied(tmp_path, monkeypatch):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(KernelError, match="is a script"):
        copies.copy_program("script", tmp_path / "copy")
