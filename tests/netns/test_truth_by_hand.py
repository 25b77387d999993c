"""What is said about processes at run time (L1, L5, L18): pid, exec, off and on; as root and as an ordinary user."""

import os
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.netns import hammer
from tests.netns.family import agent, bear
from tests.netns.sides import SEEN_AS, is_on, listed
from tests.netns.stage import HOST, RELAY, SERVER, App, open_stage, until
from tunsplit.kernel.procpid import parse_stat
from tunsplit.lab.daemon import COMMAND, make_environment

pytestmark = pytest.mark.netns

NOBODY = 65534
# As tests may be in a directory that is closed to others, what is needed is loaded before becoming another user.
AS_NOBODY = f"""
import os, sys, socket, tomllib
import tunsplit.cli, tunsplit.client, tunsplit.config.saving
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
tunsplit.cli.main(prog_name="tunsplit")
"""


def environment(stage):
    """In which the daemon is found without its configuration, which not everybody may read.

    Nor may everybody write beside the tests, so coverage is not measured.
    """
    found = make_environment(stage.lab.directory / "tunsplit-1.toml", stage.lab.directory / "tunsplit.sock")
    del found["TUNSPLIT_CONFIG"]
    return {name: value for name, value in found.items() if not name.startswith("COVERAGE_")}


@asynccontextmanager
async def executed(stage, *words, program):
    """An app that `tunsplit exec` becomes."""
    command = [*COMMAND, "exec", *words, "--", *agent(program)]
    async with stage.lab.host.start(command, env=environment(stage), stdin=subprocess.PIPE) as running:
        yield App(running)


def eldest(pid):
    """The first ancestor that there is."""
    while above := parse_stat(Path(f"/proc/{pid}/stat").read_bytes()).parent:
        pid = above
    return pid


async def test_a_process_is_excluded_by_hand_and_given_back(stage, included):
    """L2, L3, L5: with a child of another program, and connections that end with each change."""
    child = await bear(included, agent(stage.lab.copy_program("python", "child")))
    other = stage.lab.copy_program("python", "other")
    async with stage.app(other) as bystander:
        for verb, old, new in (("add", "tunnel", "uplink"), ("remove", "uplink", "tunnel")):
            assert await is_on(stage, included, old)
            for app in (included, child):
                await app("own = [tcp(SERVER4), udp(SERVER6)]; own[0].send(b'?'); own[1].send(b'?')")
                await app("[one.recv(100) for one in own]")
            assert "" == (await stage.daemon.command("pid", verb, str(included.pid))).stderr
            for app in (included, child):
                for number in (0, 1):
                    with pytest.raises(OSError, match=r"abort|reset|Broken|Destination address"):
                        await app(f"own[{number}].send(b'?'); own[{number}].recv(100); own[{number}].send(b'?')")
                assert await is_on(stage, app, new)
            assert await is_on(stage, bystander, "tunnel")
            if verb == "add":
                (line,), (childs,) = await listed(stage, included.pid), await listed(stage, child.pid)
                assert line.endswith("by hand")
                assert childs.endswith(f"inherited from {included.pid} ({stage.included})")
        assert [] == await listed(stage, included.pid)

        # Whom everybody descends from: an init; in a container its first process.
        first = eldest(included.pid)
        added = await stage.daemon.command("pid", "add", str(first))
        assert re.match(rf"tunsplit: warning: \d+ of \d+ processes descend from process {first},", added.stderr)
        assert await is_on(stage, bystander, "uplink")


async def test_what_was_said_by_hand_is_one_of_two_reasons(stage, included):
    """L6: the process stays excluded until the last one is gone."""
    await stage.daemon.command("app", "add", str(stage.included))
    await stage.daemon.command("pid", "add", str(included.pid))
    (line,) = await listed(stage, included.pid)
    assert line.endswith(f"by hand; rule 2: {stage.included}")
    await stage.daemon.command("app", "remove", str(stage.included))
    assert await is_on(stage, included, "uplink")
    await stage.daemon.command("pid", "clear")
    assert await is_on(stage, included, "tunnel")


@pytest.mark.parametrize("mode", ["exclude", "include"])
async def test_exec_excludes_or_includes_in_either_mode(lab, mode):
    """Issue, item 5: the process itself, its child, and whatever it becomes; its environment is its own."""
    async with open_stage(lab, split={"mode": mode}) as stage:
        third = lab.copy_program("python", "third")
        for words, program, side in (
            ((), stage.included, "uplink"), (("--include",), stage.excluded, "tunnel"), ((), stage.excluded, "uplink"),
            (("--include",), stage.included, "tunnel"),
        ):  # fmt: skip
            async with executed(stage, *words, program=program) as app:
                assert await is_on(stage, app, side)
                child = await bear(app, agent(third))
                assert await is_on(stage, child, side)
                (line,) = await listed(stage, app.pid)
                assert "by hand" in line
                assert "PYTHONPATH" in await app("dict(os.environ)")
                await child.end()
        # The control: the same programs, started by nobody's leave.
        for program, side in ((stage.included, "tunnel"), (stage.excluded, "uplink")):
            async with stage.app(program) as app:
                expected = side if mode == "exclude" else {"tunnel": "uplink", "uplink": "tunnel"}[side]
                assert await is_on(stage, app, expected)


