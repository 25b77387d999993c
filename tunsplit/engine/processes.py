"""The process tree: who was born of whom, and what of it decides a process's side.

Theory of operation. A node is a process, known by pid and start time: a reused pid is a stranger. It points at
its parent as recorded at birth, so it stays its parent's child when the parent dies. An `Image` is a program with
the credentials it runs under. Fork shares the parent's image with the child, exec and a change of the user replace
it by one that has not been read yet. A child remembers the image that its parent had when it was born.

Reasons are never stored, they are found by walking up. A process has the reasons of its own image, and inherits those
of each ancestor: of the image at the birth of the child that leads here, and of the ancestor's image now, or its last.
So a child stays what it was born as when its parent runs another program or dies, follows when its parent becomes
listed, and a rule that is removed takes with it just what it alone caused. A mark by hand overrides rules; of several
in a line the nearest counts.

Birth. SEEN: the event told the parent. PICTURED: found by the very first look at all processes, where the parent
that /proc shows is believed: what was before us, nobody promised to know. MISSED: born unseen later (events were
lost, the state that was loaded does not know it, its line is too long), or not the child that the event made it. What
/proc shows of a missed one's parent is a true ancestor, since an orphan is given to one, but not all of them, and what
it ran at the birth is unknown. What is inherited from what it runs now holds (unless somebody has a mark, which a
missing ancestor might override), and where nothing is found there, the answer is "unknown", never "not listed". The
same goes for images that nobody has read, and for the last one of a process that died unseen.

CLONE_PARENT makes event and /proc both name the caller's parent. What can be told: before its first exec a child
has the program of its parent; one that has another is the child of somebody else. So who has never been looked at is
looked at before its first judgement, or the first of a descendant (`take_unproved`). A child that was not looked
at before it ran exec cannot be told from a child of the caller's parent. One thing looks the same for a moment: an exec
whose event is not queued yet. So an exec that leads to the very program that did not fit clears the suspicion. And what
was read of an image by looking at a process is in doubt when that one runs another: until it is known to be another.
A child with another parent in /proc than the one that lives was missed, too, until the end of that one is told.

Use: subscribe; `picture` all processes; then before each judgement apply the events, read what `take_unread` names (and
`take_unproved`, of whom is to be judged), apply the events that came meanwhile, hand over what was read by `look`, and
ask. `look` has no effect if the image is not the process's any more: what was read is never taken for what came later.
"""

from collections.abc import Callable, Iterable, Sequence

from tunsplit.engine.asked import Asked
from tunsplit.engine.family import Family
from tunsplit.engine.reasons import (
    Birth,
    Image,
    Listed,
    Mark,
    Node,
    Reason,
    Reasons,
    Stand,
    find_client,
    find_listed,
    find_reasons,
    has_program,
    line_of,
    program_of,
    stand_of,
    traits_of,
)
from tunsplit.engine.rules import Rule
from tunsplit.process import Process


