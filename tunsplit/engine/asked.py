"""Who was asked for in the process tree, and may stand elsewhere since.

Theory of operation. What happens to a process may change its own reasons and those of its descendants. To find out
means to walk up their lines, so it is only noted who is suspect, and asked again when somebody wants to know. Until
then nothing that was told has changed, if nobody is suspect: `changes` counts, and who remembers an answer beside it
need not ask twice.
"""

from tunsplit.engine.reasons import Node, Stand


class Asked:
    """Processes whose reasons were told, and how they stood.

    Attributes:
        changes: counts up whenever what was told of anybody may be otherwise, if only in words.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._told: dict[Node, tuple[Stand, int]] = {}  # with the start time
        self._suspects: set[Node] = set()  # of `_told`
        self._all_suspect = False

    def tell(self, node: Node, stand: Stand, start_time: int) -> None:
        """Remember how a process stands."""
        self._told[node] = stand, start_time

    def suspect(self, node: Node, *, others: bool = False) -> None:
        """Its reasons may have changed, and those of its descendants; and of `others`, whoever they are."""
        if others or node.children:
            self.suspect_all()
        elif node in self._told:
            self._suspects.add(node)
            self.changes += 1

    def suspect_all(self) -> None:
        """Anybody's reasons may have changed."""
        self._all_suspect = True
        self.changes += 1

    def forget(self, node: Node) -> None:
        """It is gone."""
        self._suspects.discard(node)
        if self._told.pop(node, None) is not None:
            self.changes += 1

    def take_suspects(self) -> list[tuple[Node, Stand, int]]:
        """Who may stand elsewhere, and how it stood, with its start time; each is named once."""
        suspects = set(self._told) if self._all_suspect else self._suspects & self._told.keys()
        self._all_suspect = False
        self._suspects.clear()
        return [(node, *self._told[node]) for node in suspects]
