"""A family that is told event by event, for tests of the process tree."""

from dataclasses import dataclass

from tunsplit.engine.processes import ProcessTree
from tunsplit.engine.reasons import Mark
from tunsplit.engine.rules import Rule
from tunsplit.process import Executable, FileIdentity, Process

SH, FIREFOX, STEAM, CURL = "/bin/sh", "/usr/bin/firefox", "/usr/bin/steam", "/usr/bin/curl"
PROGRAMS = (SH, FIREFOX, STEAM, CURL)
USER = 1000

EXCLUDED, INCLUDED = Mark.EXCLUDED, Mark.INCLUDED


@dataclass(frozen=True)
class Runs:
    path: str

    def matches(self, process):
        return process.executable is not None and process.executable.path == self.path


def rule_for(path, number=1, *, inherit=True):
    return Rule(number, path, (Runs(path),), inherit)


firefox, steam = rule_for(FIREFOX), rule_for(STEAM, 2)


def runs(pid, path, parent=1, start_time=None, **traits):
    executable = (
        Executable(path, False, (identity := FileIdentity(1, hash(path) & 0xFFFF, 0)), identity) if path else None
    )
    return Process(pid, pid if start_time is None else start_time, parent, USER, executable, **traits)


INIT = runs(1, SH, parent=0)


class Story:
    """A tree with an init, told what happens line by line; time is the number of the line, pids are start times."""

    def __init__(self, *rules, others=()):
        self.tree = ProcessTree(rules)
        self.tree.picture([INIT, *others])
        self.parents = {}

    def fork(self, parent, child):
        self.tree.fork(parent, child, child)
        self.parents[child] = parent

    def bear_unread(self, parent, child):
        """A child of init's runs a program that nobody has looked at, and has a child itself."""
        self.fork(1, parent)
        self.tree.exec(parent, parent)
        self.fork(parent, child)

    def exec(self, pid, path):
        self.tree.exec(pid, 10_000)
        self.look(pid, path)

    def look(self, pid, path, *, parent=None, **traits):
        self.tree.take_unread()
        shown = self.parents.get(pid, 1) if parent is None else parent
        return self.tree.look(runs(pid, path, shown, **traits), self.tree.image(pid))

    def exit(self, pid):
        self.tree.exit(pid, pid, 10_000)

    def words(self, pid):
        reasons = self.tree.reasons(pid, pid)
        return None if reasons is None else [reason.words for reason in reasons]
