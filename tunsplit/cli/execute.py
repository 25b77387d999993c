"""`tunsplit exec`: become a command that is excluded, or included, from its first instruction.

Nothing here has more rights than who calls it: the daemon marks the process that asks, and that process then becomes
the command. What the command gets is what it would have got without us: environment, arguments, descriptors, working
directory, process id, signals. Two things Python itself changes are put right: signals that it ignores, and LC_CTYPE,
which it sets in the C locale (PEP 538).

Descriptors of inherited internet sockets are closed, and before the daemon is asked: a socket that a process on one
side shares with one on the other would end their flows (SPEC L27). Those at 0, 1 and 2 stay: they are the connection
that the command was started to talk on, by inetd, say, and closing them would have its first file take their place.
"""

import errno
import os
import signal
import socket
import stat
from pathlib import Path
from typing import NoReturn

import click

from tunsplit.cli.base import ask, config_option, main, socket_option
from tunsplit.errors import TunsplitError

INET = (socket.AF_INET, socket.AF_INET6)


class NotFound(TunsplitError):
    """There is no such command; as a shell says it."""

    exit_code = 127


class NotExecutable(TunsplitError):
    """The command is there, but cannot be executed; as a shell says it."""

    exit_code = 126


@main.command(
    "exec",
    context_settings={"allow_interspersed_args": False},
    short_help="Run a command excluded from the tunnel, or included.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--include", is_flag=True, help="Include it: through the tunnel, whatever the list says.")
@click.option("--keep-fds", is_flag=True, help="Keep inherited internet sockets open.")
@config_option
@socket_option
def execute(
    command: tuple[str, ...], include: bool, keep_fds: bool, config_file: str | None, socket_path: str | None
) -> None:
    """Run a command, and what it starts, excluded from the tunnel (or included), whatever mode is set.

    Ends with the command's own exit code; 126 if it cannot be executed, 127 if it is not found.

    Example: tunsplit exec -- curl https://example.org
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends us as it would end the command
    environment = original_environment()
    program = find(command[0], environment.get(b"PATH", os.defpath.encode()).decode(errors="surrogateescape"))
    if not keep_fds:
        close_inet_sockets()
    ask(config_file, socket_path, "exec", include=include)
    become(program, command, environment)


def original_environment() -> dict[bytes, bytes]:
    """Return the environment as it was when this process began (proc_pid_environ(5)).

    Where that may not be read, because the interpreter's file may not be either (a process without PR_SET_DUMPABLE),
    it is what Python made of it.
    """
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except PermissionError:
        return dict(os.environb)
    return {name: value for name, equals, value in (entry.partition(b"=") for entry in entries) if name and equals}


def find(command: str, path: str) -> str:
    """Return the file that a command is, looked for along PATH as execvp(3) does.

    Raises:
        NotFound: there is none.
        NotExecutable: what there is cannot be executed.
    """
    if "/" in command:
        candidates = [command]
    else:
        candidates = [os.path.join(directory or ".", command) for directory in path.split(":")] if command else []  # noqa: PTH118  "./x" stays
    reason = None
    for candidate in candidates:
        try:
            mode = os.stat(candidate).st_mode  # noqa: PTH116  "./x" stays
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            reason = reason or f"{candidate}: {error.strerror}"
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK):
            return candidate
        if "/" in command or stat.S_ISREG(mode):
            reason = reason or f"{candidate}: {os.strerror(errno.EISDIR if stat.S_ISDIR(mode) else errno.EACCES)}"
    if reason:
        raise NotExecutable(f"exec: {reason}")
    raise NotFound(f"exec: {command}: command not found")


def close_inet_sockets() -> None:
    """Close what internet sockets this process has inherited, but for standard input, output and error."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208  names are all that is wanted
        try:
            is_socket = descriptor > 2 and stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        except OSError:  # EBADF: the listing's own
            continue
        if is_socket:
            inherited = socket.socket(fileno=descriptor)
            if inherited.family in INET:
                inherited.close()
            else:
                inherited.detach()


def become(program: str, command: tuple[str, ...], environment: dict[bytes, bytes]) -> NoReturn:
    """Execute a program in place of this one."""
    # Ignored by Python from its start, and what is ignored stays so in the next program (execve(2)).
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        try:
            os.execve(program, command, environment)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            os.execve("/bin/sh", ("sh", program, *command[1:]), environment)  # as execvp(3) does without "#!"
    except OSError as error:
        raise NotExecutable(f"exec: {program}: {error.strerror}") from error
