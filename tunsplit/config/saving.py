"""The list, written back into the configuration's text: some lines of an [[app]] more or less, all else byte for byte.

Theory of operation. Entries that say nothing but `path` (and `force`) are what `tunsplit app` means: these are added
and cleared. An entry with more keys says something that a path alone does not: it stays, unless its very path is
removed. Comments stay in any case. The text is edited by lines, which need not understand all of TOML: what comes out
is read by `parse`, and unless it is the configuration that was there with just this change, it is thrown away and the
user is asked to edit by hand. (A TOML library that keeps the style does less: tomlkit 0.15 takes the comments behind a
removed table away with it, joins `path = "/a"` without line break and the next `[[app]]` to one line, and moves tables
that other sections stand between.)
"""

import re
from collections.abc import Callable

import msgspec

from tunsplit.config.reading import parse
from tunsplit.config.schema import App, Config, readers
from tunsplit.config.values import Mismatch
from tunsplit.errors import ConfigError

APP = re.compile(r"""\s*\[\[\s*(?:app|"app"|'app')\s*\]\]\s*(?:#.*)?$""")
HEADING = re.compile(r"""\s*\[\[?[^\[\]]+\]\]?\s*(?:#.*)?$""")
NO_KEY = re.compile(r"\s*(?:#.*)?$")


def checked_path(path: str) -> str:
    """Return a path that an [[app]] may have.

    Raises:
        ConfigError: it is not absolute, or is no path at all.
    """
    try:
        readers(App)["path"].read(path)
    except Mismatch as mismatch:
        _, found, expected = mismatch.problems[0]
        raise ConfigError(f"path: found {found}, expected {expected}") from None
    return path


def with_app(text: str, path: str, file: str, *, force: bool = False) -> str:
    """Return the configuration with an [[app]] for this path alone; the same text if it has one.

    `force`: one that covers local resolvers too.

    Raises:
        ConfigError: the configuration is wrong as it is, or written so that this must be done by hand.
    """
    before, wanted = parse(text, file), App(path=checked_path(path), force=force)
    if wanted in before.apps:
        return text
    lines, blocks = _blocks(text)
    end = "\r" if any(line.endswith("\r") for line in lines) else ""
    if blocks:
        # Behind the last key: comments that follow may be about what follows.
        _, keys = blocks[-1]
        at = keys[-1] + 1 if keys else len(lines)
    else:
        at = len(lines) if lines[-1] else len(lines) - 1  # what follows the last line break is no line
    entry = ["[[app]]" + end, f"path = {_quoted(path)}" + end]
    if force:
        entry.append("force = true" + end)
    if at > 0 and lines[at - 1].strip():
        entry.insert(0, end)
    if at == len(lines):  # the last line had no line break
        lines[-1] += end
        entry.append("")
    lines[at:at] = entry
    return _proved("\n".join(lines), file, before, (*before.apps, wanted))


def without_app(text: str, path: str, file: str) -> str:
    """Return the configuration without any [[app]] of exactly this path; the same text if there is none.

    Raises:
        ConfigError: the configuration is wrong as it is, or written so that this must be done by hand.
    """
    return _without(text, file, lambda app: app.path == path)


def without_apps(text: str, file: str) -> str:
    """Return the configuration without those [[app]] that say nothing but a path.

    Raises:
        ConfigError: the configuration is wrong as it is, or written so that this must be done by hand.
    """
    return _without(text, file, lambda app: app == App(path=app.path, force=app.force))


def _without(text: str, file: str, goes: Callable[[App], bool]) -> str:
    before = parse(text, file)
    if not any(map(goes, before.apps)):
        return text
    lines, blocks = _blocks(text)
    dropped: set[int] = set()
    # Where there are fewer blocks than entries, the outcome is not what is wanted, and is found not to be.
    for app, (heading, keys) in zip(before.apps, blocks, strict=False):
        if goes(app):
            dropped |= {heading, *keys}
    left: list[str] = []
    for number, line in enumerate(lines):
        # Of the empty lines around what went, one is enough.
        is_gap = number - 1 in dropped and not line.strip() and not (left and left[-1].strip())
        if number not in dropped and not is_gap:
            left.append(line)
    return _proved("\n".join(left), file, before, tuple(app for app in before.apps if not goes(app)))


def _blocks(text: str) -> tuple[list[str], list[tuple[int, list[int]]]]:
    """Return the text's lines, and for each [[app]] the numbers of its heading's line and of its keys' lines."""
    lines = text.split("\n")
    blocks: list[tuple[int, list[int]]] = []
    is_app = False
    for number, line in enumerate(lines):
        if APP.match(line):
            is_app = True
            blocks.append((number, []))
        elif HEADING.match(line):
            is_app = False
        elif is_app and not NO_KEY.match(line):
            blocks[-1][1].append(number)
    return lines, blocks


def _quoted(path: str) -> str:
    """Return a path, which is printable, as a basic string of TOML."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _proved(text: str, file: str, before: Config, apps: tuple[App, ...]) -> str:
    by_hand = f"{file}: found [[app]] entries in an unusual form, expected one key a line; edit the list there by hand"
    try:
        after = parse(text, file)
    except ConfigError:
        raise ConfigError(by_hand) from None
    if after != msgspec.structs.replace(before, apps=apps):
        raise ConfigError(by_hand)
    return text
