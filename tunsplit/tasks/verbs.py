"""What the control socket can change: the list, processes by hand, splitting as a whole; and what it explains.

Theory of operation. Who may connect at all is decided by the socket's file and [control] group (tasks/control.py).
What he may do then is the table RIGHTS:

    MEMBER   root, and every member of the group: what is said about programs, or about splitting as a whole. A rule
             names a program for all its users, so a member decides for others too. That is what the group is for: who
             must not decide so is not to be in it.
    OWN      of one's own: members for processes and flows of their own user, root for everybody's. Where another user
             connects to, and with which program, is his and root's to know; which side his program takes by a process
             id, likewise.
    ONESELF  the process that asks, proved to be it. A pid would be a claim; what the kernel says of the connection is
             none (kernel/peer.py). Neither uid nor program counts: a process may give to itself what it inherits
             to its children anyway.

A process is somebody's own if all its user ids are his: one that has or could take up other rights is not.
Verbs are answered one at a time and at once, so that no two commands mix; each has taken effect when it is answered.
"""

import logging
import re
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from tunsplit.config.saving import checked_path
from tunsplit.errors import PermissionMissing, TunsplitError
from tunsplit.kernel.peer import Subject, look
from tunsplit.kernel.procpid import why_no_program
from tunsplit.tasks.control import Request

Right = Enum("Right", "MEMBER OWN ONESELF")

RIGHTS = {
    "status": Right.MEMBER,
    "flows": Right.OWN,
    "dns": Right.OWN,
    "exec": Right.ONESELF,
    "app list": Right.MEMBER,
    "app add": Right.MEMBER,
    "app remove": Right.MEMBER,
    "app clear": Right.MEMBER,
    "pid list": Right.OWN,
    "pid add": Right.OWN,
    "pid remove": Right.OWN,
    "pid clear": Right.OWN,
    "on": Right.MEMBER,
    "off": Right.MEMBER,
    "reload": Right.MEMBER,
    "explain": Right.OWN,
}

PIDS = range(1, 1 << 22 | 1)  # PID_MAX_LIMIT (include/linux/threads.h)
GLOB = re.compile(r"[*?\[]")
EXPLAINED = ("pid", "exe", "protocol", "source", "destination")

Json = dict[str, object]

logger = logging.getLogger(__name__)


class Switching(Protocol):
    """What the verbs ask of who carries them out. Each call has taken effect when it returns.

    "Taken effect" means that no packet of a switched app can take its old side any more (SPEC L2, L3).
    """

    def apps(self) -> list[Json]:
        """The list: `path` and whatever else a rule has; `rule` (its number or None), `saved`, `matches` (pids)."""
        ...

    def add_app(self, path: str, *, force: bool = False) -> bool:
        """Put a path on the list; False: it was there. ConfigError: it covers a local resolver, and not by `force`."""
        ...

    def hints(self) -> list[str]:
        """What is to be known of the local resolvers that run."""
        ...

    def remove_app(self, path: str) -> bool:
        """Take a path off the list; False: it was not there."""
        ...

    def clear_apps(self) -> int:
        """Empty the list; return how many there were."""
        ...

    def pids(self) -> list[Json]:
        """Every listed process: `pid`, `exe`, `user` (uid), `reasons` (texts)."""
        ...

    def add_pid(self, pid: int, start_time: int, *, included: bool = False) -> None:
        """Exclude (or include) a process by hand; TunsplitError if this one is not there any more."""
        ...

    def descendants(self, pid: int) -> tuple[int, int]:
        """How many living processes descend from this one, and how many there are; but for kernel threads."""
        ...

    def remove_pid(self, pid: int) -> bool:
        """Forget what was said about a process by hand; False: nothing was."""
        ...

    def clear_pids(self) -> int:
        """Forget all that was said by hand; return about how many processes."""
        ...

    def set_enabled(self, enabled: bool) -> None:
        """Switch splitting on or off."""
        ...

    def reload(self) -> list[str]:
        """Read the configuration again and say what changed; what it raises leaves everything as it was."""
        ...

    def explain(
        self, *, pid: int | None, exe: str | None, protocol: str | None, source: str | None, destination: str | None
    ) -> Json:
        """Judge without a packet.

        `app` is the process in question as flows have it ({"pid", "exe", "user"}) or None; `holders`, if there, are all
        whose socket it is, in the same way.
        """
        ...


