"""`tunsplit lab`: a throw-away network from the command line."""

import os
import shlex
import sys
import tomllib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import click
import trio
from rich.console import Console

from tunsplit.lab import daemon, demo, dnstrials, programs, selftest
from tunsplit.lab.addresses import IPERF_PORT, PICTURE, RESOLVERS
from tunsplit.lab.lab import Lab, open_lab

COPIED = ("curl", "ping", "iperf3", "dig")  # programs of which there is an excluded copy to try

INTERRUPTED = 130  # as a shell says that SIGINT ended it

Environment = dict[str, str]

config_option = click.option(
    "-c", "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Configuration of tunsplit [default: one made for this network].",
)  # fmt: skip
exclude_option = click.option(
    "-x", "--exclude", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
    help="Exclude this executable too; may be repeated. Not with --config.",
)  # fmt: skip
bare_option = click.option("--no-tunsplit", "bare", is_flag=True, help="Do not start tunsplit.")


@click.group()
def lab() -> None:
    """A throw-away network to try tunsplit in: host, router, VPN relay, internet.

    It is made of network namespaces and is gone when the command ends; your own network is not touched. Needs root.

    Example: sudo tunsplit lab demo
    """


@lab.command("demo")
@click.option(
    "--platform", type=click.Choice(list(dnstrials.TABLE)), default="linux", show_default=True,
    help="Whose DNS table to show.",
)  # fmt: skip
def demo_command(platform: str) -> None:
    """Show an excluded and an included app, on which side each was seen, and who answers their DNS questions.

    Exit code 1 if a single packet was seen where it was not expected.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    sys.exit(_run(partial(demo.run, console, platform)))


@lab.command(context_settings={"allow_interspersed_args": False})
@config_option
@exclude_option
@bare_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(config: Path | None, exclude: tuple[Path, ...], command: tuple[str, ...], *, bare: bool) -> None:
    """Run a command in the network's host, with tunsplit running; its exit code is the command's.

    excluded-curl, excluded-ping, excluded-iperf3 and excluded-dig are copies that are excluded; all else is included.

    Example: sudo tunsplit lab run -- excluded-curl http://198.51.100.1/
    """
    sys.exit(_run(partial(_run_command, _read(config, exclude), exclude, command, bare=bare)))


@lab.command()
@config_option
@exclude_option
@bare_option
def shell(config: Path | None, exclude: tuple[Path, ...], *, bare: bool) -> None:
    """Open a shell in the network's host, with tunsplit running.

    TUNSPLIT_CONFIG and TUNSPLIT_SOCKET are set, so that `tunsplit flows` and the others just work.
    """
    sys.exit(_run(partial(_run_shell, _read(config, exclude), exclude, bare=bare)))


def run_selftest(config: Path | None, *, as_json: bool) -> int:
    """Show what is promised, with sections of this configuration, and print it; 1 if anything was not kept."""
    try:
        sections = tomllib.loads(_read(config, ()) or "")
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"{config}: {error}") from error
    for own in ("tunnel", "control", "app"):
        sections.pop(own, None)

    def tell(shown: selftest.Shown) -> None:
        if not as_json:
            click.echo(f"{shown.verdict:9}{shown.promise:11}{shown.says}")

    async def show() -> int:
        shown = await selftest.run(sections, tell)
        click.echo(selftest.encode(shown) if as_json else selftest.summarise(shown))
        return 0 if all(one.ok for one in shown) else 1

    return _run(show)


def _read(config: Path | None, exclude: Sequence[Path]) -> str | None:
    """The given configuration's text, if one is given."""
    if config is not None and exclude:
        raise click.UsageError("--exclude adds to the lab's own configuration; with --config, write [[app]] there.")
    if config is None:
        return None
    try:
        text = config.read_text()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{config}: found bytes that are no UTF-8, expected TOML.") from error
    with suppress(tomllib.TOMLDecodeError):  # tunsplit has the words for that
        match tomllib.loads(text):
            case {"dns": {"take_over": True}}:
                # A lab has a network of its own, not files: it is the machine's resolv.conf that would be taken.
                raise click.UsageError("dns.take_over would take this machine's own /etc/resolv.conf: leave it out.")
    return text


def _run(function: Callable[[], Awaitable[int]]) -> int:
    try:
        # Ctrl-C then arrives in the main task alone, which takes everything down in order.
        return trio.run(function, restrict_keyboard_interrupt_to_checkpoints=True)
    except* KeyboardInterrupt:  # from beneath nurseries it comes as a group
        click.echo("interrupted", err=True)
    return INTERRUPTED


async def _run_command(config: str | None, exclude: Sequence[Path], command: Sequence[str], *, bare: bool) -> int:
    async with _prepare(config, exclude, bare=bare) as (opened, environment):
        return await _attach(opened, command, environment)


async def _run_shell(config: str | None, exclude: Sequence[Path], *, bare: bool) -> int:
    async with _prepare(config, exclude, bare=bare) as (opened, environment), AsyncExitStack() as stack:
        if programs.find_program("iperf3"):
            await stack.enter_async_context(opened.iperf_server())
        click.echo(_banner(opened, bare=bare))
        return await _attach(opened, [os.environ.get("SHELL", "/bin/sh")], environment)


@asynccontextmanager
async def _prepare(
    config: str | None, exclude: Sequence[Path], *, bare: bool
) -> AsyncGenerator[tuple[Lab, Environment]]:
    """A lab with tunsplit running, and the environment for what is run in it."""
    async with open_lab() as opened, AsyncExitStack() as stack:
        copies = [opened.copy_program(name, f"excluded-{name}") for name in COPIED if programs.find_program(name)]
        text = config or opened.config([*copies, *(path.resolve() for path in exclude)])
        file, socket = opened.write_config(text)
        if not bare:
            await stack.enter_async_context(daemon.start(opened.host, file, socket))
        environment = daemon.make_environment(file, socket)
        _write_script(opened.directory / "bin/tunsplit", daemon.COMMAND)
        environment["PATH"] = os.pathsep.join((str(opened.directory / "bin"), environment.get("PATH", os.defpath)))
        yield opened, environment


def _write_script(path: Path, command: Sequence[str]) -> None:
    """A word for a command: sudo's PATH may not lead to the tunsplit that belongs to our interpreter."""
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o755)


async def _attach(opened: Lab, command: Sequence[str], environment: Environment) -> int:
    """Run a command with our own stdin, stdout and stderr; its exit code, as a shell gives it."""
    argv = opened.host.command(command, path=environment["PATH"])
    done = await trio.run_process(argv, stdin=None, check=False, env=environment)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def _banner(opened: Lab, *, bare: bool) -> str:
    resolvers = ", ".join(str(own[4]) for own in RESOLVERS.values())
    return f"""{PICTURE}
{demo.describe_tunnel(opened)}
You are on the host. {"tunsplit is not running." if bare else "tunsplit is running: tunsplit flows, tunsplit status."}

  curl {opened.url(4)}            the address that the server sees; also {opened.url(6)}
  excluded-curl {opened.url(4)}   the same from an excluded app; also excluded-ping, excluded-iperf3, excluded-dig
  ping {opened.server(4)}
  iperf3 -c {opened.server(4)}           port {IPERF_PORT}
  dig @RESOLVER who.is TXT         who answers; resolvers: {resolvers}
  tcpdump -ni eth0                 the uplink; wg0: the tunnel

Leave with exit: everything here is gone then.
"""
