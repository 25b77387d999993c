"""The keys of an `[[app]]` entry: what each asks of a process, and what it proves.

| key | says | who can make it true for a program of theirs |
|-|-|-|
| path | which file runs | nobody, without the right to write that file (below) |
| user | the effective user | nobody, without the right to become that user |
| cgroup | where the process was put | who may write `cgroup.procs` there: root, or who a part was delegated to |
| name | what the file is called | anybody: a copy may have any name |
| cmdline | the arguments | anybody, at any moment: they lie in the process's own memory |

So `name` and `cmdline` tell programs apart that mean no harm; they prove something only beside a key that does:
the interpreter's `path`, or the `user`. Parts are delegated above all to users: each one's own systemd has his.

A path alone proves nothing: in a mount namespace of one's own, anything can be mounted at
/usr/bin/firefox. A path counts when the file that lies there in our namespace is the file that runs. In
another user namespace even that can be forged, and no path counts; the other keys do, since the name needs no
forging there and the kernel itself answers for user and cgroup.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from tunsplit.process import Executable, FileIdentity, Process

WILDCARD = re.compile(r"[*?[]")
# The parts of a glob, the longest first: directories of any depth · anything · a name's rest · a character · a set
GLOB = re.compile(r"/\*\*/|\*\*|\*|\?|\[!?\]?[^]/]*\]|.", re.DOTALL)


class Matcher(Protocol):
    """One key of an `[[app]]` entry."""

    def matches(self, process: Process) -> bool:
        """Whether the process is what the key says."""


@dataclass(frozen=True, slots=True)
class PathRule:
    """`path`, exact or glob.

    `resolved` is the same path with its symlinks followed (a glob's up to its first wildcard), which is how
    the kernel names a program. `identity` is the file that an exact path led to.
    """

    path: str
    resolved: str
    identity: FileIdentity | None
    _glob: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        both = "|".join((glob_regex(self.path), glob_regex(self.resolved)))
        object.__setattr__(self, "_glob", re.compile(both, re.DOTALL) if WILDCARD.search(self.path) else None)

    def matches(self, process: Process) -> bool:
        """Whether this is the program that the process runs."""
        executable = process.executable
        # In another user namespace /proc/PID/exe can be forged whole, identity and all (prctl(2), PR_SET_MM_MAP).
        if executable is None or not process.is_own_user_namespace:
            return False
        if self._glob is not None:
            named = self._glob.fullmatch(executable.path) is not None
        elif self.identity is not None and executable.identity == self.identity:
            return True  # the very file, whatever name it was started by
        else:
            # Not the file that the rule knows: replaced since, before the process started or after.
            named = executable.path in (self.path, self.resolved)
        return named and is_genuine(executable)


@dataclass(frozen=True, slots=True)
class NameRule:
    """`name`, the last part of the executable's path as it was started, symlinks followed; never `comm`."""

    name: str

    def matches(self, process: Process) -> bool:
        """Whether the process's program is called so, wherever it lies."""
        executable = process.executable
        return executable is not None and executable.path.rpartition("/")[2] == self.name


@dataclass(frozen=True)
class CmdlineRule:
    """`cmdline`, a regular expression that is found somewhere in the arguments joined by spaces.

    The pattern is the administrator's, the text a stranger's: one that can match in many ways (`(a+)+`,
    `.*a.*b.*c`) can be made to take long over 4 KiB, and nobody else is judged meanwhile.
    """

    pattern: str

    @cached_property
    def _search(self) -> Callable[[str], re.Match[str] | None]:
        return re.compile(self.pattern).search

    def matches(self, process: Process) -> bool:
        """Whether the process shows such arguments now."""
        return process.cmdline is not None and self._search(process.cmdline) is not None


@dataclass(frozen=True, slots=True)
class UserRule:
    """`user`, the effective uid as of now.

    Beware of inheritance: everybody descends from processes of root, so that a rule on root alone claims them all,
    unless it says `inherit = false`.
    """

    uid: int

    def matches(self, process: Process) -> bool:
        """Whether the process acts for this user."""
        return process.uid == self.uid


@dataclass(frozen=True)
class CgroupRule:
    """`cgroup`, a glob over the whole path; one without a leading slash is found at any depth.

    A unit's own sub-groups take a glob of their own: `/system.slice/x.service/**`. The path is as seen from the
    daemon's cgroup namespace; outside its root it begins with `/..`, which no glob without those dots matches.
    """

    glob: str

    @cached_property
    def _fullmatch(self) -> Callable[[str], re.Match[str] | None]:
        anywhere = "" if self.glob.startswith("/") else "/**/"
        # What is outside is nobody that the administrator of this namespace has sorted.
        outside = "" if self.glob.startswith("/..") else r"(?!/\.\.(?:/|\Z))"
        return re.compile(outside + glob_regex(anywhere + self.glob), re.DOTALL).fullmatch

    def matches(self, process: Process) -> bool:
        """Whether the process is in such a group now."""
        return process.cgroup is not None and self._fullmatch(process.cgroup) is not None


@dataclass(frozen=True)
class UnitRule:
    """A unit of the system's own service manager, in whatever slice: below a service, groups are its own to make."""

    unit: str

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?:/[^/]+\.slice)*/{re.escape(self.unit)}(?:/.*)?", re.DOTALL)

    def matches(self, process: Process) -> bool:
        """Whether the process is in the unit's control group, or below it, now."""
        return process.cgroup is not None and self._pattern.fullmatch(process.cgroup) is not None


