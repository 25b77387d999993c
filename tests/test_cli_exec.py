"""`tunsplit exec`: the command is what it would have been without us, but for its side."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.control_server import GROUP, NOBODY
from tests.switching_server import serving
from tunsplit.cli.execute import NotExecutable, NotFound, find, original_environment

REPOSITORY = Path(__file__).parent.parent

# As tests may be in a directory that is closed to others, what is needed is loaded before becoming another user.
AS_NOBODY = f"""
import os, sys, socket, tomllib
import tunsplit.cli, tunsplit.client, tunsplit.config.saving
os.setgroups([int(group) for group in sys.argv.pop(1).split(",") if group])
os.setgid({NOBODY})
os.setuid({NOBODY})
tunsplit.cli.main(prog_name="tunsplit")
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that any user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def path(directory, switching) -> Iterator[str]:
    with serving(f"{directory}/c.sock", switching, config_file="t.toml", group=GROUP):
        yield f"{directory}/c.sock"


def environment(path: str, **more: str) -> dict[str, str]:
    measured = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "TUNSPLIT_SOCKET": path, **measured, **more}


def tunsplit(path: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunsplit", "exec", *arguments],
        env=environment(path, **more),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_is_the_process_that_was_marked(path, switching):
    result = tunsplit(path, "--", "sh", "-c", "echo $$; cut -d' ' -f22 /proc/$$/stat")
    pid, start_time = map(int, result.stdout.split())

    assert {pid: (start_time, False)} == switching.by_hand


def test_the_command_may_be_included(path, switching):
    result = tunsplit(path, "--include", "sh", "-c", "echo $$")

    assert [(int(result.stdout), True)] == [(pid, included) for pid, (_, included) in switching.by_hand.items()]


@pytest.mark.parametrize("code", [0, 1, 5, 77, 255])
def test_the_exit_code_is_the_commands(path, code):
    result = tunsplit(path, "sh", "-c", f"exit {code}")

    assert (code, "", "") == (result.returncode, result.stdout, result.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGPIPE])
def test_a_signal_ends_it_as_it_ends_the_command(path, number):
    assert -number == tunsplit(path, "sh", "-c", f"kill -{number.value} $$").returncode


def test_the_commands_own_options_are_its_own(path):
    assert "-c --include -h --\n" == tunsplit(path, "echo", "-c", "--include", "-h", "--").stdout


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}])
def test_the_environment_is_untouched(path, locale):
    more = {"LD_PRELOAD": "", "EMPTY": "", "X": "a=b\n\udcff", **locale}

    assert environment(path, **more) == {
        name: value for name, _, value in (line.partition("=") for line in tunsplit_env(path, more).split("\0")) if name
    }


def tunsplit_env(path: str, more: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "tunsplit", "exec", "env", "-0"],
        env=environment(path, **more),
        capture_output=True,
        check=True,
    )
    return result.stdout.decode(errors="surrogateescape")


def test_where_it_cannot_be_read_the_environment_is_pythons(monkeypatch):
    def closed(_: Path) -> bytes:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", closed)
    assert dict(os.environb) == original_environment()


def test_arguments_of_any_bytes_arrive(path):
    result = subprocess.run(
        [sys.executable, "-m", "tunsplit", "exec", "printf", "%s", b"\xff\xc3\xa4"],
        env=environment(path, LC_ALL="C"),
        capture_output=True,
        check=True,
    )

    assert b"\xff\xc3\xa4" == result.stdout


def signals(path: str, prepare: Callable[[], None], *command: str) -> dict[str, int]:
    """The signal masks of what runs as this command."""
    shown = subprocess.run(
        [*command, "grep", "^Sig[BIC]", "/proc/self/status"],
        env=environment(path), preexec_fn=prepare, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name: int(mask, 16) for name, mask in (line.split(":") for line in shown.stdout.splitlines())}


@pytest.mark.parametrize("ignored", [None, signal.SIGINT, signal.SIGHUP])
def test_signals_are_blocked_and_ignored_as_before(path, ignored):
    def prepare() -> None:
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})

    assert signals(path, prepare) == signals(path, prepare, sys.executable, "-m", "tunsplit", "exec")


