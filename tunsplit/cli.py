"""The command line: words in, exit code out. The only place that prints.

Imports inside the commands are meant: `tunsplit flows` needs no trio, `tunsplit --help` nothing at all.
"""

import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tunsplit import __version__
from tunsplit.errors import ConfigError, TunsplitError

if TYPE_CHECKING:
    from rich.table import Table

    from tunsplit.config import Config

DEFAULT_CONFIG = "/etc/tunsplit/tunsplit.toml"
WATCH_S = 1.0  # between two pictures of `flows --watch`
PIPE_WIDTH = 200  # columns where there is no terminal to ask: one line a flow


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


@main.command()
@config_option
def run(config_file: str | None) -> None:
    """Split traffic, in the foreground, until SIGTERM or Ctrl-C.

    Prints the one line "ready" once traffic is split, logs to stderr, and puts the network back as it was when it ends.

    Example: sudo tunsplit run -c config/wireguard.toml
    """
    from tunsplit import log
    from tunsplit.check import require_runnable

    file, config = load(config_file)
    log.setup(config.log.level, config.log.format)
    require_runnable()
    from tunsplit.app import run as run_daemon

    run_daemon(config, config_file=file, ready=ready)


def load(config_file: str | None) -> tuple[str, "Config"]:
    """Read the configuration; return its file's name with it."""
    from tunsplit.config import parse

    file = config_file or DEFAULT_CONFIG
    try:
        return file, parse(Path(file).read_text(encoding="utf-8"), file)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: found bytes that are no UTF-8 at offset {error.start}, expected TOML") from None
    except OSError as error:
        raise ConfigError(
            f"{file}: found no readable file ({error.strerror}), expected a configuration; name one with -c or "
            "TUNSPLIT_CONFIG"
        ) from None


def ready() -> None:
    """Tell whoever waits, a pipe's reader or systemd (sd_notify(3)), that traffic is split."""
    click.echo("ready")  # and flushes
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(b"READY=1")


@main.command()
@config_option
@click.pass_context
def check(ctx: click.Context, config_file: str | None) -> None:
    """Say whether tunsplit can run here, and what it would lack.

    Looks at the configuration, the capabilities, the kernel's features (tried in a network namespace of their own: the
    host is not changed) and programs. Exit code 0: it can run; 2: the configuration is wrong; 3: a capability is
    missing; 4: a kernel feature or a program is missing.

    Example: sudo tunsplit check -c config/wireguard.toml
    """
    from tunsplit.check import examine, exit_code

    config: Config | ConfigError
    try:
        file, config = load(config_file)
    except ConfigError as error:
        file, config = "", error
    everything = []
    for heading, findings in examine(config, file):
        click.echo(heading)
        for finding in findings:
            # What keeps tunsplit from running is an error, so it goes where errors go; on a terminal nothing changes.
            click.echo(f"  {finding.level.value:8} {finding.text}", err=bool(finding.exit_code))
        everything += findings
    ctx.exit(exit_code(everything))


@main.command()
def undo() -> None:
    """Remove whatever a killed daemon left in this network namespace.

    Does no harm where there is nothing, and may be repeated. A running daemon undoes its own changes when it ends.

    Example: sudo tunsplit undo
    """
    from tunsplit.kernel.hostconfig import undo as undo_host
    from tunsplit.kernel.instance import Instance

    if Instance.is_running():
        raise TunsplitError("a daemon is at work in this network namespace: stop it, and it undoes its changes itself")
    for line in undo_host() or ["nothing to undo"]:
        click.echo(line)


def ask(config_file: str | None, socket_path: str | None, verb: str, **arguments: object) -> Any:
    """Ask the daemon; its socket is the option's or the environment's, the configuration's, or the default."""
    from tunsplit.client import call

    return call(socket_path or configured_socket(config_file), verb, **arguments)


def configured_socket(config_file: str | None) -> str:
    """Return the control socket that the configuration names.

    Without a file at the default place it is the default socket: a member of the group may use the socket, but need
    not be able to read the configuration.
    """
    from tunsplit.config import Control

    if config_file is None and not os.access(DEFAULT_CONFIG, os.R_OK):
        return Control().socket
    return load(config_file)[1].control.socket


def print_json(value: object) -> None:
    """Print one line of JSON."""
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


