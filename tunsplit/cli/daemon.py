"""The commands that ask no daemon: to be one, to see whether it could be one, to clear up after one; and the lab."""

from difflib import unified_diff
from typing import TYPE_CHECKING

import click

from tunsplit.cli.base import config_option, load, main
from tunsplit.errors import ConfigError, TunsplitError

if TYPE_CHECKING:
    from tunsplit.config import Config
    from tunsplit.tasks.planning import Part


@main.command()
@config_option
@click.option(
    "--on-stop", type=click.Choice(("open", "block")), help="What SIGTERM does [default: the configuration's on_stop]."
)
def run(config_file: str | None, on_stop: str | None) -> None:
    """Split traffic, in the foreground, until SIGTERM or Ctrl-C.

    Prints the one line "ready" once traffic is split, logs to stderr, and puts the network back as it was when it ends;
    with --on-stop block, SIGTERM keeps the way closed until the next start or `tunsplit undo`. Ctrl-C opens it.

    Example: sudo tunsplit run -c config/wireguard.toml
    """
    from tunsplit import log
    from tunsplit.check import require_runnable

    file, config = load(config_file)
    log.setup(config.log.level, config.log.format)
    require_runnable()
    from tunsplit.app import run as run_daemon

    run_daemon(config, config_file=file, ready=ready, on_stop=on_stop)


def ready() -> None:
    """Tell whoever waits, a pipe's reader or systemd, that traffic is split."""
    from tunsplit.kernel import servicemanager

    click.echo("ready")  # and flushes
    servicemanager.tell("READY=1")


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
    from tunsplit.check import require_undoable
    from tunsplit.kernel.hostconfig import undo as undo_host
    from tunsplit.kernel.instance import Instance
    from tunsplit.kernel.resolvconf import PATH, give_back

    require_undoable()
    if Instance.is_running():
        raise TunsplitError("a daemon is at work in this network namespace: stop it, and it undoes its changes itself")
    undone = undo_host()
    if give_back():
        undone.append(str(PATH))
    for line in undone or ["nothing to undo"]:
        click.echo(line)


@main.command()
@config_option
def block(config_file: str | None) -> None:
    """Close the way without a daemon.

    Nothing leaves but what the VPN itself sends.

    It is the state that `firewall.on_stop = "block"` leaves. The next start takes over; `tunsplit undo` opens the way.

    Example: sudo tunsplit block
    """
    from tunsplit.check import require_runnable
    from tunsplit.tasks.planning import block as block_host

    _, config = load(config_file)
    require_runnable(tun=False)  # before modules are loaded, too
    block_host(config)
    click.echo("the way is closed; `tunsplit undo` opens it")


@main.command()
@config_option
@click.option("--diff", is_flag=True, help="Only what differs from now: + comes, - goes.")
def plan(config_file: str | None, diff: bool) -> None:
    """Print what a start would change on the host.

    In that order, and nothing is changed.

    Tables, sysctls, the device, its addresses, routes, rules and resolv.conf, in the words of nft, sysctl and ip.

    Example: sudo tunsplit plan --diff
    """
    from tunsplit.check import require_runnable
    from tunsplit.tasks.planning import parts

    _, config = load(config_file)
    require_runnable()
    for part in parts(config):
        lines = changed_lines(part) if diff else list(part.wanted)
        if lines:
            click.echo("\n".join([f"# {part.heading}", *lines]))


def changed_lines(part: "Part") -> list[str]:
    """What goes and what comes; of a text with the lines around it."""
    if part.is_text:
        return list(unified_diff(part.now, part.wanted, lineterm=""))[2:]
    return [
        *(f"-{line}" for line in part.now if line not in part.wanted),
        *(f"+{line}" for line in part.wanted if line not in part.now),
    ]


@main.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def lab(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Try all this in a throw-away test network.

    Example: sudo tunsplit lab demo
    """
    from tunsplit.lab.commands import lab as lab_group

    with lab_group.make_context("lab", list(arguments), parent=ctx.parent) as sub:
        lab_group.invoke(sub)
