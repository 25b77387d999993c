"""Sockets that change hands by fork and exec: no datagram is taken for an heir's, and none of an heir's for others'."""

from typing import TYPE_CHECKING

from tunsplit.engine.attribution import Owner
from tunsplit.engine.becoming import Becoming
from tunsplit.engine.hold import Hold
from tunsplit.engine.processes import ProcessTree
from tunsplit.engine.reasons import Node
from tunsplit.kernel.procfs import Processes
from tunsplit.wire.ip import UDP

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 32  # relatives who are asked for; where more have died, nothing is guessed


class Heirs:
    """Which UDP datagrams may be of somebody who stood elsewhere than those who hold their socket."""

    def __init__(self, tree: ProcessTree, processes: Processes, hold: Hold) -> None:
        self._tree = tree
        self._processes = processes
        self._hold = hold
        self._becoming = Becoming()
        self._marks: dict[bytes, int] = {}  # of what is held, if anything has happened since
        self.carry: Callable[[], object] = lambda: None  # one batch out of the tun
        tree.on_other = self._becoming.note

    def heard(self) -> None:
        """Events have come: what enters the tun once it is empty was sent by those who are what they are."""
        if self:
            self.carry()

    def note_unknown(self) -> None:
        """Events were lost: anybody may have died."""
        self._becoming.note_unknown()

    def __bool__(self) -> bool:
        """Whether anybody has died, or become another, since the tun was last seen empty."""
        return self._becoming.since(self._becoming.mark)

    def doubts(self, four_tuple: bytes, owner: Owner | None, sockets: tuple[int, ...], *, held: bool = False) -> bool:
        """Whether a datagram may be of somebody who stood elsewhere than those who hold its sockets.

        To be asked when these have been judged, so that all that has happened before was taken in.

        Args:
            four_tuple: of its flow.
            owner: who holds the sockets that may have sent it.
            sockets: these, as inodes.
            held: whether it was read some time ago.

        Raises:
            KernelError: how they are held cannot be seen.
        """
        mark = self._marks.get(four_tuple, self._becoming.mark) if held else self._becoming.mark
        if owner is None or not self._becoming.since(mark):
            return False
        for holder in owner.holders:
            node = self._tree.find(holder.pid, holder.start_time)
            # Most descriptors close on exec: then the socket has never been another program's.
            if (node is None or self._may_be_of_another(node, mark)) and self._processes.keeps(holder.pid, {*sockets}):
                return True
        return False

    def carried(self, emptied: bool) -> None:
        """A turn has carried packets out of the tun, and seen it empty or not."""
        if self:
            mark = self._becoming.mark
            self._marks = {key: self._marks.get(key, mark) for protocol, key in self._hold if protocol == UDP}
            self._becoming.carried(emptied=emptied, held=self._marks.values())

    def _may_be_of_another(self, node: Node, mark: int) -> bool:
        others = self._becoming.heirs_and_givers(node, mark)
        if len(others) > MOST or self._becoming.unknown_since(mark):
            return True
        return bool(others) and {self._tree.stand(one) for one in others} != {self._tree.stand(node)}
