"""Who descends from whom, and how much of it is kept of the dead.

Theory of operation. Dead nodes are kept while they have descendants, and without, for a while: the `RESTING` that
died last. Ancestors are bounded too. A line that goes on through the dead for ever (a server that restarts itself) is
shortened: a dead ancestor that ran only what others further up ran when the line went on from them can be left out, for
a rule that matches it matches those, and whoever is below inherits from both. What they run now does not count: they
may become other programs. Of images that nobody has read, only one and the same
is known to be alike: it may be read yet, where another who shares it lives. What does not fit then is cut off: the last
of the line that is left counts as one whose birth was missed.

Descriptors go down the lines too, and stay with whoever has them when those between have ended: so it can be asked who
may have what somebody has. Who was born unseen may descend from anybody.

Of an orphan /proc shows the new parent before the event of the old one's end (kernel/procevents.py). Who looks an
orphan while its parent lives, as far as events tell, counts as missed, until that end is told: then nothing was amiss.

Invariants: `children` are the nodes whose `parent` this is. A dead node that has children is an ancestor, or was cut
off itself; one without is resting, or gone. No line has a loop.
"""

from collections import OrderedDict
from collections.abc import Callable

from tunsplit.engine.reasons import Birth, Image, Node, has_program, line_of, process_of, traits_of

RESTING = 1024  # dead nodes without descendants
ANCESTORS = 16384  # dead nodes with descendants
LONG = 64  # ancestors, from which on a line is shortened
LONGEST = 256  # ancestors


