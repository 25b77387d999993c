"""`tunsplit lab demo`: one client, twice, as an excluded and as an included app, watched on both sides."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tunsplit.lab import client, dnsclient, dnstrials
from tunsplit.lab.addresses import PICTURE, PUBLIC_RESOLVER
from tunsplit.lab.daemon import Daemon
from tunsplit.lab.dnstrials import DnsOutcome, DnsTrial
from tunsplit.lab.lab import BOTH, Lab, open_lab
from tunsplit.lab.observer import Observer
from tunsplit.lab.resolvers import NAME
from tunsplit.lab.trials import Outcome, Trial, get_exit_code, tabulate

PROTOCOLS = ("tcp", "udp", "icmp")
BRIEF = 132  # columns below which the first table has no room for everything
WIDE = 1000  # columns: more than any table of ours
UNFOLDED = ("app", "destination", "server saw", "answered by")  # on a terminal of 80 columns there is room for these
CLIENT = Path(client.__file__)
DNS_CLIENT = Path(dnsclient.__file__)

NEXT = """\
Try it by hand:
  sudo {0} lab shell            a shell in this network, with tunsplit running
  sudo {0} lab run -- COMMAND   one command in it
Then on your own host: config/wireguard.toml, sudo {0} check, sudo {0} run
"""


async def run(console: Console, platform: str) -> int:
    """Show it all, with this platform's DNS; 0 if every packet was seen where it was expected, else 1."""
    console.print("A throw-away network, in namespaces of its own; yours is not touched.\n")
    console.print(PICTURE, markup=False, highlight=False, soft_wrap=True)
    async with open_lab() as lab:
        console.print(describe_tunnel(lab), markup=False)
        excluded, included = (lab.copy_program("python", f"{word}-client") for word in ("excluded", "included"))
        config = lab.config([excluded])
        console.print(
            Panel(Text(config.strip()), title="tunsplit.toml", title_align="left", expand=False), highlight=False
        )
        async with lab.tunsplit(config) as daemon, lab.observe(lab.internet, "eth0") as internet:
            outcomes = [
                await try_out(lab, internet, program, trial)
                for program in (excluded, included)
                for trial in plan(lab, program, excluded=program == excluded)
            ]
            show(console, tabulate(outcomes, brief=console.width < BRIEF))
            flow = await _get_live_flow(lab, daemon, excluded)
            answered = await ask_all(lab, daemon, platform, included, excluded)
    console.print(
        "One of them again, while it holds its connection open, as tunsplit flows --json has it:", markup=False
    )
    console.print_json(data=flow)
    show(console, dnstrials.tabulate(platform, answered))
    console.print(NEXT.format(_own_name()), markup=False, highlight=False)
    verdicts = [flow is not None, *(outcome.ok for outcome in outcomes), *(outcome.ok for outcome in answered)]
    surprises = verdicts.count(False)
    console.print(
        f"[bold red]{surprises} of {len(verdicts)} did not go as expected.[/]"
        if surprises
        else f"[green]All {len(verdicts)} went as expected.[/]"
    )
    return 1 if surprises else get_exit_code(outcomes)


def show(console: Console, table: Table) -> None:
    """Print a table; where it is too wide for the terminal, folded and without its lines: nothing is cut off."""
    if console.measure(table, options=console.options.update(width=WIDE)).maximum > console.width:
        table.box = None
        table.padding, table.pad_edge = (0, 1, 0, 0), False
        for column in table.columns:
            column.overflow = "fold"
            column.no_wrap = column.header in UNFOLDED
    console.print(table)


def _own_name() -> str:
    """How to call tunsplit: by its name, if that leads to one, else by the path of ours."""
    if shutil.which("tunsplit"):
        return "tunsplit"
    path = str(Path(sys.executable).with_name("tunsplit"))
    return min(path, os.path.relpath(path), key=len)


