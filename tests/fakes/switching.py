"""Who carries out what the control socket is told, without a network: remembers, and does it at once."""

from typing import Any

from tunsplit.errors import ConfigError, TunsplitError

Json = dict[str, Any]


class FakeSwitching:
    """The list as paths, processes by hand as (pid, start time), and every call in order."""

    def __init__(self) -> None:
        self.paths: dict[str, bool] = {"/usr/bin/firefox": True}  # whether saved
        self.processes: list[Json] = []
        self.by_hand: dict[int, tuple[int, bool]] = {}
        self.below: dict[int, int] = {}  # how many of ten descend from it
        self.enabled = True
        self.wrong: str | None = None  # what is wrong with the configuration
        self.resolver = "/usr/sbin/dnsmasq"
        self.asked: list[Json] = []
        self.answer: Json = {"verdict": "uplink", "app": None}

    def apps(self) -> list[Json]:
        rules = enumerate(self.paths.items(), 1)
        return [{"rule": number, "path": path, "saved": saved, "matches": []} for number, (path, saved) in rules]

    def add_app(self, path: str, *, force: bool = False) -> bool:
        if path == self.resolver and not force:
            raise ConfigError(f"{path} covers a local resolver")
        new = path not in self.paths
        self.paths.setdefault(path, False)
        return new

    def hints(self) -> list[str]:
        return ["names are resolved in the tunnel"] if self.resolver in self.paths else []

    def remove_app(self, path: str) -> bool:
        return self.paths.pop(path, None) is not None

    def clear_apps(self) -> int:
        count = len(self.paths)
        self.paths.clear()
        return count

    def pids(self) -> list[Json]:
        return self.processes

    def add_pid(self, pid: int, start_time: int, *, included: bool = False) -> None:
        if pid == 1:
            raise TunsplitError("process 1 has ended")
        self.by_hand[pid] = (start_time, included)

    def descendants(self, pid: int) -> tuple[int, int]:
        return self.below.get(pid, 0), 10

    def remove_pid(self, pid: int) -> bool:
        return self.by_hand.pop(pid, None) is not None

    def clear_pids(self) -> int:
        count = len(self.by_hand)
        self.by_hand.clear()
        return count

    def set_enabled(self, enabled: bool) -> None:
        self.enabled = enabled

    def reload(self) -> list[str]:
        if self.wrong:
            raise ConfigError(self.wrong)
        return ["[[app]] #2 is new"]

    def explain(self, **question: Any) -> Json:
        self.asked.append(question)
        return self.answer