class ProcessTree:
    """All processes that live, and what is left of their dead ancestors."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self._rules: Sequence[Rule] = tuple(rules)
        self._nodes: dict[int, Node] = {}  # the living, and the resting whose pid nobody else has
        self._family = Family(self._forget)
        self._marked: set[Node] = set()
        self.was_marked = False  # anybody, ever: who is missing in a line may have been
        self.on_other: Callable[[Node], None] = lambda _: None  # who has become another, or dies
        self._unread: dict[Node, None] = {}
        self._asked = Asked()
        self._latest = 0

    # What happens

    def picture(self, processes: Iterable[Process]) -> None:
        """Take in the very first look at all processes."""
        self._take_in(processes, Birth.PICTURED)

    def rescan(self, processes: Iterable[Process], *, birth: Birth = Birth.MISSED) -> list[Process]:
        """Take in a look at all processes, after events were lost; give who is new (missed, then) or another."""
        processes = list(processes)
        self._family.forget_orphans()
        there = {process.pid: process.start_time for process in processes}
        for node in [node for node in self._nodes.values() if node.alive]:
            if (start_time := there.get(node.pid)) is not None and node.is_started_at(start_time):
                node.leader, node.threads = True, 0
            else:
                if birth is Birth.MISSED:  # it may have become another program before it died
                    node.image = Image()
                self._bury(node)
        self._asked.suspect_all()
        return self._take_in(processes, birth)

    def fork(self, parent: int, child: int, at: int) -> None:
        """A process was born of `parent` (both tgids), not later than `at`."""
        above = self._nodes.get(parent)
        self._latest, born_after = max(self._latest, at), -1
        old = self._nodes.get(child)
        if old is not None:
            if old.start_time is not None and old.start_time > at:
                return  # of one who had the pid before
            if old.alive and old.birth is not Birth.SEEN:
                # It had been born when we looked; what its parent ran then may have been another program since.
                if old.birth is Birth.PICTURED and above is not None and self._family.adopt(old, above, above.image):
                    old.birth = Birth.SEEN
                    self._asked.suspect(old)
                return
            born_after = old.born if old.start_time is None else old.start_time
            if old.alive:
                self._bury(old)
        node = Node(child, Birth.SEEN, Image() if above is None else above.image, None, at)
        if above is None or not self._family.bear(node, above):
            self._family.miss(node)
        if node.image.process is None:
            self._unread[node] = None
        node.born_after = born_after
        self._nodes[child] = node

    def thread(self, pid: int) -> None:
        """A process (tgid) has one more thread."""
        if (node := self._nodes.get(pid)) is not None:
            node.threads += 1

    def exec(self, pid: int, at: int) -> None:
        """A process (tgid) became another program: `take_unread` will name it."""
        node = self._of_event(pid, at)
        if node is None:
            return
        if not node.alive:  # the leader had ended, and another thread has taken its place
            self._family.revive(node)
        node.leader, node.threads = True, 0
        self.on_other(node)
        self._renew(node, at)

    def uid_changed(self, pid: int, at: int) -> None:
        """A process (tgid) has another user: as `exec`."""
        if (node := self._of_event(pid, at)) is not None and node.alive:
            self._renew(node, at)

    def exit(self, task: int, pid: int, at: int) -> bool:
        """A task of a process (tgid) ended; whether the process did: when its leader and its other threads have."""
        node = self._of_event(pid, at)
        if node is None or not node.alive:
            return False
        if task == pid:
            node.leader = False
        else:
            node.threads = max(0, node.threads - 1)
        if node.leader or node.threads:
            return False
        is_parents = node.parent is not None and node.image is node.parent.image
        if node.children or not is_parents:  # else whoever has what it had is like it
            self.on_other(node)
        self._bury(node)
        return True

    def restore(self, node: Node, above: Node | None, born_as: Image) -> bool:
        """Put a node in its place, below one who runs or ran `born_as` at its birth; False if it contradicts others."""
        if node.alive and node.pid in self._nodes and self._nodes[node.pid].alive:
            return False
        if above is not None and not self._family.adopt(node, above, born_as):
            return False
        if node.alive or node.pid not in self._nodes:
            self._nodes[node.pid] = node
        if node.birth is Birth.MISSED:
            self._family.miss(node)
        if not node.alive:
            self._bury(node)
        if node.mark is not None:
            self._marked.add(node)
            self.was_marked = True
        return True

    def nodes(self) -> list[Node]:
        """Who lives or has descendants, for `dump`."""
        return [node for node in self._nodes.values() if node.alive] + self._family.ancestors()

    # What was read

    def take_unread(self) -> list[tuple[int, Image]]:
        """The living whose program is to be read: pid, and the image to give to `look`. Each is named once."""
        unread = [(node.pid, node.image) for node in self._unread if node.alive and node.image.process is None]
        self._unread.clear()
        return unread

    def take_unproved(self, pid: int, start_time: int) -> list[tuple[int, Image]]:
        """Who of a process's line lives and has never been looked at; as for `take_unread`, each is named once.

        What they run is known from their parents, if those are their parents.
        """
        node = self.find(pid, start_time)
        unproved = []
        for one in () if node is None else (node, *line_of(node)):
            if one.alive and not one.proved and one.birth is Birth.SEEN and one.image is one.parent_image:
                one.proved = True
                unproved.append((one.pid, one.image))
        return unproved

    def image(self, pid: int) -> Image | None:
        """What to give to `look`, for one who is to be read again; take it before reading."""
        return None if (node := self._nodes.get(pid)) is None else node.image

    def look(self, process: Process, image: Image | None) -> bool:
        """Take in a process as read while it ran `image`; False if it is a stranger or runs another by now."""
        node = self.find(process.pid, process.start_time)
        if node is None or image is None or node.image is not image:
            return False
        node.proved = True
        parent = node.parent
        if node.birth is Birth.SEEN and parent is not None and parent.alive and process.parent != parent.pid:
            self._family.miss_parent(node)
            self._asked.suspect(node)
        known = image.process
        if known is None:
            others = image.is_shared or (node.doubted is not None and node.doubted[0].is_shared)
            self._read_anew(node.settle(process))
            if has_program(process):
                image.become(process)
                node.source_of, node.looked_at = image, self._latest
                self._asked.suspect(node, others=others)
            else:  # ended, perhaps: no word about others who share the image
                self._replace(node, Image(process))
            if node.misfit is not None and program_of(process) == program_of(node.misfit.process):
                node.birth = Birth.SEEN
            node.misfit = None
        elif has_program(process) and traits_of(known) != traits_of(process):
            unfit = image is node.parent_image and program_of(known) != program_of(process)
            self._replace(node, Image(process))
            if unfit:
                self._family.miss(node)
                self._asked.suspect(node)
                node.misfit = node.image
        return True

    # What is said

    def set_rules(self, rules: Sequence[Rule]) -> None:
        """Judge everybody by these from now on."""
        self._rules = tuple(rules)
        self._asked.suspect_all()

    def mark(self, pid: int, start_time: int, mark: Mark | None) -> bool:
        """Mark a process by hand, or take its mark away; False if there is no such process, or it was so already."""
        node = self.find(pid, start_time)
        if node is None or node.mark is mark:
            return False
        node.mark = mark
        if mark is None:
            self._marked.discard(node)
        else:
            self._marked.add(node)
            self.was_marked = True
        self._asked.suspect_all()
        return True

    def clear_marks(self) -> None:
        """Take all marks away."""
        for node in self._marked:
            node.mark = None
        self._marked.clear()
        self._asked.suspect_all()

    # What comes of it

    def find(self, pid: int, start_time: int) -> Node | None:
        """What is known of this process."""
        return node if (node := self._nodes.get(pid)) is not None and node.is_started_at(start_time) else None

    def reasons(self, pid: int, start_time: int) -> Reasons | None:
        """Why this process is on its side, a mark first; empty: it is not listed; None: nobody can tell.

        From now on `changed` names it when that changes.
        """
        node = self.find(pid, start_time)
        if node is None:
            return None
        reasons = self._reasons(node)
        self._asked.tell(node, stand_of(node, reasons, self._rules), start_time)
        return reasons

    def stand(self, node: Node) -> Stand:
        """Where a process stands, or stood last."""
        return stand_of(node, self._reasons(node), self._rules)

    def client(self, pid: int, start_time: int) -> Reason | None:
        """Why this process is the VPN's client; None: it is not, as far as is known. Ask for `reasons` before."""
        return None if (node := self.find(pid, start_time)) is None else find_client(node, self._rules)

    @property
    def changes(self) -> int:
        """Counts up whenever `reasons` may answer otherwise for anybody it has been asked about."""
        return self._asked.changes + self._family.shortened

    def lineage(self, pid: int, start_time: int) -> list[Process]:
        """The process and its ancestors as last read, nearest first, as far as they are known."""
        node = self.find(pid, start_time)
        return [] if node is None else [read for one in (node, *line_of(node)) if (read := one.last_read) is not None]

    def heirs(self, pid: int, most: int) -> list[int] | None:
        """Who may have descriptors of a process by birth, see `Family.heirs`; None also if it is not known."""
        return None if (node := self._nodes.get(pid)) is None else self._family.heirs(node, most)

    def line(self, pid: int, since: int) -> set[int] | None:
        """Who may have what a process was born with, if nobody had it before this clock tick, likewise."""
        return None if (node := self._nodes.get(pid)) is None else self._family.line(node, since)

    def recall(self, pid: int) -> Process | None:
        """What a living process is as of the last event, see `Node.recall`."""
        return None if (node := self._nodes.get(pid)) is None else node.recall()

    def birth(self, pid: int, start_time: int) -> Birth | None:
        """How we know of this process, if we do."""
        return None if (node := self.find(pid, start_time)) is None else node.birth

    def changed(self) -> set[tuple[int, int]]:
        """Those who were asked for and stand elsewhere now: pid and start time. Asking names each once."""
        changed = set()
        for node, before, start_time in self._asked.take_suspects():
            if (stand := self.stand(node)) != before:
                self._asked.tell(node, stand, start_time)
                changed.add((node.pid, start_time))
        return changed

    def listed(self) -> list[Listed]:
        """Every living process that has reasons, or is the VPN's client, by pid."""
        found = (find_listed(node, self._rules, marks=self.was_marked) for _, node in sorted(self._nodes.items()))
        return [*filter(None, found)]

    def statistics(self) -> dict[str, int]:
        """How many are known, dead ones among them, and births that were missed; lines that were cut for room."""
        dead, missed, cut = len(self._family), self._family.missed, self._family.cut
        return {"processes": len(self._nodes), "dead": dead, "missed": missed, "cut": cut}

    # How it is kept

    def _reasons(self, node: Node) -> Reasons | None:
        return find_reasons(node, self._rules, marks=self.was_marked)

    def _of_event(self, pid: int, at: int) -> Node | None:
        """Whom an event is about, which may be older than the look at all processes."""
        self._latest = max(self._latest, at)
        node = self._nodes.get(pid)
        return None if node is None or (node.start_time is not None and node.start_time > at) else node

    def _replace(self, node: Node, image: Image, *, others: bool = False) -> None:
        node.image = image
        self._asked.suspect(node, others=others)

    def _renew(self, node: Node, at: int) -> None:
        doubtful = node.doubt(at)
        self._read_anew(doubtful[1:])
        self._replace(node, Image(), others=any(image.is_shared for image in doubtful))
        self._unread[node] = None

    def _read_anew(self, images: Sequence[Image]) -> None:
        if images:
            self._unread.update({node: None for node in self._nodes.values() if node.image in images})

    def _bury(self, node: Node) -> None:
        self._unread.pop(node, None)
        if node.children:  # their reasons may name it, and say so
            self._asked.changes += 1
        if not self._family.bury(node):
            self._asked.suspect_all()

    def _forget(self, node: Node) -> None:
        self._marked.discard(node)
        self._asked.forget(node)
        if self._nodes.get(node.pid) is node:
            del self._nodes[node.pid]

    def _take_in(self, processes: Iterable[Process], birth: Birth) -> list[Process]:
        new, others = [], []
        for process in {process.pid: process for process in processes}.values():
            node = self._nodes.get(process.pid)
            if node is not None and node.alive and node.is_started_at(process.start_time):
                self._unread.pop(node, None)
                known = node.image.process
                # A look that comes after a gap may show what came after an exec that was lost: a new image.
                if known is None or (has_program(process) and traits_of(known) != traits_of(process)):
                    self._replace(node, Image(process))
                    others.append(process)
                continue
            if node is not None and node.alive:
                self._bury(node)
            node = Node(process.pid, birth, Image(process), process.start_time, process.start_time)
            self._nodes[process.pid] = node
            new.append((node, process))
        for node, process in new:
            above = self._nodes.get(process.parent)
            # What a parent ran when a missed one was born, nobody knows.
            born_as = Image() if above is None or birth is Birth.MISSED else above.image
            if above is None or not above.alive or not self._family.adopt(node, above, born_as):
                node.birth = Birth.MISSED if process.parent else birth  # its parent died while we looked
            if node.birth is Birth.MISSED:
                self._family.miss(node)
        return others + [process for _, process in new]
