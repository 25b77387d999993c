"""What a daemon is asked: status, flows, dns, explain."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from tunsplit.cli.base import absolute, ask, config_option, json_option, main, print_json, socket_option

if TYPE_CHECKING:
    from rich.table import Table

WATCH_S = 1.0  # between two pictures of `flows --watch`
APP = {"pid", "exe", "user"}  # what flows and explanations say of an app
PIPE_WIDTH = 200  # columns where there is no terminal to ask: one line a flow


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
    tunnel, uplink, dns, split = answer["tunnel"], answer["uplink"], answer["dns"], answer["split"]
    meaning = {
        "active": "apps are judged",
        "blocked": "tunsplit cannot judge, so nothing leaves",
        "disabled": "splitting is off: every app uses the tunnel",
    }
    interfaces = sorted({name for name in (uplink["interface4"], uplink["interface6"]) if name})
    gateways = [gateway for gateway in (uplink["gateway4"], uplink["gateway6"]) if gateway]
    failure = f": {answer['failure']}" if answer["failure"] else ""
    lines = [
        f"state    {answer['state']}: {meaning.get(answer['state'], '')}{failure}",
        f"mode     {split['mode']}: listed apps use the {'uplink' if split['mode'] == 'exclude' else 'tunnel'}",
        f"tunnel   {tunnel['interface']} {'up' if tunnel['up'] else 'down'} {joined(tunnel['addresses'])}".rstrip(),
        f"uplink   {joined(interfaces) or 'none'} {joined(uplink['addresses'])}".rstrip()
        + (f" via {joined(gateways)}" if gateways else ""),
        f"dns      {dns['platform']}, {dns['setting']}: {'; '.join(map(route_words, dns['routes']))}",
    ]
    counters = {name: value for name, value in answer["counters"].items() if value}
    lines += [f"note     {hint}" for hint in answer["hints"]]
    lines += [f"note     {link_socket_words(one)}" for one in answer["link_sockets"]]
    return [*lines, f"counters {joined(f'{name}={value}' for name, value in counters.items()) or 'all zero'}"]


def route_words(choice: dict[str, Any]) -> str:
    """Return where a class of apps has its questions answered."""
    return joined([choice["app"], "apps", choice["route"], *(one["address"] for one in choice["servers"])])


def link_socket_words(one: dict[str, Any]) -> str:
    """Return who has a socket below IP, and what that means."""
    from tunsplit.config.values import printable

    who = printable(in_words(one["app"])) if one["app"] else "somebody"
    if one["kind"] == "xdp":
        return f"{who} has an XDP socket: what is sent by it passes beside tunsplit and its firewall"
    where = one["interface"] or "every interface"
    return f"{who} has a packet socket on {where}: what is sent by it is no app's"


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

    Questions for names are asked by tunsplit itself, as the table of their platform says: `tunsplit dns` shows where.

    Root sees all flows, members of the control group their own.

    Example: sudo tunsplit flows --watch
    """
    watched("flows", flows_table, config_file, socket_path, as_json=as_json, watch=watch)


@main.command(short_help="Show the latest questions: who asked for what, and who answered.")
@config_option
@socket_option
@json_option
@click.option("--watch", is_flag=True, help="Repeat once a second until Ctrl-C; with --json, one list a line.")
def dns(config_file: str | None, socket_path: str | None, as_json: bool, watch: bool) -> None:
    """Show the latest questions: who asked, on which route, of which resolver, by which row of the table.

    Root sees all questions, members of the control group their own.

    Example: sudo tunsplit dns --watch
    """
    watched("dns", dns_table, config_file, socket_path, as_json=as_json, watch=watch)


def watched(
    verb: str,
    table_of: "Callable[[list[dict[str, Any]]], Table]",
    config_file: str | None,
    socket_path: str | None,
    *,
    as_json: bool,
    watch: bool,
) -> None:
    """Print what the daemon answers to a verb, once or again and again."""

    def pictures() -> Iterator[list[dict[str, Any]]]:
        yield ask(config_file, socket_path, verb)
        while watch:
            time.sleep(WATCH_S)
            yield ask(config_file, socket_path, verb)

    with suppress(KeyboardInterrupt):  # the way to end --watch
        if as_json:
            for answer in pictures():
                print_json(answer)
        else:
            show_tables(map(table_of, pictures()), live=watch)


