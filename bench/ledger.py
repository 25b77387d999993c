"""Who may be on which side, from which moment on, and whether that is how it was.

Each change of sides begins an epoch, once the command that made it has returned. Apps put the epoch into all that they
send (`bench.traffic`), and each has servers' addresses of its own: so every frame tells whose it is, and most of them
when they were sent. What is sent while sides change may be on either.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from bench.traffic import tokens
from tunsplit.lab import Lab
from tunsplit.lab.addresses import Address
from tunsplit.lab.observer import Observer

if TYPE_CHECKING:
    from tunsplit.lab.frames import FlowKey

KEPT = 50  # leaks that are told in words
REMEMBERED = 50_000  # connections
LEFT_S = 10.0  # what an app that has ended had sent may still be on its way so long: its side may just be coming back


@dataclass(frozen=True)
class Epoch:
    """How things are to be.

    Attributes:
        sides: where each app is: uplink or tunnel.
        sources: by side, the host's own addresses there.
    """

    sides: Mapping[str, str]
    sources: Mapping[str, frozenset[Address]]


class Ledger:
    """Keeps the epochs, and looks at both wires.

    Attributes:
        watched: apps' frames, by side.
        leaks: what was on a wrong side, or with a wrong address, in words: the first ones.
        leaked: how many there were.
    """

    def __init__(self, lab: Lab, file: Path, targets: Mapping[str, Iterable[Address]], first: Epoch) -> None:
        """`file` has the epoch, for the apps; `targets` are the addresses of each app's own servers."""
        self.watched: Counter[str] = Counter()
        self.leaks: list[str] = []
        self.leaked = 0
        self._lab = lab
        self._owner = {target: name for name, own in targets.items() for target in own}
        self._epochs = [first]
        self._looked = 0
        # By the side on which they rightly were, the latest last.
        self._connections: OrderedDict[tuple[str, FlowKey], None] = OrderedDict()
        self._left: dict[tuple[str, str], float] = {}  # app and side → until when something may be left there
        file.write_bytes(bytes(8))
        with file.open("r+b") as opened:
            self._shared = mmap(opened.fileno(), 8)

    @property
    def epoch(self) -> int:
        """The number of the current one."""
        return len(self._epochs) - 1

    def begin(self, epoch: Epoch) -> None:
        """From now on things are to be so."""
        if epoch != self._epochs[-1]:
            self._epochs.append(epoch)
            self._shared[:8] = self.epoch.to_bytes(8, "big")

    def has_ended(self, name: str) -> None:
        """Another process will be this app: what says no epoch may be of the one before, on its side."""
        self._left[name, self._epochs[-1].sides[name]] = trio.current_time() + LEFT_S

    async def look(self) -> int:
        """Judge what has passed since the last look; give how many leaks there were."""
        before = self.leaked
        for observer in (self._lab.uplink, self._lab.tunnel):
            await observer.settle()
            if observer.dropped:
                raise RuntimeError(f"the observer of the {observer.name} did not see all")
            self._judge_addresses(observer)
            self._judge_tokens(observer)
            observer.clear()
        self._looked = self.epoch
        return self.leaked - before

    def close(self) -> None:
        """Give the file's memory back."""
        self._shared.close()

    def _judge_addresses(self, observer: Observer) -> None:
        """By whom it is sent, or whom ARP or NDP asks for: every frame."""
        epochs = self._epochs[self._looked :]
        for flow, frames in observer.flows().items():
            if flow.destination not in self._owner:
                continue
            name = self._owner[flow.destination]
            self.watched[observer.name] += frames
            if (observer.name, flow) in self._connections:
                # It ends where it was, after a switch or its app's end: what it says has an epoch.
                self._connections.move_to_end((observer.name, flow))
                continue
            may_be_left = self._left.get((name, observer.name), 0.0) > trio.current_time()
            if not may_be_left and all(epoch.sides[name] != observer.name for epoch in epochs):
                self._leak(frames, f"{name} in the {observer.name}, {frames} × {' '.join(map(str, flow))}")
            elif flow.protocol not in ("arp", "ndp") and all(
                flow.source not in epoch.sources[observer.name] for epoch in epochs
            ):
                self._leak(frames, f"a foreign address in the {observer.name}, {frames} × {' '.join(map(str, flow))}")
            elif flow.protocol == "tcp":
                self._connections[observer.name, flow] = None
                if len(self._connections) > REMEMBERED:
                    self._connections.popitem(last=False)

    def _judge_tokens(self, observer: Observer) -> None:
        """By what it says: the frames that were kept, questions for names among them."""
        for seen in observer.seen(payload=b"--"):
            if seen.direction == "in":
                continue
            for token in tokens(seen.payload, self._epochs[0].sides):
                epochs = self._epochs[token.epoch :]
                if all(epoch.sides[token.name] != observer.name for epoch in epochs):
                    self._leak(1, f"{token.name} of epoch {token.epoch} in the {observer.name}: {seen}")

    def _leak(self, frames: int, words: str) -> None:
        self.leaked += frames
        if len(self.leaks) < KEPT:
            self.leaks.append(f"epoch {self.epoch}: {words}")