async def test_exec_leaves_an_inherited_socket_behind(stage, excluded):
    """L27: whoever runs it on the other side keeps its own connection, which the command does not get."""
    await excluded("own = tcp(SERVER4); line = read_line(own); own.set_inheritable(True)")
    shown = await excluded(
        "subprocess.run(command, pass_fds=[own.fileno()], env=environment, capture_output=True, text=True).stdout",
        command=[*COMMAND, "exec", "--include", "--", "ls", "-l", "/proc/self/fd"], environment=environment(stage),
    )  # fmt: skip
    assert "pipe:" in shown
    assert "socket:" not in shown
    assert b"still here" == await excluded("own.send(b'still here') and read_exactly(own, 10)")
    assert {"uplink"} == await stage.where(payload=b"still here")


async def test_an_ordinary_user_excludes_what_is_their_own_and_no_more(lab):
    """Issue, item 5: a member of the control group, without any right beyond."""
    lab.directory.chmod(0o755)
    curl = lab.copy_program("curl", "some-curl")
    curl.parent.chmod(0o755)
    async with open_stage(lab, control={"group": "nogroup", "socket": str(lab.directory / "tunsplit.sock")}) as stage:
        command = [sys.executable, "-c", AS_NOBODY]
        options = {"env": environment(stage), "check": False}

        for words, side in (([], "uplink"), (["--include"], "tunnel")):
            for version in (4, 6):
                stage.clear()
                argv = [*command, "exec", *words, "--", curl, "-sS", "--max-time", "5", lab.url(version)]
                done = await lab.host.run(argv, **options)
                assert (0, str(SEEN_AS[side][version])) == (done.returncode, done.stdout.strip()), done.stderr
                assert {side} == await stage.where(protocol="tcp", address=SERVER[version])

        async with stage.app(stage.included) as roots:
            for words in (["pid", "add", str(roots.pid)], ["pid", "remove", str(roots.pid)],
                          ["explain", "--pid", str(roots.pid)]):  # fmt: skip
                done = await lab.host.run([*command, *words], **options)
                assert 3 == done.returncode
                assert "only root may" in done.stderr
            assert await is_on(stage, roots, "tunnel")

        argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sleep", "60"]
        async with stage.lab.host.start(argv) as own:

            async def is_theirs():
                return Path(f"/proc/{own.pid}").stat().st_uid == NOBODY  # noqa: ASYNC240  never waits

            await until(is_theirs, "the user has changed")
            done = await lab.host.run([*command, "pid", "add", str(own.pid)], **options)
            assert (0, "") == (done.returncode, done.stderr)
            assert f"{own.pid}" in (await lab.host.run([*command, "pid", "list"], **options)).stdout


async def test_who_is_not_of_the_group_excludes_nothing(stage):
    """Issue, item 5: the lab's group does not exist, so its socket is root's alone."""
    stage.lab.directory.chmod(0o755)
    for words in (["exec", "--", "curl", "-sS", stage.lab.url(4)], ["app", "add", str(stage.included)], ["off"]):
        command = [sys.executable, "-c", AS_NOBODY, *words]
        done = await stage.lab.host.run(command, env=environment(stage), check=False)
        assert 3 == done.returncode
        assert "no access to" in done.stderr
    assert set() == await stage.where(address=SERVER[4])


async def test_exec_without_a_daemon_runs_nothing(lab):
    """Issue, item 5: a clear error instead of a command that is not excluded."""
    command = [*COMMAND, "exec", "--", "curl", "-sS", lab.url(4)]
    made = {**os.environ, "TUNSPLIT_SOCKET": str(lab.directory / "nobody.sock")}
    done = await lab.host.run(command, env=made, check=False)
    assert 0 != done.returncode
    assert "no tunsplit answers" in done.stderr
    await lab.uplink.settle()
    assert [] == lab.uplink.seen(address=SERVER[4])


async def test_off_and_on_again(stage, excluded, included):
    """L18: off, all are in the tunnel and the list is kept; what changes its side ends, what does not goes on."""
    await hammer.begin(excluded)
    await included("own = tcp(SERVER4); line = read_line(own)")
    await until(lambda: hammer.is_seen(stage.lab.uplink), "all four of the excluded app talk on the uplink")
    await stage.daemon.command("off")
    last = (await excluded("list(said)"))[0]
    await hammer.until_ended(excluded)
    await stage.where()
    for word in hammer.CONNECTED:
        assert max(hammer.numbers(stage.lab.uplink, word)) <= last
        # A datagram that was under way is judged anew, and may leave where its app belongs by then; a segment may not.
        assert word.startswith("udp") or [] == hammer.numbers(stage.lab.tunnel, word)
    assert await is_on(stage, excluded, "tunnel")
    assert str(stage.excluded) in (await stage.daemon.command("app", "list")).stdout

    await excluded("own = tcp(SERVER6); line = read_line(own)")
    assert str(RELAY[6]) == await excluded("line.split()[0]")
    await stage.daemon.command("on")
    with pytest.raises(OSError, match=r"abort|reset|Broken"):
        await excluded("own.send(b'?'); own.recv(1)")
    assert await is_on(stage, excluded, "uplink")
    assert b"still here" == await included("own.send(b'still here') and read_exactly(own, 10)")
    assert str(HOST[4]) == await excluded("ask('tcp', SERVER4)")
