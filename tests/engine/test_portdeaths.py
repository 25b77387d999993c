"""Who has a port now is not believed while a dead socket may be the sender."""

import pytest

from tunsplit.engine import portdeaths
from tunsplit.engine.portdeaths import TURNS, PortDeaths

P, Q = b"\x13\x88", b"\x13\x89"
ONE, OTHER = b"one     ", b"another "


@pytest.fixture
def deaths():
    return PortDeaths()


def full_turns(deaths, number=TURNS, held=()):
    for _ in range(number):
        deaths.carried(emptied=False, held=held)


def test_a_port_without_a_death_is_not_in_doubt(deaths):
    deaths.note(Q, ONE)
    assert not deaths.doubts(P, {OTHER})
    assert not deaths.doubts(P, {OTHER}, held=True)


def test_a_death_casts_doubt_on_whoever_is_found_but_the_dead(deaths):
    deaths.note(P, ONE)
    assert [True, True, False] == [deaths.doubts(P, known) for known in ({OTHER}, {None}, {OTHER, ONE})]
    deaths.note(P, OTHER)
    assert deaths.doubts(P, {ONE})


def test_an_empty_tun_ends_all_doubt(deaths):
    deaths.note(P, ONE)
    deaths.note_unknown()
    full_turns(deaths)
    deaths.note(P, ONE)
    assert deaths
    deaths.carried(emptied=True, held=())
    assert not deaths.doubts(P, {OTHER})
    assert not deaths


def test_a_tun_that_is_never_empty_ends_it_when_all_that_it_held_has_been_carried(deaths):
    deaths.note(P, ONE)
    full_turns(deaths, 2 * TURNS - 1)
    assert deaths.doubts(P, {OTHER})
    full_turns(deaths, 1)
    assert not deaths.doubts(P, {OTHER})


@pytest.mark.parametrize("emptied", [True, False])
def test_for_what_is_held_its_ports_dead_are_kept_and_for_nothing_else(deaths, emptied):
    for port in (P, Q):
        deaths.note(port, ONE)
    for _ in range(2):
        deaths.carried(emptied=True, held=[P]) if emptied else full_turns(deaths, held=[P])
    assert [True, False] == [deaths.doubts(port, {OTHER}, held=True) for port in (P, Q)]
    assert not deaths.doubts(P, {OTHER})
    assert deaths
    deaths.carried(emptied=True, held=[])
    assert not deaths


@pytest.mark.parametrize("held", [False, True])
def test_when_nobody_knows_who_died_every_port_is_in_doubt(deaths, held):
    deaths.note_unknown()
    assert deaths.doubts(P, {ONE}, held=held)
    full_turns(deaths, TURNS, [P])
    assert deaths.doubts(P, {ONE}, held=held)
    full_turns(deaths, TURNS, [P])
    assert deaths.doubts(P, {ONE}, held=held) is held
    assert not deaths.doubts(Q, {ONE}, held=held)


def test_more_deaths_than_are_remembered_may_be_anybodys(deaths, monkeypatch):
    monkeypatch.setattr(portdeaths, "MOST", 3)
    for number in range(3):
        deaths.note(number.to_bytes(2, "big"), ONE)
    assert not deaths.doubts(P, {OTHER})
    deaths.note(Q, ONE)
    assert deaths.doubts(P, {OTHER})
