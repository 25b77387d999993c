"""What all commands share: the group, its errors, the options, the configuration, the question to the daemon."""

import os
import shutil
from contextlib import suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import click

from tunsplit import __version__
from tunsplit.errors import ConfigError, TunsplitError

if TYPE_CHECKING:
    from tunsplit.config import Config

DEFAULT_CONFIG = "/etc/tunsplit/tunsplit.toml"
DEFAULT_SOCKET = "/run/tunsplit/tunsplit.sock"  # as the configuration has it, whose import costs more than the rest


class Commands(click.Group):
    """The group of all commands, where an error of ours becomes a message and an exit code, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except TunsplitError as error:
            click.echo(f"tunsplit: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tunsplit")
def main() -> None:
    """Per-application split tunnelling: chosen apps beside the VPN, all others through it.

    Try it in a throw-away network first: sudo tunsplit lab demo

    Then on your own host: sudo tunsplit check && sudo tunsplit run
    """


config_option = click.option(
    "-c",
    "--config",
    "config_file",
    metavar="FILE",
    envvar="TUNSPLIT_CONFIG",
    help=f"Configuration [default: $TUNSPLIT_CONFIG, or {DEFAULT_CONFIG}].",
)
socket_option = click.option(
    "--socket",
    "socket_path",
    metavar="PATH",
    envvar="TUNSPLIT_SOCKET",
    help="Control socket of the daemon [default: $TUNSPLIT_SOCKET, or the configuration's].",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def load(config_file: str | None) -> tuple[str, "Config"]:
    """Read the configuration; return its file's name with it."""
    from tunsplit.config import parse

    file, text = read(config_file)
    return file, parse(text, file)


def read(config_file: str | None) -> tuple[str, str]:
    """Return the configuration's file name and its text."""
    file = config_file or DEFAULT_CONFIG
    try:
        return file, Path(file).read_bytes().decode()  # with the line endings that it has
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: found bytes that are no UTF-8 at offset {error.start}, expected TOML") from None
    except OSError as error:
        raise ConfigError(
            f"{file}: found no readable file ({error.strerror}), expected a configuration; name one with -c or "
            "TUNSPLIT_CONFIG"
        ) from None


def ask(config_file: str | None, socket_path: str | None, verb: str, **arguments: object) -> Any:
    """Ask the daemon; its socket is the option's or the environment's, the configuration's, or the default."""
    from tunsplit.client import call

    return call(socket_path or configured_socket(config_file), verb, **arguments)


def configured_socket(config_file: str | None) -> str:
    """Return the control socket that the configuration names.

    Without a file at the default place it is the default socket: a member of the group may use the socket, but need
    not be able to read the configuration. The rest of the file is not judged: a daemon at work can be asked, whatever
    has been written there since.
    """
    import tomllib

    if config_file is None and not os.access(DEFAULT_CONFIG, os.R_OK):
        return DEFAULT_SOCKET
    file, text = read(config_file)
    with suppress(ValueError, AttributeError, RecursionError):  # parse() has the words for what is wrong
        found = tomllib.loads(text).get("control", {}).get("socket", DEFAULT_SOCKET)
        if isinstance(found, str) and found.startswith("/"):
            return found
    from tunsplit.config import parse

    return parse(text, file).control.socket


def absolute(path: str) -> str:
    """Return a path as the daemon must get it: from the root, without `.` and `..`, its symlinks as they are written.

    Behind a symlink `..` leads elsewhere than the text says (path_resolution(7)): a path is resolved as far as its
    last `..`. Of a bare name that is no file here, but a program on the PATH, a note tells.

    Raises:
        ConfigError: there is no path.
        TunsplitError: the path has bytes that no configuration can hold.
    """
    if not path:
        raise ConfigError('path: found "", expected the path of an executable, or a glob')
    try:
        path.encode()
    except UnicodeEncodeError:
        raise TunsplitError(f"{path!r:.200}: found bytes that are no UTF-8, expected a path in UTF-8") from None
    is_there = os.path.exists(path)  # noqa: PTH110 -- what may not be looked at is an error for pathlib
    if not is_there and (program := shutil.which(path)):
        click.echo(f"tunsplit: note: {path} counts as a file here; the program on the PATH is {program}", err=True)
    parts = PurePath(path).parts
    if ".." in parts:
        after_up = len(parts) - parts[::-1].index("..")
        parts = (os.path.realpath(PurePath(*parts[:after_up])), *parts[after_up:])
    return "/" + str(Path.cwd().joinpath(*parts)).lstrip("/")  # two leading slashes would stay


def print_json(value: object) -> None:
    """Print one line of JSON."""
    import msgspec

    click.echo(msgspec.json.encode(value).decode())
