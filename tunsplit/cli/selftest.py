"""`tunsplit selftest`: the promises, shown on this kernel in a throw-away network."""

from pathlib import Path

import click

from tunsplit.cli.base import json_option, main


@main.command()
@json_option
@click.option(
    "-c",
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take its sections, such as [firewall] or [dns], instead of the defaults; [tunnel], [control] and [[app]] are "
    "the network's own.",
)
@click.pass_context
def selftest(ctx: click.Context, config_file: Path | None, *, as_json: bool) -> None:
    """Show on this kernel that what is promised holds.

    In a throw-away network two apps, one on each side, try to get across, and both wires are watched; your own network
    is not touched. Exit code 1 if a promise was not kept. Needs root, and half a minute.

    Example: sudo tunsplit selftest
    """
    from tunsplit.lab.commands import run_selftest

    ctx.exit(run_selftest(config_file, as_json=as_json))
