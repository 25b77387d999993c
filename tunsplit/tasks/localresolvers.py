"""Local resolvers: programs of this host that ask in their own name what other apps ask of them.

Theory of operation. Such a program is known by what it does: it holds a socket that takes what comes to port 53, UDP or
TCP, on loopback or any other address of our network namespace. Two kinds take questions by a unix socket instead; these
are known by name, if root owns the program (a name alone is anybody's to take). A fork of one that runs the same
program is one as well: dnsmasq has a child ask for each TCP connection. A service manager is none, though it may hold
the sockets of services that it is to start.

What apps ask of it goes over loopback and is never seen here. So nobody can tell for whom it asks, and policy keeps it
in the tunnel (engine/policy.py). That is asked for each first packet that would leave by the uplink, so it must cost
next to nothing: a dump of port 53 tells the sockets' inodes; as long as they are the same ones, a process that held
none of them holds none now. A process that was never asked about makes a new dump, so a resolver is known from its
first question on: it can answer nobody before it has bound the port. But one that has no sockets besides those that it
asks by is none yet, and to see that costs less. What is passed from one process to another meanwhile is found by
tasks/holders.py, and live flows are judged again.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from ipaddress import ip_address
from pathlib import PurePath
from typing import NamedTuple

from tunsplit.engine.policy import Mode, Policy, Verdict
from tunsplit.engine.rules import Rule, keys_of
from tunsplit.errors import ConfigError
from tunsplit.kernel.descriptors import read_link
from tunsplit.kernel.procfs import Processes
from tunsplit.kernel.procpid import pids
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.process import Process
from tunsplit.tasks.holders import Held

PORT = 53
# How long a dump of the sockets on port 53 is believed for processes that were asked about before: at least, and at
# most; in between so many times as long as it took, which depends on how many sockets there are.
FRESH_S, STALE_S = 0.05, 0.5
REST = 50
KNOWN = 4096  # processes whose answer is kept
PAUSE = 100  # processes looked at by name before the caller may give way

# They take questions by a unix socket, with or without port 53 (nscd(8), systemd-resolved.service(8), nss-resolve(8)).
SERVICES = frozenset({"nscd", "unscd", "systemd-resolved"})
MANAGERS = frozenset({"systemd", "init"})

Key = tuple[int, int]  # pid, start time
Addresses = dict[int, list[str]]  # inode → where it is bound to
Lineage = Callable[[int, int], list[Process]]  # of a pid and start time


class LocalResolver(NamedTuple):
    """A local resolver that runs; `addresses`: where it takes questions on port 53."""

    process: Process
    addresses: tuple[str, ...]

    @property
    def words(self) -> str:
        """As users read it."""
        return f"{_name(self.process) or '?'} ({', '.join([f'pid {self.process.pid}', *self.addresses])})"


class LocalResolvers:
    """The local resolvers of the network namespace that `diag` was made in."""

    def __init__(self, diag: SockDiag, processes: Processes, *, own_pid: int | None = None) -> None:
        """`own_pid`: the process whose sockets are our own stub resolver's; by default this one."""
        self._diag = diag
        self._processes = processes
        self._own_pid = os.getpid() if own_pid is None else own_pid
        self._namespace = read_link("/proc/thread-self/ns/net")
        self._addresses: Addresses = {}  # of the last dump
        self._asked: Addresses = {}  # of the dump whose holders are being looked for
        self._believed_until = float("-inf")
        self._holds: dict[Key, bool] = {}  # as of `_addresses`
        self._listed: tuple[LocalResolver, ...] = ()
        self._listed_for: frozenset[int] | None = None  # inodes
        self._told: set[Key] = set()  # not `_listed`, which whoever asks brings up to date without telling
        self.on_change: Callable[[set[Key]], None] = lambda _: None

    # For each first packet

    def is_resolver(self, process: Process, sockets: Collection[int] = ()) -> bool:
        """Whether this process is a local resolver.

        Args:
            process: as it is now.
            sockets: inodes of some that are not on port 53: those that it asks by.

        Raises:
            KernelError: that cannot be known; nothing may be judged.
        """
        name = _name(process)
        if name is None or name in MANAGERS or process.pid == self._own_pid:
            return False
        if name in SERVICES and process.executable is not None and process.executable.identity.owner == 0:
            return True
        key = _key(process)
        only_asks = key not in self._holds and sockets and self._processes.sockets_of(process.pid).issubset(sockets)
        if only_asks:
            self._remember(key, holds=False)
        elif self._holds_port(key):
            return True
        # Where nobody holds the port nobody is the fork of a resolver; but for who only asks there was no dump.
        may_be_fork = process.parent and (only_asks or self._addresses)
        parent = self._processes.known(process.parent) if may_be_fork else None
        return (
            parent is not None
            and parent.executable is not None
            and process.executable is not None
            and parent.executable.identity == process.executable.identity
            and parent.pid != self._own_pid
            and self._holds_port(_key(parent))
        )

    def _holds_port(self, key: Key) -> bool:
        holds = self._holds.get(key)
        if holds is None or time.monotonic() > self._believed_until:
            self._dump()
            holds = self._holds.get(key)
        if holds is None:
            holds = bool(self._processes.held_of(key[0], set(self._addresses)))
            self._remember(key, holds=holds)
        return holds

    def _remember(self, key: Key, *, holds: bool) -> None:
        if len(self._holds) >= KNOWN:
            self._holds.clear()
        self._holds[key] = holds

    def _dump(self) -> None:
        began = time.monotonic()
        addresses: Addresses = {}
        for bound in self._diag.find_bound(PORT):
            if bound.socket.inode:
                text = str(ip_address(bound.address))
                if text not in addresses.setdefault(bound.socket.inode, []):
                    addresses[bound.socket.inode].append(text)
        if addresses.keys() != self._addresses.keys():
            self._holds.clear()
        self._addresses, now = addresses, time.monotonic()
        self._believed_until = now + min(max(FRESH_S, REST * (now - began)), STALE_S)

    # For people

    def listed(self) -> tuple[LocalResolver, ...]:
        """Every local resolver that runs, by pid.

        Raises:
            KernelError: that cannot be known.
        """
        self._dump()
        if self._listed_for != self._addresses.keys():
            addresses = self._addresses
            held = dict(filter(None, self._processes.scan_all(set(addresses)))) if addresses else {}
            for _ in self._look(addresses, held):
                pass
        return self._listed

    # As an asker of tasks/holders.py

    def wanted_sockets(self) -> set[int]:
        """The sockets on port 53, as inodes.

        Raises:
            KernelError: these cannot be known.
        """
        self._dump()
        self._asked = self._addresses
        return set(self._asked)

    def take_holders(self, held: Held) -> Iterator[None]:
        """Find out who is a local resolver now, and tell who has become one or is none any more.

        Raises:
            KernelError: a process cannot be read.
        """
        yield from self._look(self._asked, held)
        found = {_key(one.process) for one in self._listed}
        if changed := self._told ^ found:
            self._told = found
            self._holds.clear()
            self.on_change(changed)

    def holders_unknown(self) -> None:
        """Leave it: whoever is asked about is looked at, and not judged where that fails."""

    def _look(self, addresses: Addresses, held: Held) -> Iterator[None]:
        """Find out who holds the sockets of a dump, and who is a service; None now and then, to give way."""
        found: dict[int, list[str]] = {}
        for inode, texts in addresses.items():
            for pid, _ in held.get(inode, ()):
                found.setdefault(pid, []).extend(texts)
        for number, pid in enumerate(pids()):
            if self._is_service(pid):
                found.setdefault(pid, [])
            if number % PAUSE == 0:
                yield None
        resolvers = []
        for pid in sorted(found):
            process = self._processes.read(pid)
            if process is not None and self._is_listed(process):
                resolvers.append(LocalResolver(process, tuple(sorted(set(found[pid])))))
        self._listed, self._listed_for = tuple(resolvers), frozenset(addresses)

    def _is_service(self, pid: int) -> bool:
        path = read_link(f"/proc/{pid}/exe")
        is_named = path is not None and PurePath(path.removesuffix(" (deleted)")).name in SERVICES
        return is_named and read_link(f"/proc/{pid}/ns/net") == self._namespace

    def _is_listed(self, process: Process) -> bool:
        name = _name(process)
        return name is not None and name not in MANAGERS and process.pid != self._own_pid

    def refuse_covering(self, policy: Policy, lineage: Lineage | None = None) -> None:
        """Refuse a policy that would take a local resolver beside the tunnel without having been told to.

        Args:
            policy: what is to be in force.
            lineage: a process and its ancestors, nearest first; None: as /proc shows them.

        Raises:
            ConfigError: one of its rules covers one, and none that does says `force`.
        """
        for resolver, rules in self.covered(policy, lineage):
            if not any(rule.force for rule in rules):
                raise ConfigError(
                    f"[[app]] #{rules[0].number} ({rules[0].label}): found a rule that covers {resolver.words}, "
                    "a local resolver; beside the tunnel it would ask there for the names of included apps. Expected a "
                    "rule that leaves it out, or, if this is meant, `force = true` (`tunsplit app add --force`)"
                )

    def covered(self, policy: Policy, lineage: Lineage | None = None) -> Iterator[tuple[LocalResolver, list[Rule]]]:
        """The local resolvers that rules would take beside the tunnel, with these rules; arguments as above."""
        if policy.mode is Mode.INCLUDE or not policy.rules:
            return
        self._processes.keys |= keys_of(policy.all_rules)  # read for the rules in force, and for these
        for resolver in self.listed():
            line = (lineage or self._lineage)(*_key(resolver.process))
            line = [self._processes.read(one.pid) or one for one in line] or [resolver.process]
            if rules := list(_covering(policy.rules, line)):
                yield resolver, rules

    def _lineage(self, pid: int, _: int) -> list[Process]:
        line: list[Process] = []
        while pid and (process := self._processes.read(pid)) is not None:
            line.append(process)
            pid = process.parent
        return line

    def hints(self, mode: Mode, judge: Callable[[Process], Verdict]) -> list[str]:
        """What users are to know about the local resolvers that run: whose names are resolved on which side."""
        excluded, included = (
            ("excluded apps", "included apps") if mode is Mode.EXCLUDE else ("apps that are not listed", "listed apps")
        )
        hints = []
        for one in self._listed:
            if judge(one.process) is Verdict.UPLINK:
                hints.append(f"the local resolver {one.words} is beside the tunnel: it asks there in the name of "
                             f"{included} too, whose names are so resolved outside")  # fmt: skip
            else:
                hints.append(f"the local resolver {one.words} asks in the name of {excluded} too: their names are "
                             "resolved in the tunnel")  # fmt: skip
        return hints


def _covering(rules: Iterable[Rule], line: list[Process]) -> Iterator[Rule]:
    """The rules that list a process; `line`: itself and its ancestors."""
    for rule in rules:
        if any(rule.claims(one) for one in (line if rule.inherit else line[:1])):
            yield rule


def _name(process: Process) -> str | None:
    return process.executable.path.rpartition("/")[2] if process.executable else None


def _key(process: Process) -> Key:
    return process.pid, process.start_time
