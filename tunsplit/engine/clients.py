"""Who is the VPN's client: `[tunnel] client`, executables and systemd units.

Whoever counts as the client has the uplink while the tunnel is down, so an entry asks for several traits together,
none of which an unprivileged program can have:

    executable   the very file (engine/matchers.py), root's, run by root or by the owner of the transport
    unit         a control group that systemd made for a unit of the system's

Nothing is inherited: what the client starts is judged like any other app. A unit has its processes by the control
group, also those that it starts, since only root puts processes there. The groups of a user's own units lie below his
service manager's, which is no slice.
"""

from dataclasses import dataclass

from tunsplit.engine.matchers import Matcher, UnitRule
from tunsplit.engine.rules import Rule
from tunsplit.process import Process

ROOT = 0


@dataclass(frozen=True, slots=True)
class RootsFile:
    """The executable that runs is a file of root's."""

    def matches(self, process: Process) -> bool:
        """Whether it is."""
        return process.executable is not None and process.executable.identity.owner == ROOT


@dataclass(frozen=True, slots=True)
class ActsFor:
    """One of some users, by the effective uid as of now, in our own user namespace."""

    uids: frozenset[int]

    def matches(self, process: Process) -> bool:
        """Whether the process acts for one of them."""
        return process.uid in self.uids and process.is_own_user_namespace


def client_of_path(number: int, path: str, matcher: Matcher, transport_uid: int) -> Rule:
    """The rule of an executable; `matcher` is its path's."""
    users = ActsFor(frozenset({ROOT, transport_uid}))
    return Rule(number, path, (matcher, RootsFile(), users), inherit=False, client=True)


def client_of_unit(number: int, unit: str) -> Rule:
    """The rule of a unit."""
    return Rule(number, unit, (UnitRule(unit),), inherit=False, client=True)