@main.command()
@config_option
@socket_option
@json_option
def status(config_file: str | None, socket_path: str | None, as_json: bool) -> None:
    """Show the state of the running daemon, its tunnel and its uplink.

    Example: tunsplit status --json
    """
    answer = ask(config_file, socket_path, "status")
    if as_json:
        print_json(answer)
    else:
        click.echo("\n".join(status_lines(answer)))


def status_lines(answer: dict[str, Any]) -> list[str]:
    """Return a short summary of what `status --json` says in full."""
    tunnel, uplink, split = answer["tunnel"], answer["uplink"], answer["split"]
    meaning = {
        "active": "apps are judged",
        "blocked": "tunsplit cannot judge, so nothing leaves",
        "disabled": "splitting is off: every app uses the tunnel",
    }
    interfaces = sorted({name for name in (uplink["interface4"], uplink["interface6"]) if name})
    gateways = [gateway for gateway in (uplink["gateway4"], uplink["gateway6"]) if gateway]
    lines = [
        f"state    {answer['state']}: {meaning.get(answer['state'], '')}",
        f"mode     {split['mode']}: listed apps use the {'uplink' if split['mode'] == 'exclude' else 'tunnel'}",
        f"tunnel   {tunnel['interface']} {'up' if tunnel['up'] else 'down'} {joined(tunnel['addresses'])}".rstrip(),
        f"uplink   {joined(interfaces) or 'none'} {joined(uplink['addresses'])}".rstrip()
        + (f" via {joined(gateways)}" if gateways else ""),
    ]
    counters = {name: value for name, value in answer["counters"].items() if value}
    return [*lines, f"counters {joined(f'{name}={value}' for name, value in counters.items()) or 'all zero'}"]


def joined(words: Iterable[object]) -> str:
    """Return words with spaces between them."""
    return " ".join(map(str, words))


@main.command()
@config_option
@socket_option
@json_option
@click.option("--watch", is_flag=True, help="Repeat once a second until Ctrl-C; with --json, one list a line.")
def flows(config_file: str | None, socket_path: str | None, as_json: bool, watch: bool) -> None:
    """Show each flow: whose it is, which side it takes, and why.

    Root sees all flows, members of the control group their own.

    Example: sudo tunsplit flows --watch
    """

    def pictures() -> Iterator[list[dict[str, Any]]]:
        yield ask(config_file, socket_path, "flows")
        while watch:
            time.sleep(WATCH_S)
            yield ask(config_file, socket_path, "flows")

    with suppress(KeyboardInterrupt):  # the way to end --watch
        if as_json:
            for answer in pictures():
                print_json(answer)
        else:
            show_tables(map(flows_table, pictures()), live=watch)


def show_tables(tables: "Iterator[Table]", *, live: bool) -> None:
    """Print a table, or each of them in its predecessor's place."""
    from rich.console import Console
    from rich.live import Live

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if not live:
        console.print(next(tables))
        return
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as display:
        for table in tables:
            display.update(table, refresh=True)


def flows_table(answer: list[dict[str, Any]]) -> "Table":
    """Return flows as a table, the busiest first."""
    from rich.table import Table
    from rich.text import Text

    from tunsplit.config.values import printable

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("app", "protocol", "source", "destination", "side", "state", "reason"):
        table.add_column(heading, overflow="fold")
    for heading in ("out", "in"):
        table.add_column(heading, justify="right", no_wrap=True)
    for flow in sorted(answer, key=lambda flow: -flow["bytes_out"] - flow["bytes_in"]):
        app = flow["app"] or {}
        words = (
            app.get("exe") or "unknown",
            flow["protocol"],
            flow["source"],
            flow["destination"],
            flow["verdict"] or "undecided",
            flow["state"],
            flow["reason"] or "",
            size_of(flow["bytes_out"]),
            size_of(flow["bytes_in"]),
        )
        # Names of programs may hold anything: as Text, they are no markup, and printable() takes the escapes.
        table.add_row(*(Text(printable(word)) for word in words))
    return table


def size_of(octets: float) -> str:
    """Return a number of bytes as people read it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 1000:
            return f"{octets:.0f} {unit}" if unit == "B" else f"{octets:.1f} {unit}"
        octets /= 1000
    return f"{octets:.1f} TB"


@main.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def lab(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Try all this in a throw-away test network.

    Example: sudo tunsplit lab demo
    """
    from tunsplit.lab.commands import lab as lab_group

    with lab_group.make_context("lab", list(arguments), parent=ctx) as sub:
        lab_group.invoke(sub)