def test_ctrl_c_before_the_command_runs_ends_it_like_the_command(directory):
    """The daemon does not answer yet."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{directory}/c.sock")
        silent.listen()
        command = [sys.executable, "-m", "tunsplit", "exec", "true"]
        with subprocess.Popen(command, env=environment(f"{directory}/c.sock"), stderr=subprocess.PIPE) as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                assert (b"", -signal.SIGINT) == (process.communicate()[1], process.wait())


LIST_FDS = "import os,sys; print([fd for fd in map(int, sys.argv[1:]) if os.path.exists(f'/proc/self/fd/{fd}')])"


@pytest.mark.parametrize("keep", [False, True])
def test_inherited_internet_sockets_are_closed_and_nothing_else(path, keep, tmp_path):
    inet, inet6, ours = (
        socket.socket(),
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
        socket.socket(socket.AF_UNIX),
    )
    with inet, inet6, ours, (tmp_path / "file").open("w") as file:
        descriptors = [one.fileno() for one in (inet, inet6, ours, file)]
        result = subprocess.run(
            [sys.executable, "-m", "tunsplit", "exec", *(["--keep-fds"] if keep else []), "--",
             sys.executable, "-c", LIST_FDS, *map(str, descriptors)],
            env=environment(path), pass_fds=descriptors, capture_output=True, check=True,
        )  # fmt: skip

    assert (descriptors if keep else descriptors[2:]) == msgspec.json.decode(result.stdout)


def test_they_are_closed_before_the_daemon_is_asked(directory):
    """Else the process would be marked while it shares a socket with the other side."""
    with socket.socket(socket.AF_UNIX) as daemon, socket.socket() as inherited:
        daemon.bind(f"{directory}/c.sock")
        daemon.listen()
        command = [sys.executable, "-m", "tunsplit", "exec", "true"]
        with subprocess.Popen(
            command, env=environment(f"{directory}/c.sock"), pass_fds=[inherited.fileno()]
        ) as process:
            connection, _ = daemon.accept()
            with connection:
                assert b'{"verb": "exec", "include": false}\n' == connection.recv(4096)
                assert not Path(f"/proc/{process.pid}/fd/{inherited.fileno()}").exists()
                connection.sendall(b'{"result": {}}\n')
            assert 0 == process.wait()


def test_standard_input_stays_though_it_is_an_internet_socket(path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        served, _ = server.accept()
        with served:
            served.sendall(b"hello")
            served.shutdown(socket.SHUT_WR)
            subprocess.run(
                [sys.executable, "-m", "tunsplit", "exec", "cat"],
                env=environment(path), stdin=client.fileno(), stdout=client.fileno(), check=True,
            )  # fmt: skip
            assert b"hello" == served.recv(100)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    for name, mode, text in (
        ("good", 0o755, "#!/bin/sh\necho good $1"),
        ("plain", 0o755, "echo plain $1\n"),
        ("closed", 0o644, "#!/bin/sh\n"),
        ("broken", 0o755, "#!/no/such/interpreter\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "closed").write_text("#!/bin/sh\necho another\n")
    (tmp_path / "bin" / "closed").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code", "output"),
    [
        ("good", 0, "good x\n"),
        ("{}/good", 0, "good x\n"),
        ("plain", 0, "plain x\n"),
        ("closed", 0, "another\n"),  # a later directory of PATH has one that can be executed
        ("{}/closed", 126, "tunsplit: exec: {}/closed: Permission denied\n"),
        ("{}/folder", 126, "tunsplit: exec: {}/folder: Is a directory\n"),
        ("folder", 127, "tunsplit: exec: folder: command not found\n"),
        ("{}/broken", 126, "tunsplit: exec: {}/broken: No such file or directory\n"),
        ("absent", 127, "tunsplit: exec: absent: command not found\n"),
        ("{}/absent", 127, "tunsplit: exec: {}/absent: command not found\n"),
        ("{}/good/x", 127, "tunsplit: exec: {}/good/x: command not found\n"),
        ("", 127, "tunsplit: exec: : command not found\n"),
    ],
)
def test_what_is_found_and_what_is_not_as_in_a_shell(path, programs, command, code, output, switching):
    result = tunsplit(path, "--", command.format(programs), "x", PATH=f"{programs}::{programs}/bin:/usr/bin:/bin")

    assert (code, output.format(programs)) == (result.returncode, result.stdout + result.stderr)
    assert (code == 0 or "broken" in command) == bool(switching.by_hand)


def test_without_path_the_systems_own_directories_are_searched():
    assert find("sh", os.defpath) in {"/bin/sh", "/usr/bin/sh"}


def test_a_file_that_is_there_but_closed_is_said_to_be(programs, monkeypatch):
    monkeypatch.chdir(programs)
    with pytest.raises(NotExecutable, match=r"exec: \./closed: Permission denied"):
        find("closed", "")
    with pytest.raises(NotExecutable, match="File name too long"):
        find("/" + "x" * 300, "")
    with pytest.raises(NotFound):
        find("x", "/nowhere")


def test_without_a_daemon_the_command_does_not_run(directory):
    result = tunsplit(f"{directory}/none", "sh", "-c", "echo ran")

    assert (5, "") == (result.returncode, result.stdout)
    assert 1 == len(result.stderr.splitlines())


def as_nobody(path: str, groups: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, groups, *arguments],
        env=environment(path), capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip


@pytest.mark.netns
def test_members_of_the_group_may_exec_and_stay_who_they_are(path, switching):
    result = as_nobody(path, "1", "exec", "--", "sh", "-c", "echo $$ $(id -u)")
    pid, uid = map(int, result.stdout.split())

    assert ([pid], NOBODY) == (list(switching.by_hand), uid)


@pytest.mark.netns
def test_strangers_may_not(path, switching):
    result = as_nobody(path, "", "exec", "--", "echo", "ran")

    assert (3, "") == (result.returncode, result.stdout)
    assert result.stderr.startswith(f"tunsplit: no access to {path}: run as root, or as a member of the group")
    assert {} == switching.by_hand


@pytest.mark.netns
def test_members_change_the_list_and_name_what_is_theirs(path, switching):
    with subprocess.Popen(["sleep", "60"], user=NOBODY) as theirs:
        commands = (
            ["app", "add", "/bin/sh"],
            ["pid", "add", f"{theirs.pid}"],
            ["pid", "add", f"{os.getpid()}"],
            ["off"],
        )
        codes = [as_nobody(path, "1", *command).returncode for command in commands]
        theirs.kill()

    assert [0, 0, 3, 0] == codes
    assert ("/bin/sh" in switching.paths, [theirs.pid], False) == (True, list(switching.by_hand), switching.enabled)


def test_it_starts_without_what_only_others_need():
    code = (
        "import sys, tunsplit.cli.execute, tunsplit.client\n"
        "print({'trio', 'rich', 'dpkt', 'pytun', 'asyncio', 'logging', 'msgspec'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert "set()\n" == result.stdout
