"""What sysctls were before us, as comments in our nft table: for a later daemon, and for `undo`.

A record is `sysctl PATH BEFORE OURS`, or for a list of port ranges `ports PATH ADDED`.
"""

import itertools
import re
from collections.abc import Iterator

from tunsplit.kernel import nft, sysctl

COMMENT_SIZE = 120  # nft takes 128
SETTLED = re.compile(r"sysctl (\S+) (\S*) (\S*)")  # path, value before, our value
ADDED = re.compile(r"ports (\S+) (\S+)")  # path, ranges that we added


def parse(listed: str) -> dict[str, str]:
    """The records in the listing of a table, each under its path; those of a list under path+number."""
    found = {}
    for number, comment in enumerate(nft.comments(listed)):
        if match := SETTLED.fullmatch(comment):
            found[match[1]] = comment
        elif match := ADDED.fullmatch(comment):
            found[f"{match[1]}+{number}"] = comment
    return found


def add_ranges(records: dict[str, str], path: str, added: sysctl.Ranges) -> None:
    """Record that we add these ranges to a list, as far as it is not recorded yet."""
    found = [ADDED.fullmatch(comment) for key, comment in records.items() if key.startswith(f"{path}+")]
    known = [one for match in found if match for one in sysctl.parse_ranges(match[2])]
    free = (key for number in itertools.count() if (key := f"{path}+{number}") not in records)
    for piece in _pieces(path, sysctl.without(added, known)):
        records[next(free)] = piece


def _pieces(path: str, ranges: sysctl.Ranges) -> Iterator[str]:
    """Comments of a length that nft takes; each stands for itself."""
    if not ranges:
        return
    piece: sysctl.Ranges = []
    for one in ranges:
        if piece and len(f"ports {path} {sysctl.format_ranges([*piece, one])}") > COMMENT_SIZE:
            yield f"ports {path} {sysctl.format_ranges(piece)}"
            piece = []
        piece.append(one)
    yield f"ports {path} {sysctl.format_ranges(piece)}"


def restore(comment: str) -> list[str]:
    """Put a value back to what it was before us, unless someone else has changed it since; say what was done."""
    if match := SETTLED.fullmatch(comment):
        path, before, ours = match.groups()
        if sysctl.read(path) == ours:
            sysctl.write(path, before)
            return [f"sysctl {path} = {ours}"]
    elif match := ADDED.fullmatch(comment):
        path, added = match.groups()
        standing = sysctl.parse_ranges(sysctl.read(path) or "")
        left = sysctl.without(standing, sysctl.parse_ranges(added))
        if left != standing:
            sysctl.write(path, sysctl.format_ranges(left))
            return [f"sysctl {path} = {added}"]
    return []