def describe_tunnel(lab: Lab) -> str:
    """A line on what the tunnel is made of."""
    return {
        "wireguard": "The tunnel is the kernel's WireGuard.",
        "wireguard-go": "The tunnel is WireGuard in user space (wireguard-go).",
        "veth": "There is no WireGuard here (apt install wireguard-tools wireguard-go): a bare veth pair, nothing "
        "encrypted, stands for the tunnel.",
    }[lab.tunnel_kind]


def plan(lab: Lab, program: Path, *, excluded: bool) -> list[Trial]:
    """All that one app is to try, and what is to be seen then."""
    return [
        Trial(
            program.name,
            protocol,
            lab.server(version),
            "uplink" if excluded else "tunnel",
            lab.seen_from_uplink(version) if excluded else lab.seen_from_tunnel(version),
        )
        for protocol in PROTOCOLS
        for version in BOTH
    ]


def _command(program: Path, *words: str, script: Path = CLIENT) -> Sequence[str | os.PathLike[str]]:
    return [program, "-I", "-S", script, *words]


async def try_out(lab: Lab, internet: Observer, program: Path, trial: Trial) -> Outcome:
    """Run the client once, and look on both sides and at the server's wire."""
    observers = (lab.uplink, lab.tunnel, internet)
    for observer in observers:
        observer.clear()
    done = await lab.host.run(_command(program, trial.protocol, str(trial.destination)), env={}, check=False)
    for observer in observers:
        await observer.settle()
    return Outcome(
        trial,
        uplink=len(lab.uplink.seen(address=trial.destination)),
        tunnel=len(lab.tunnel.seen(address=trial.destination)),
        sources=list(dict.fromkeys(
            seen.source
            for seen in internet.seen(destination=trial.destination)
            if seen.source is not None and seen.protocol not in ("arp", "ndp")
        )),
        answer=done.stdout.strip(),
        error=done.stderr.strip() or ("" if done.returncode == 0 else f"exit code {done.returncode}"),
    )  # fmt: skip


async def ask_all(lab: Lab, daemon: Daemon, platform: str, included: Path, excluded: Path) -> list[DnsOutcome]:
    """Every row of a platform's table, one after the other, and both apps' questions in it."""
    outcomes = []
    for setting, cells in dnstrials.TABLE[platform].items():
        lab.rewrite_config(lab.config([excluded], **dnstrials.configure(platform, setting)))
        await daemon.command("reload")
        for program, cell in zip((included, excluded), cells, strict=True):
            outcomes.append(await ask(lab, program, DnsTrial(setting, program.name, cell)))
    return outcomes


async def ask(lab: Lab, program: Path, trial: DnsTrial) -> DnsOutcome:
    """Ask a public resolver by UDP and TCP, IPv4 and IPv6, each time for another name, and look on both sides."""
    answers, names = [], []
    for protocol in ("udp", "tcp"):
        for version in BOTH:
            names.append(f"{program.name}-{trial.setting}-{protocol}{version}.{NAME}")
            command = _command(program, protocol, str(PUBLIC_RESOLVER[version]), names[-1], script=DNS_CLIENT)
            done = await lab.host.run(command, env={}, check=False)
            said = done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}"
            answers.append(dnstrials.ROLE.get(said, said))
    frames = []
    for observer in (lab.uplink, lab.tunnel):
        await observer.settle()
        sent = [seen for seen in observer.seen() if seen.direction == "out"]
        frames.append(sum(any(dnstrials.asks_for(seen, name) for name in names) for seen in sent))
    return DnsOutcome(trial, answers, uplink=frames[0], tunnel=frames[1])


async def _get_live_flow(lab: Lab, daemon: Daemon, program: Path) -> dict[str, Any] | None:
    """A connection of this program, open and on the uplink; None if tunsplit does not tell of it."""
    command = _command(program, "hold", str(lab.server(4)))
    async with lab.host.start(command, stdin=subprocess.PIPE) as holding:
        await holding.wait_written("\n")
        for flow in await daemon.flows():
            if flow["app"] and flow["app"]["pid"] == holding.pid and flow["verdict"] == "uplink":
                return flow
    return None
