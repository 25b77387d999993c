"""From TOML text to a `Config`, or to a `ConfigError` that lists every problem found."""

import difflib
import re
import tomllib
from collections.abc import Iterable
from typing import Any

from tunsplit.config.checks import contradictions
from tunsplit.config.schema import SECTIONS, App, Config, Section, readers, required
from tunsplit.config.values import Mismatch, printable, shown
from tunsplit.errors import ConfigError


def parse(text: str, file: str = "<configuration>") -> Config:
    """Return the configuration that a TOML text describes.

    Args:
        text: the file's content.
        file: its name, for messages.

    Raises:
        ConfigError: one line for each problem, `FILE: [section] key: found X, expected Y`. TOML that cannot be read
            at all is one problem with its line and column; contradictions between keys are looked for once every key
            is right by itself.
    """
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{file}: found values nested too deeply, expected TOML") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {_syntax(str(error))}") from None

    problems = [_unknown_section(name) for name in document if name not in SECTIONS]
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        if name == "app":
            sections["apps"] = _apps(document.get(name, []), problems)
        elif name in document or required(section):
            sections[name] = _section(f"[{name}]", section, document.get(name, {}), problems)
    if not problems:
        config = Config(**sections)
        problems += contradictions(config, document["tunnel"])
    if problems:
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))
    return config


def _syntax(message: str) -> str:
    """Return tomllib's message with its position first."""
    position = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message, re.DOTALL)
    if position:
        return f"line {position[2]}, column {position[3]}: found no TOML: {printable(position[1])}"
    return f"found no TOML: {printable(message)}"


def _apps(tables: object, problems: list[str]) -> tuple[App, ...]:
    if not isinstance(tables, list):
        problems.append(f"[[app]]: found {shown(tables)}, expected one [[app]] for each rule, in double brackets")
        return ()
    apps = (_section(f"[[app]] #{number}", App, table, problems) for number, table in enumerate(tables, 1))
    return tuple(app for app in apps if isinstance(app, App))


def _section(where: str, section: type[Section], table: object, problems: list[str]) -> Section | None:
    if not isinstance(table, dict):
        problems.append(f"{where}: found {shown(table)}, expected a table")
        return None
    known = readers(section)
    values: dict[str, object] = {}
    before = len(problems)
    for key, value in table.items():
        if key not in known:
            problems.append(_unknown_key(where, key, known))
            continue
        try:
            values[key] = known[key].read(value)
        except Mismatch as mismatch:
            problems += (
                f"{where} {key}{item}: found {found}, expected {expected}"
                for item, found, expected in mismatch.problems
            )
    for key in required(section):
        if key not in table:
            problems.append(f"{where} {key}: found nothing, expected {known[key].expected}")
    return section(**values) if len(problems) == before else None


def _unknown_section(name: str) -> str:
    message = f"[{printable(name)}]: found an unknown section, expected {_listed(SECTIONS)}"
    if near := _nearest(name, SECTIONS):
        return f"{message}; did you mean [{near}]?"
    # A key that stands before the first section, or after the wrong one's heading was forgotten.
    homes = [f"[{section}] {name}" for section in SECTIONS if name in readers(SECTIONS[section])]
    return f"{message}; did you mean {' or '.join(homes)}?" if homes else message


def _unknown_key(where: str, key: str, known: Iterable[str]) -> str:
    message = f"{where} {printable(key)}: found an unknown key, expected {_listed(known)}"
    if near := _nearest(key, known):
        return f'{message}; did you mean "{near}"?'
    homes = [f"[{section}] {key}" for section in SECTIONS if key in readers(SECTIONS[section])]
    return f"{message}; did you mean {' or '.join(homes)}?" if homes else message


def _nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word.lower(), list(known), n=1)), None)


def _listed(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
