"""The demo's judgement of DNS, and its negative controls: a surprise never looks like a success."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from tunsplit.lab.dnsclient import encode_name
from tunsplit.lab.dnstrials import DnsOutcome, DnsTrial, asks_for, tabulate
from tunsplit.lab.frames import Seen

outside = DnsOutcome(DnsTrial("public", "excluded-client", ("public", "uplink")), ["public"] * 4, 4, 0)
inside = DnsOutcome(DnsTrial("default", "included-client", ("relay", "tunnel")), ["relay"] * 4, 0, 5)
refused = DnsOutcome(DnsTrial("private", "included-client", None), ["REFUSED"] * 4, 0, 0)


@pytest.mark.parametrize("outcome", [outside, inside, refused])
def test_what_was_expected_is_ok(outcome):
    assert outcome.ok


@pytest.mark.parametrize(
    "surprise",
    [
        replace(outside, tunnel=1),
        replace(outside, uplink=0, tunnel=4),
        replace(outside, uplink=3),
        replace(outside, answers=["public"] * 3 + ["relay"]),
        replace(outside, answers=[]),
        replace(inside, uplink=1),
        replace(inside, answers=["SERVFAIL"] * 4),
        replace(refused, uplink=1),
        replace(refused, tunnel=1),
        replace(refused, answers=["relay"] * 4),
    ],
    ids=str,
)
def test_a_surprise_is_not(surprise):
    assert not surprise.ok


def test_a_name_is_found_in_any_case_and_in_what_an_error_quotes():
    question = Seen("udp", payload=bytes(12) + encode_name("A.wHO.is") + bytes(4))
    assert asks_for(question, "a.who.is")
    assert asks_for(Seen("icmp", quoted=question), "a.who.is")
    assert not asks_for(question, "b.who.is")


def test_the_table_says_what_was_seen():
    console = Console(width=160, file=io.StringIO())
    with console.capture() as capture:
        console.print(tabulate("linux", [outside, replace(inside, uplink=1), refused]))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capture.get().splitlines()[4:-1]]

    assert [
        ["a public one", "excluded-client", "public, uplink", "public", "4 packets", "–", "yes"],
        ["none", "included-client", "relay, tunnel", "relay", "1 packet", "5 packets", "NO"],
        ["a private one", "included-client", "refused: not supported", "REFUSED", "–", "–", "yes"],
    ] == rows