def show_tables(tables: "Iterator[Table]", *, live: bool) -> None:
    """Print a table, or each of them: on a terminal in its predecessor's place, else one after the other."""
    from rich.console import Console
    from rich.live import Live

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if not live or not console.is_terminal:
        for table in tables:
            console.print(table)
            sys.stdout.flush()  # a pipe's reader wants it now
        return
    with Live(console=console, screen=True, auto_refresh=False) as display:
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
            "see dns" if flow["captured"] else flow["verdict"] or "undecided",
            flow["state"],
            flow["reason"] or "",
            size_of(flow["bytes_out"]),
            size_of(flow["bytes_in"]),
        )
        # Names of programs may hold anything: as Text, they are no markup, and printable() takes the escapes.
        table.add_row(*(Text(printable(word)) for word in words))
    return table


def dns_table(answer: list[dict[str, Any]]) -> "Table":
    """Return questions as a table, the latest first: at the top of a screen that is too small for all."""
    from rich.table import Table
    from rich.text import Text

    from tunsplit.config.values import printable

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("app", "name", "type", "answer", "route", "resolver", "row"):
        table.add_column(heading, overflow="fold")
    table.add_column("ms", justify="right", no_wrap=True)
    for question in reversed(answer):
        app = question["app"] or {}
        words = (
            app.get("exe") or "unknown",
            question["name"],
            question["type"],
            question["rcode"],
            question["route"],
            "cache" if question["cached"] else question["upstream"] or "",
            question["row"],
            f"{question['ms']:.1f}",
        )
        # Names may hold anything, those of programs and those that are asked for alike.
        table.add_row(*(Text(printable(word)) for word in words))
    return table


def size_of(octets: float) -> str:
    """Return a number of bytes as people read it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 1000:
            return f"{octets:.0f} {unit}" if unit == "B" else f"{octets:.1f} {unit}"
        octets /= 1000
    return f"{octets:.1f} TB"


@main.command(short_help="Say how a process, a program or a flow is judged, and why.")
@click.option("--pid", type=click.IntRange(min=1), metavar="PID", help="A process.")
@click.option("--exe", metavar="PATH", help="A program, whether it runs or not.")
@click.option("--proto", metavar="NAME", help="A flow: its protocol, tcp, udp or icmp …")
@click.option("--src", metavar="ADDR:PORT", help="… its source …")
@click.option("--dst", metavar="ADDR:PORT", help="… and its destination.")
@config_option
@socket_option
@json_option
def explain(
    pid: int | None,
    exe: str | None,
    proto: str | None,
    src: str | None,
    dst: str | None,
    config_file: str | None,
    socket_path: str | None,
    as_json: bool,
) -> None:
    """Show the whole chain of judgement about a process, a program or a flow, without sending a packet.

    Root may ask about everything, others about what is theirs.

    Example: tunsplit explain --proto udp --src 10.128.0.1:40000 --dst 192.0.2.1:443
    """
    flow = (proto, src, dst)
    if (pid is not None) + (exe is not None) + any(flow) != 1 or (any(flow) and not all(flow)):
        raise click.UsageError("name one of --pid, --exe, or --proto with --src and --dst")
    question = {
        "pid": pid,
        "exe": None if exe is None else absolute(exe),
        "protocol": proto and proto.lower(),
        "source": src,
        "destination": dst,
    }
    given = {name: value for name, value in question.items() if value is not None}
    answer = ask(config_file, socket_path, "explain", **given)
    if as_json:
        print_json(answer)
    else:
        click.echo("\n".join(explained(answer)))


def explained(answer: dict[str, Any], indent: str = "") -> list[str]:
    """Return a line for each thing said, one for each step of a chain, and more deeply what is said about each."""
    from tunsplit.config.values import printable

    width = max(map(len, answer), default=0)
    lines = []
    for name, value in answer.items():
        head = name
        for item in value if isinstance(value, list) and value else [value]:
            if isinstance(item, dict) and not item.keys() <= APP:
                lines += [f"{indent}{name}", *explained(item, indent + "  ")]
            else:
                lines.append(f"{indent}{head:{width}} {printable(in_words(item))}")
                head = ""
    return lines


def in_words(item: object) -> str:
    """Return an app, a list without items, nothing or a plain value as people read it."""
    match item:
        case {"pid": pid, "exe": exe, "user": user}:
            return f"{exe or 'unknown'}, process {pid} of user {user}"
        case bool():
            return "yes" if item else "no"
        case None | [] | {}:
            return "-"
        case _:
            return str(item)
