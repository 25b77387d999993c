"""Who has died, or become another program, while packets waited in the tun.

Theory of operation. Who holds a socket when its datagram is judged need not be who has sent it: that one may be gone,
and a socket goes by fork and exec from one to the other. It lived when the datagram entered the tun, so it has died
since the tun was last seen empty. Deaths are therefore remembered until then. They are counted, and of a packet that is
read, and held perhaps, the number is kept at which the tun was last empty before it: its mark.

Who becomes another program may have died, too, before anybody is told of that. Only below the holder it is in doubt for
it: above, and in the holder itself, it is mostly how a program was started that has made its socket since.

Descriptors go down the lines of descent. Of two who have one from an ancestor that has closed it, neither descends
from the other, and what one has sent is not looked for where the other is found.

A tun that is never empty is a queue all the same, see `tunsplit.engine.portdeaths`.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from tunsplit.engine.portdeaths import TURNS
from tunsplit.engine.reasons import Node, line_of

MOST = 1024  # remembered; with more, it may be anybody


class Change(NamedTuple):
    """A process has died, or become another program."""

    number: int
    node: Node


class Becoming:
    """Who has died, or become another program, since the tun was last empty.

    Attributes:
        mark: of a packet that is read now.
    """

    def __init__(self) -> None:
        self.mark = self._latest = self._middle = self._turns = self._unknown_until = 0
        self._all: list[Change] = []
        self._own: defaultdict[Node, list[Change]] = defaultdict(list)
        self._below: defaultdict[Node, list[Change]] = defaultdict(list)

    def note(self, node: Node) -> None:
        """A process dies, or becomes another program."""
        if len(self._all) >= MOST:
            self.note_unknown()
        self._latest += 1
        self._keep(Change(self._latest, node))

    def note_unknown(self) -> None:
        """Remember that it may be anybody."""
        self._latest += 1
        self._unknown_until = self._latest
        self._forget_until(self._latest)

    def since(self, mark: int) -> bool:
        """Whether anybody has since a packet of this mark can have been sent."""
        return mark < self._latest

    def unknown_since(self, mark: int) -> bool:
        """Whether anybody may have, and nobody knows who."""
        return mark < self._unknown_until

    def heirs_and_givers(self, node: Node, mark: int) -> set[Node]:
        """Who of a process's ancestors has died since, and who of its descendants has, or has become another."""
        above = chain.from_iterable(self._own.get(one, ()) for one in line_of(node) if not one.alive)
        return {one.node for one in chain(above, self._below.get(node, ())) if mark < one.number}

    def carried(self, *, emptied: bool, held: Iterable[int]) -> None:
        """A turn has taken packets out of the tun, all of them or many; `held`: the marks of those that wait."""
        self._turns += 1
        if emptied:
            self.mark = self._middle = self._latest
        elif self._turns >= TURNS:
            self.mark, self._middle = self._middle, self._latest
        else:
            return
        self._turns = 0
        self._forget_until(min((self.mark, *held)))

    def _keep(self, one: Change) -> None:
        self._all.append(one)
        self._own[one.node].append(one)
        for above in line_of(one.node):
            self._below[above].append(one)

    def _forget_until(self, number: int) -> None:
        kept = [one for one in self._all if one.number > number]
        self._all.clear()
        self._own.clear()
        self._below.clear()
        for one in kept:
            self._keep(one)