class Family:
    """The lines. `forget` is told who is gone for good."""

    def __init__(self, forget: Callable[[Node], None]) -> None:
        self._forget = forget
        self._resting: OrderedDict[Node, None] = OrderedDict()
        self._ancestors: OrderedDict[Node, None] = OrderedDict()
        self._strangers: set[Node] = set()  # whose parent is not known
        self._orphans: set[Node] = set()  # by what /proc showed, of parents whose end nobody has told
        self.cut = 0  # lines that were cut off for room
        self.missed = 0  # births
        self.shortened = 0  # lines

    def __len__(self) -> int:
        """How many dead are kept."""
        return len(self._resting) + len(self._ancestors)

    def ancestors(self) -> list[Node]:
        """The dead who have descendants."""
        return list(self._ancestors)

    def miss(self, node: Node) -> None:
        """Somebody's birth was missed."""
        node.birth = Birth.MISSED
        self.missed += 1
        self._strangers.add(node)

    def miss_parent(self, node: Node) -> None:
        """/proc has shown another parent of somebody than the one that lives."""
        self.miss(node)
        self._orphans.add(node)

    def forget_orphans(self) -> None:
        """Ends were lost: those that are found now explain nothing."""
        self._orphans.clear()

    def heirs(self, node: Node, most: int) -> list[int] | None:
        """Who lives and may have descriptors of a node by birth, as pids; None: too many.

        Those are its descendants, and with their descendants those whose parent is not known.

        Args:
            node: the one who is asked about.
            most: how many there may be, those counted who link the living to it.
        """
        if not node.children and not self._strangers:
            return []
        seen = {node}
        ahead = [node, *self._strangers]
        while ahead:
            one = ahead.pop()
            seen.add(one)
            if len(seen) > most + 1:
                return None
            # Of the dead those who rest have nobody left, and may be many.
            ahead += [child for child in one.children if (child.alive or child.children) and child not in seen]
        return [one.pid for one in seen if one.alive and one is not node]

    def line(self, node: Node, since: int) -> set[int] | None:
        """Who lives and may have what a node was born with, as pids; None: nobody can tell.

        Those are who it was born of, up to the first who is older than what is asked about; and their other children,
        for who is made with CLONE_PARENT has what a sibling had.

        Args:
            node: the one who is asked about, and is not older.
            since: the clock tick that tells who is.
        """
        found: set[int] = set()
        while node.birth is not Birth.MISSED and (above := node.parent) is not None:
            found |= {one.pid for one in (above, *above.children) if one.alive}
            if above.born < since:
                return found
            node = above
        return None

    def bear(self, node: Node, above: Node) -> bool:
        """Give a new node, which runs what its parent does, that parent; False if the line has no room for it."""
        above.image.is_shared = True
        # Once for each member: a storm of children is not kept up by what their line cannot spare.
        if above.depth >= LONG and not above.children:
            self._shorten(above)
        if above.depth >= LONGEST:
            return False
        self._attach(node, above, above.image)
        return True

    def adopt(self, node: Node, above: Node, born_as: Image) -> bool:
        """Give a node that is known already its parent, and what that ran at the birth; False if it cannot be."""
        if above.start_time is not None and above.start_time > node.born:
            return False
        if above is node or node in line_of(above):
            return False
        self._attach(node, above, born_as)
        return True

    def bury(self, node: Node) -> bool:
        """Keep a node that died as long as it may be needed; False if by that others have other lines."""
        node.alive = node.leader = False
        node.threads = 0
        orphans = self._orphans & node.children
        self._orphans -= orphans
        for orphan in orphans:
            if orphan.misfit is None:  # else it is still somebody else's child
                orphan.birth = Birth.SEEN
                self._strangers.discard(orphan)
        if not node.children:
            self._strangers.discard(node)
            self._resting[node] = None
            if len(self._resting) > RESTING:
                self._drop(next(iter(self._resting)))
            return True
        self._ancestors[node] = None
        if len(self._ancestors) <= ANCESTORS:
            return not orphans
        oldest = next(iter(self._ancestors))
        del self._ancestors[oldest]
        oldest.birth = Birth.MISSED
        self._strangers.add(oldest)
        self._attach(oldest, None, None)
        self.cut += 1
        return False

    def revive(self, node: Node) -> None:
        """Take back that a node died."""
        node.alive = True
        if node.birth is Birth.MISSED:
            self._strangers.add(node)
        self._resting.pop(node, None)
        self._ancestors.pop(node, None)

    def _attach(self, node: Node, above: Node | None, image: Image | None) -> None:
        """Give a node another parent, or none."""
        before = node.parent
        node.parent, node.parent_image, node.depth = above, image, 0
        if above is not None:
            node.depth = above.depth + 1
            above.children.add(node)
            if above in self._resting:
                del self._resting[above]
                self._ancestors[above] = None
                if above.birth is Birth.MISSED:
                    self._strangers.add(above)
        if before is not None and before is not above:
            self._lose_child(before, node)

    def _lose_child(self, node: Node, child: Node) -> None:
        node.children.discard(child)
        if not node.children and not node.alive:
            self._drop(node)

    def _drop(self, node: Node) -> None:
        """Forget a dead node without children, and upwards who is one by that."""
        gone: Node | None = node
        while gone is not None and not gone.children and not gone.alive:
            self._resting.pop(gone, None)
            self._ancestors.pop(gone, None)
            self._strangers.discard(gone)
            self._orphans.discard(gone)
            self._forget(gone)
            above, gone.parent = gone.parent, None
            if above is not None:
                above.children.discard(gone)
            gone = above

    def _shorten(self, node: Node) -> None:
        line = [node, *line_of(node)]
        line[-1].depth = 0
        self.shortened += 1
        seen: set[object] = set()
        # From the far end: whoever is left out is left out for the sake of one above.
        for below, above in zip(line[-2::-1], line[:0:-1], strict=True):
            born_as = _traits_of(below.parent_image)
            needed = above.alive or above.mark is not None or above.birth is Birth.MISSED
            if needed or not {born_as, _traits_of(above.image)} <= seen:
                seen.add(born_as)
                below.depth = above.depth + 1
            else:
                self._attach(below, above.parent, above.parent_image)


def _traits_of(image: Image | None) -> object:
    """What tells an image from others: its program's traits, or only itself while those are not known."""
    process = process_of(image)
    return traits_of(process) if process is not None and has_program(process) else image
