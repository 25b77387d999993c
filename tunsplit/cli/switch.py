"""What a daemon is told: the list, processes by hand, splitting as a whole. Each returns when it has taken effect."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click

from tunsplit.cli.base import absolute, ask, config_option, json_option, main, print_json, socket_option
from tunsplit.errors import ConfigError

NOT_WRITTEN = ("rule", "saved", "matches")  # of an entry: what is not written in the configuration
DEFAULTS = (("inherit", True), ("force", False))

save_option = click.option("--save", is_flag=True, help="Change the configuration file as well, keeping its comments.")


@main.group()
def app() -> None:
    """Show or change the list of apps.

    A change holds until the daemon ends; with --save it is written to the configuration as well. It has taken effect
    when the command returns: no packet of a switched app takes its old side any more.

    Example: sudo tunsplit app add /usr/bin/firefox --save
    """


@app.command("list", short_help="Show each rule, and which processes match.")
@config_option
@socket_option
@json_option
def app_list(config_file: str | None, socket_path: str | None, as_json: bool) -> None:
    """Show the list: each rule, whether it is saved, and which processes match.

    Example: tunsplit app list
    """
    apps = ask(config_file, socket_path, "app list")["apps"]
    if as_json:
        print_json(apps)
        return
    rows = [
        (
            str(entry["rule"] or "-"),
            ", ".join(said(entry)),
            "" if entry["saved"] else "not saved",
            f"processes {' '.join(map(str, entry['matches']))}" if entry["matches"] else "no process",
        )
        for entry in apps
    ]
    print_rows(rows, "the list is empty")


def said(entry: dict[str, Any]) -> Iterator[str]:
    """Yield what an entry says, as the configuration has it, but for what goes without saying."""
    for key, value in entry.items():
        if key not in NOT_WRITTEN and value is not None and (key, value) not in DEFAULTS:
            yield f"{key} {str(value).lower() if isinstance(value, bool) else value}"


@app.command("add")
@click.argument("path")
@click.option("--force", is_flag=True, help="Also a local resolver, which asks in the name of included apps as well.")
@save_option
@config_option
@socket_option
def app_add(path: str, force: bool, save: bool, config_file: str | None, socket_path: str | None) -> None:
    """Put an executable, or a glob over executables, on the list.

    A relative path starts here; symlinks are kept as they are written, and followed by the daemon. Quote globs.

    Examples: sudo tunsplit app add /usr/bin/firefox; sudo tunsplit app add '/opt/games/**' --save
    """
    from tunsplit.config.saving import with_app

    path = absolute(path)
    texts: list[str] = []

    def edit(text: str, file: str) -> str:
        texts[:] = text, with_app(text, path, file, force=force)
        return texts[1]

    if save:
        save_list(config_file, socket_path, edit)
    try:
        answer = ask(config_file, socket_path, "app add", path=path, force=force)
    except ConfigError:  # refused, so it may not stay in the file either
        if save:
            save_list(config_file, socket_path, lambda text, _: texts[0] if text == texts[1] else text)
        raise
    print_warnings(answer)
    for hint in answer["hints"]:
        click.echo(f"tunsplit: note: {hint}", err=True)
    click.echo(f"{path} is on the list" + ("" if answer["changed"] else " already"))


@app.command("remove")
@click.argument("path")
@save_option
@config_option
@socket_option
def app_remove(path: str, save: bool, config_file: str | None, socket_path: str | None) -> None:
    """Take an executable off the list, as it is written there.

    Example: sudo tunsplit app remove /usr/bin/firefox
    """
    from tunsplit.config.saving import without_app

    path = absolute(path)
    if save:
        save_list(config_file, socket_path, lambda text, file: without_app(text, path, file))
    answer = ask(config_file, socket_path, "app remove", path=path)
    click.echo(f"{path} is {'off' if answer['changed'] else 'not on'} the list")


@app.command("clear")
@save_option
@config_option
@socket_option
def app_clear(save: bool, config_file: str | None, socket_path: str | None) -> None:
    """Empty the list. In the configuration, --save leaves rules that say more than a path.

    Example: sudo tunsplit app clear
    """
    from tunsplit.config.saving import without_apps

    if save:
        save_list(config_file, socket_path, without_apps)
    click.echo(f"taken off the list: {ask(config_file, socket_path, 'app clear')['count']}")


def save_list(config_file: str | None, socket_path: str | None, edit: Callable[[str, str], str]) -> None:
    """Edit the file that the daemon was started with. Before anything changes: what cannot be saved is not half done.

    `edit` gets the text and the file's name.
    """
    from tunsplit.cli.saving import rewrite

    file = ask(config_file, socket_path, "app list")["file"]
    rewrite(file, lambda text: edit(text, file))


@main.group()
def pid() -> None:
    """Show which processes are on the list, or exclude some by hand.

    Members of the control group see and name their own processes, root everybody's.

    Example: tunsplit pid add 4711
    """


@pid.command("list")
@config_option
@socket_option
@json_option
def pid_list(config_file: str | None, socket_path: str | None, as_json: bool) -> None:
    """Show every process that the list covers, and why.

    Example: tunsplit pid list
    """
    processes = ask(config_file, socket_path, "pid list")
    if as_json:
        print_json(processes)
        return
    rows = [
        (str(entry["pid"]), str(entry["exe"] or "unknown"), str(entry["user"]), "; ".join(entry["reasons"]))
        for entry in processes
    ]
    print_rows(rows, "no process is on the list")


@pid.command("add", short_help="Exclude a process and what it starts.")
@click.argument("number", metavar="PID", type=click.IntRange(min=1))
@config_option
@socket_option
def pid_add(number: int, config_file: str | None, socket_path: str | None) -> None:
    """Exclude a process and what it starts, whatever mode is set; until it ends.

    Example: tunsplit pid add 4711
    """
    print_warnings(ask(config_file, socket_path, "pid add", pid=number))
    click.echo(f"process {number} is excluded")


@pid.command("remove")
@click.argument("number", metavar="PID", type=click.IntRange(min=1))
@config_option
@socket_option
def pid_remove(number: int, config_file: str | None, socket_path: str | None) -> None:
    """Judge a process by the rules again.

    Example: tunsplit pid remove 4711
    """
    changed = ask(config_file, socket_path, "pid remove", pid=number)["changed"]
    click.echo(f"process {number} is {'no longer' if changed else 'not'} listed by hand")


@pid.command("clear", short_help="Judge every process by the rules again.")
@config_option
@socket_option
def pid_clear(config_file: str | None, socket_path: str | None) -> None:
    """Judge every process by the rules again: root everybody's, others their own.

    Example: tunsplit pid clear
    """
    click.echo(f"no longer listed by hand: {ask(config_file, socket_path, 'pid clear')['count']}")


@main.command()
@config_option
@socket_option
def on(config_file: str | None, socket_path: str | None) -> None:
    """Split again: the list holds as before.

    Example: sudo tunsplit on
    """
    ask(config_file, socket_path, "on")
    click.echo("splitting is on")


@main.command()
@config_option
@socket_option
def off(config_file: str | None, socket_path: str | None) -> None:
    """Send every app through the tunnel, without losing the list.

    Example: sudo tunsplit off
    """
    ask(config_file, socket_path, "off")
    click.echo("splitting is off: every app uses the tunnel")


@main.command(short_help="Read the configuration again, and say what changed.")
@config_option
@socket_option
@json_option
def reload(config_file: str | None, socket_path: str | None, as_json: bool) -> None:
    """Have the daemon read its configuration again, as SIGHUP does, and say what changed or what is wrong.

    What is wrong leaves everything as it was.

    Example: sudo tunsplit reload
    """
    changes = ask(config_file, socket_path, "reload")
    if as_json:
        print_json(changes)
    else:
        click.echo("\n".join(changes) or "nothing changed")


def print_warnings(answer: dict[str, Any]) -> None:
    """Print what the daemon did all the same."""
    for warning in answer["warnings"]:
        click.echo(f"tunsplit: warning: {warning}", err=True)


def print_rows(rows: Iterable[tuple[str, ...]], otherwise: str) -> None:
    """Print rows in columns; names of programs may hold anything, so nothing in them reaches the terminal as such."""
    from tunsplit.config.values import printable

    shown: list[list[str]] = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not shown:
        click.echo(otherwise)