# By what each kind of matcher judges: the keys of the configuration.
KEYS: dict[type, str] = {
    PathRule: "path",
    NameRule: "name",
    CmdlineRule: "cmdline",
    UserRule: "user",
    CgroupRule: "cgroup",
    UnitRule: "cgroup",
}


def is_genuine(executable: Executable) -> bool:
    """Whether its path may be believed.

    A deleted executable (upgraded, above all) is nowhere to be compared with. What still holds: it lies on the
    same device as what replaced it and belongs to the same user. Without the right of that user nobody can
    bring a file of theirs on that device under that name, in whatever mount namespace.
    """
    running, there = executable.identity, executable.path_identity
    if running == there:
        return True
    return executable.deleted and there is not None and (running.device, running.owner) == (there.device, there.owner)


def glob_regex(glob: str) -> str:
    """Translate: `**` crosses slashes (`/**/` is also one slash), `*`, `?` and `[…]` do not."""
    return "".join(_translate(part) for part in GLOB.findall(glob))


def fixed_part(path: str) -> str:
    """The directories of a glob before its first wildcard; an exact path whole."""
    wildcard = WILDCARD.search(path)
    return path if wildcard is None else path[: path.rindex("/", 0, wildcard.start())]


def path_rule(path: str, identify: Callable[[str], FileIdentity | None], resolve: Callable[[str], str]) -> PathRule:
    """The matcher of a path as it leads now. `resolve` follows symlinks; `identify` names the file at the end."""
    fixed = fixed_part(path)
    identity = identify(path) if fixed == path else None
    return PathRule(path, resolve(fixed) + path[len(fixed) :], identity)


def _translate(part: str) -> str:
    match part:
        case "/**/":
            return "/(?:.*/)?"
        case "**":
            return ".*"
        case "*":
            return "[^/]*"
        case "?":
            return "[^/]"
    return _translate_set(part) if len(part) > 1 else re.escape(part)


def _translate_set(part: str) -> str:
    negated, members = part[1] == "!", part[1:-1].removeprefix("!")
    # What re keeps for set operations is a plain character here; a range may be backwards, and then holds nothing.
    members = re.sub(r"([\\\[\]^&~|])", r"\\\1", members).replace("--", r"-\-")
    translated = f"(?!/)[{'^' if negated else ''}{members}]"
    try:
        re.compile(translated)
    except re.error:
        return "(?!)"
    return translated