class Verbs:
    """Answers the verbs that change something, and `explain`.

    Args:
        switching: who carries them out.
        config_file: the file that the daemon was started with; the client is told, so that `--save` finds it.
        look: what a pid's process is now.
    """

    def __init__(self, switching: Switching, config_file: str, *, look: Callable[[int], Subject | None] = look) -> None:
        self._switching = switching
        self._config_file = str(Path.cwd() / config_file)
        self._look = look

    def verbs(self) -> Mapping[str, Callable[[Request], object]]:
        """What can be asked, by verb."""
        return {
            "exec": self.exec,
            "app list": self.app_list,
            "app add": self.app_add,
            "app remove": self.app_remove,
            "app clear": self.app_clear,
            "pid list": self.pid_list,
            "pid add": self.pid_add,
            "pid remove": self.pid_remove,
            "pid clear": self.pid_clear,
            "on": lambda request: self._enable(request, True),
            "off": lambda request: self._enable(request, False),
            "reload": self.reload,
            "explain": self.explain,
        }

    def exec(self, request: Request) -> Json:
        """Exclude the process that asks, or include it."""
        included = argument(request, "include", bool, False)
        subject = request.prove()
        self._switching.add_pid(subject.pid, subject.start_time, included=included)
        _log(request, pid=subject.pid, included=included)
        return {"pid": subject.pid}

    def app_list(self, _: Request) -> Json:
        """The list, and the file that `--save` would write it to."""
        return {"apps": self._switching.apps(), "file": self._config_file}

    def app_add(self, request: Request) -> Json:
        """Put a path on the list. One that is not there is a warning: it may come with an upgrade, or be a glob."""
        path = checked_path(argument(request, "path", str))
        force = argument(request, "force", bool, False)
        changed = self._switching.add_app(path, force=force)
        _log(request, path=path, changed=changed, force=force)
        lack = None if GLOB.search(path) else why_no_program(path)
        warnings = [f"{path} {lack}, so it matches nothing yet"] if lack else []
        return {"changed": changed, "warnings": warnings, "hints": self._switching.hints()}

    def app_remove(self, request: Request) -> Json:
        """Take a path off the list."""
        path = checked_path(argument(request, "path", str))
        changed = self._switching.remove_app(path)
        _log(request, path=path, changed=changed)
        return {"changed": changed}

    def app_clear(self, request: Request) -> Json:
        """Empty the list."""
        count = self._switching.clear_apps()
        _log(request, count=count)
        return {"count": count}

    def pid_list(self, request: Request) -> list[Json]:
        """Every listed process that the asker may know of."""
        return [entry for entry in self._switching.pids() if _may_see(request, entry)]

    def pid_add(self, request: Request) -> Json:
        """Exclude a process by hand. That most others descend from it (an init, a service manager) is a warning."""
        pid = pid_argument(request)
        subject = self._look(pid)
        if subject is None:
            raise TunsplitError(f"there is no process {pid}")
        _require_right(request, subject)
        if subject.leader != pid:
            raise TunsplitError(f"{pid} is a thread of process {subject.leader}: name the process")
        self._switching.add_pid(pid, subject.start_time)
        _log(request, pid=pid)
        below, everybody = self._switching.descendants(pid)
        most = f"{below} of {everybody} processes descend from process {pid}, and are excluded with it"
        return {"changed": True, "warnings": [most] if 2 * below > everybody else []}

    def pid_remove(self, request: Request) -> Json:
        """Forget what was said about a process by hand."""
        pid = pid_argument(request)
        if (subject := self._look(pid)) is not None:
            _require_right(request, subject)
        changed = self._switching.remove_pid(pid)
        _log(request, pid=pid, changed=changed)
        return {"changed": changed}

    def pid_clear(self, request: Request) -> Json:
        """Forget all that was said by hand, about processes that are the asker's own."""
        if request.credentials.is_root:
            count = self._switching.clear_pids()
        else:
            own = [subject.pid for subject in self._listed() if _may_name(request, subject)]
            count = sum(map(self._switching.remove_pid, own))
        _log(request, count=count)
        return {"count": count}

    def reload(self, request: Request) -> list[str]:
        """Read the configuration again; what changed, in words."""
        changes = self._switching.reload()
        _log(request, changes=len(changes))
        return changes

    def explain(self, request: Request) -> Json:
        """The whole chain of judgement about a process, a program or a flow."""
        pid = pid_argument(request) if "pid" in request.arguments else None
        texts = {name: argument(request, name, str, None) for name in EXPLAINED[1:]}
        flow = [texts[name] for name in ("protocol", "source", "destination")]
        if (pid is not None) + (texts["exe"] is not None) + any(flow) != 1 or (any(flow) and not all(flow)):
            raise TunsplitError("explain: expected one of a pid, an exe, or protocol, source and destination")
        answer = self._switching.explain(
            pid=pid,
            exe=None if texts["exe"] is None else checked_path(texts["exe"]),
            protocol=texts["protocol"],
            source=texts["source"],
            destination=texts["destination"],
        )
        # Asked about a program, it says what the rules would do: nothing about anybody's process.
        if texts["exe"] is None and not all(_may_see(request, one) for one in (answer.get("app"), *_holders(answer))):
            raise PermissionMissing("explain: only root may ask about others' processes and flows")
        return answer

    def _enable(self, request: Request, enabled: bool) -> Json:
        self._switching.set_enabled(enabled)
        _log(request)
        return {"enabled": enabled}

    def _listed(self) -> list[Subject]:
        looks = (self._look(pid) for entry in self._switching.pids() if isinstance(pid := entry["pid"], int))
        return [subject for subject in looks if subject is not None]


