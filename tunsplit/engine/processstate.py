"""The process tree as plain data, and back: so that it survives the daemon.

Who reads it must see to it that it is of this boot, and of our own hand. Beyond that nothing is believed: a record that
is malformed or contradicts others is dropped, and who descends from it counts as one whose birth was missed, and whose
parent may have been marked; who is not among the processes that live now, with that start time, is dead.
"""

from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tunsplit.engine.processes import ProcessTree
from tunsplit.engine.reasons import OTHER, UNKNOWN, Birth, Image, Mark, Node, is_missed, process_of
from tunsplit.engine.rules import Rule
from tunsplit.process import Process


def tells_more_than_proc(tree: ProcessTree) -> bool:
    """Whether somebody lives who is listed or of missed birth: a first look at all processes might not show it."""
    listed = (
        tree.stand(node).standing not in (OTHER, UNKNOWN) or is_missed(node) for node in tree.nodes() if node.alive
    )
    return any(listed)


def dump(tree: ProcessTree) -> dict[str, Any]:
    """Whether anybody was ever marked, and everybody who lives or has descendants, ancestors first; as JSON has it."""
    records: list[dict[str, Any]] = []
    numbers: dict[Node, int] = {}
    plain = _Plain()
    for node in tree.nodes():
        line: list[Node] = []
        one: Node | None = node
        while one is not None and one not in numbers:
            line.append(one)
            one = one.parent
        for new in reversed(line):
            numbers[new] = len(records)
            records.append(_record(new, numbers, plain))
    return {"was_marked": tree.was_marked, "nodes": records}


def load(data: object, rules: Sequence[Rule], picture: Iterable[Process], *, recent: bool = True) -> ProcessTree:
    """A tree from what `dump` gave, and a look at all processes of now; without such data, as for the first time.

    `recent`: who was born since then was missed. Otherwise they are believed, as for the first time: nobody promised to
    know of them.
    """
    tree = ProcessTree(rules)
    known: dict[int, Node] = {}
    told = data if isinstance(data, dict) else {}
    nodes = told.get("nodes")
    tree.was_marked = told.get("was_marked") is not False
    for number, record in enumerate(nodes if isinstance(nodes, list) else []):
        try:
            node, parent, born_as = _read(record)
        except (KeyError, TypeError, ValueError):
            tree.was_marked = True
            continue
        above = None if parent is None else known.get(parent)
        if above is None and parent is not None:
            node.birth = Birth.MISSED
        if tree.restore(node, above, born_as):
            known[number] = node
        else:
            tree.was_marked = True
    if known:
        tree.rescan(picture, birth=Birth.MISSED if recent else Birth.PICTURED)
    else:
        tree.was_marked = False
        tree.picture(picture)
    return tree


def _record(node: Node, numbers: dict[Node, int], plain: "_Plain") -> dict[str, Any]:
    return {
        "pid": node.pid,
        "start_time": node.start_time,
        "born_after": node.born_after,
        "born": node.born,
        "alive": node.alive,
        "birth": node.birth.value,
        "mark": node.mark.value if node.mark else None,
        "process": plain(node.image.process),
        "parent": numbers[node.parent] if node.parent else None,
        "born_as": plain(process_of(node.parent_image)),
    }


def _read(record: dict[str, Any]) -> tuple[Node, int | None, Image]:
    """A node without its parent, the number of the parent's record, and what that ran.

    Raises:
        KeyError, TypeError, ValueError: this is no such record.
    """
    start_time = _typed(int | None, record["start_time"])
    image = Image(_typed(Process | None, record["process"]))
    node = Node(_typed(int, record["pid"]), Birth(record["birth"]), image, start_time, _typed(int, record["born"]))
    node.born_after = _typed(int, record["born_after"])
    node.alive = _typed(bool, record["alive"])
    node.mark = None if record["mark"] is None else Mark(record["mark"])
    if start_time is not None and not node.born_after < start_time <= node.born:
        raise ValueError(start_time)
    return node, _typed(int | None, record["parent"]), Image(_typed(Process | None, record["born_as"]))


class _Plain:
    """Processes as lists; each once, since what a fork shares is one object, and dear to take apart."""

    def __init__(self) -> None:
        self._known: dict[int, list[Any]] = {}

    def __call__(self, process: Process | None) -> list[Any] | None:
        if process is None:
            return None
        if (known := self._known.get(id(process))) is None:
            known = self._known[id(process)] = _listed(process)
        return known


def _listed(value: Any) -> Any:
    return [_listed(one) for one in value] if isinstance(value, tuple) else value


def _typed(kind: Any, value: Any) -> Any:
    """The value as what it claims to be: named tuples come back from lists.

    Raises:
        TypeError: it is nothing of that kind.
    """
    if get_origin(kind) is UnionType:
        if value is None and NoneType in get_args(kind):
            return None
        kind = get_args(kind)[0]
    fields = getattr(kind, "_fields", None)
    if fields is None:
        if type(value) is not kind:
            raise TypeError(value)
        return value
    if not isinstance(value, list) or len(value) != len(fields):
        raise TypeError(value)
    kinds = get_type_hints(kind)
    return kind(*[_typed(kinds[field], one) for field, one in zip(fields, value, strict=True)])
