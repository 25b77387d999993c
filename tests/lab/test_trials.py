"""The demo's judgement, and its negative controls: a surprise never looks like a success."""

import io
from dataclasses import replace
from ipaddress import ip_address

import pytest
from rich.console import Console

from tunsplit.lab.demo import show
from tunsplit.lab.trials import Outcome, Trial, get_exit_code, tabulate

UPLINK, TUNNEL = ip_address("192.168.50.2"), ip_address("203.0.113.10")
SERVER = ip_address("198.51.100.1")

excluded = Outcome(Trial("excluded-client", "tcp", SERVER, "uplink", UPLINK), 8, 0, [UPLINK], str(UPLINK))
included = Outcome(Trial("included-client", "udp", SERVER, "tunnel", TUNNEL), 0, 2, [TUNNEL], str(TUNNEL))
echo = replace(included, trial=replace(included.trial, protocol="icmp"), answer="")


@pytest.mark.parametrize("outcome", [excluded, included, echo])
def test_what_was_expected_is_ok(outcome):
    assert outcome.ok
    assert 0 == get_exit_code([outcome])


@pytest.mark.parametrize(
    "surprise",
    [
        replace(excluded, uplink=0, tunnel=8),
        replace(excluded, tunnel=1),
        replace(excluded, uplink=0),
        replace(included, uplink=1),
        replace(included, uplink=2, tunnel=0),
        replace(excluded, sources=[TUNNEL]),
        replace(excluded, sources=[UPLINK, TUNNEL]),
        replace(excluded, sources=[]),
        replace(excluded, answer=str(TUNNEL)),
        replace(excluded, answer=""),
        replace(excluded, error="Connection refused"),
        replace(echo, sources=[UPLINK]),
    ],
    ids=str,
)
def test_a_surprise_is_not(surprise):
    assert not surprise.ok
    assert 1 == get_exit_code([excluded, surprise, included])


def test_no_trials_are_no_success():
    assert 1 == get_exit_code([])


def test_the_table_says_what_was_seen():
    console = Console(width=160, file=io.StringIO())
    with console.capture() as capture:
        console.print(tabulate([excluded, replace(included, uplink=1)]))
    lines = capture.get().splitlines()

    (first,) = (line for line in lines if "excluded-client" in line)
    (second,) = (line for line in lines if "included-client" in line)
    assert ["8 packets", "–", "192.168.50.2", "uplink, 192.168.50.2", "yes"] == cells(first)[3:]
    assert ["1 packet", "2 packets", "203.0.113.10", "tunnel, 203.0.113.10", "NO"] == cells(second)[3:]


def test_a_narrow_terminal_loses_nothing_of_it():
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        show(console, tabulate([excluded, included], brief=True))
    lines = capture.get().splitlines()

    (first,) = (line.split() for line in lines if "excluded-client" in line)
    (second,) = (line.split() for line in lines if "included-client" in line)
    assert ["8", "–", "192.168.50.2", "uplink", "yes"] == first[3:]
    assert ["–", "2", "203.0.113.10", "tunnel", "yes"] == second[3:]


def cells(line):
    return [cell.strip() for cell in line.strip("│").split("│")]