def on_hangup(switching: Switching) -> None:
    """Reload because of SIGHUP: nobody waits for the answer, so it goes to the log."""
    try:
        changes = switching.reload()
    except TunsplitError as error:
        logger.error("reload failed, the configuration in force stays: %s", error)
    else:
        logger.info("reloaded", extra={"changes": "; ".join(changes) or "none"})


def argument(request: Request, name: str, kind: type, *default: object) -> Any:
    """Return an argument of a request; TunsplitError if it is of another kind, or absent and without default."""
    value = request.arguments.get(name, *default)
    if value is None and default:
        return None
    if type(value) is not kind:  # True is an int
        raise TunsplitError(f"{request.verb}: {name}: found {value!r:.60}, expected {kind.__name__}")
    return value


def pid_argument(request: Request) -> int:
    """Return the argument `pid`; TunsplitError if no process can have it."""
    pid: int = argument(request, "pid", int)
    if pid not in PIDS:
        raise TunsplitError(f"{request.verb}: pid: found {pid!r:.60}, expected a number from 1 to {PIDS[-1]}")
    return pid


def _holders(answer: Json) -> list[object]:
    holders = answer.get("holders")
    return holders if isinstance(holders, list) else []


def _may_see(request: Request, app: object) -> bool:
    """Whether the asker may hear of an app as flows have it; None: nobody knows whose it is."""
    user = app.get("user") if isinstance(app, dict) else None
    return RIGHTS[request.verb] is not Right.OWN or request.credentials.may_see(user)


def _may_name(request: Request, subject: Subject) -> bool:
    credentials = request.credentials
    return RIGHTS[request.verb] is not Right.OWN or credentials.is_root or subject.uids == {credentials.uid}


def _require_right(request: Request, subject: Subject) -> None:
    if not _may_name(request, subject):
        raise PermissionMissing(f"process {subject.pid} is not yours: only root may name others' processes")


def _log(request: Request, **what: object) -> None:
    """Say who changed what: a list that anybody of a group may change needs to be answered for."""
    credentials = request.credentials
    logger.info("%s", request.verb, extra={"by_pid": credentials.pid, "by_uid": credentials.uid, **what})
