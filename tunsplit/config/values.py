"""How one value of the configuration is read: its shape, its range, and the words for what is accepted.

A reader takes what TOML gave (str, int, float, bool, list, dict, dates) and returns the value that the rest of
tunsplit uses: durations in seconds, addresses as `ipaddress` objects, lists as tuples. It raises `Mismatch` only.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from posixpath import normpath


class Mismatch(ValueError):
    """A value that is not accepted: for each problem where in the value it is, what was found, what is accepted."""

    def __init__(self, *problems: tuple[str, str, str]) -> None:
        super().__init__(problems)
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads one value; `convert` raises ValueError for what is not `expected`."""

    expected: str
    convert: Callable[[object], object]

    def read(self, value: object) -> object:
        """Return the value as tunsplit uses it, or raise `Mismatch`."""
        try:
            return self.convert(value)
        except Mismatch as mismatch:
            if any(where for where, _, _ in mismatch.problems):
                raise  # it tells more: which item
            raise Mismatch(*(("", found, self.expected) for _, found, _ in mismatch.problems)) from None
        except ValueError:
            raise Mismatch(("", shown(value), self.expected)) from None


SHOWN_SIZE = 60  # characters of a wrong value that a message repeats


def printable(text: str) -> str:
    """Return the text with everything escaped that a terminal would act on or cannot show."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def shown(value: object) -> str:
    """Return a value as the user would write it in TOML, shortened."""
    match value:
        case bool():
            text = "true" if value else "false"
        case str():
            text = '"' + printable(value).replace('"', '\\"') + '"'
        case int() if value.bit_length() > 128:
            text = "a huge number"  # Python refuses to print integers of more than 4300 digits
        case list():
            text = "[" + ", ".join(shown(item) for item in value[:5]) + (", …" if len(value) > 5 else "") + "]"
        case dict():
            text = "a table"
        case _:
            text = str(value)
    return text if len(text) <= SHOWN_SIZE else text[: SHOWN_SIZE - 1] + "…"


def text_of(value: object) -> str:
    """Return a non-empty string without control characters, or raise ValueError."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(value)
    return value


def integer_of(value: object, first: int, last: int) -> int:
    """Return an integer of a range, or raise ValueError; TOML's booleans are none, though Python's are."""
    if not isinstance(value, int) or isinstance(value, bool) or not first <= value <= last:
        raise ValueError(value)
    return value


def one_of(readers: Iterable[Callable[[object], object]], value: object) -> object:
    """Return what the first of the readers makes of the value; raise what the last one raises."""
    *others, last = readers
    for convert in others:
        try:
            return convert(value)
        except ValueError:
            continue
    return last(value)


def flag() -> Reader:
    """A boolean."""

    def convert(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError(value)
        return value

    return Reader("true or false", convert)


def integer(first: int, last: int, what: str = "a number") -> Reader:
    """An integer of a range, both ends included."""
    return Reader(f"{what} from {first} to {last}", lambda value: integer_of(value, first, last))


def choice(*words: str) -> Reader:
    """One of some words."""

    def convert(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError(value)
        return value

    *others, last = (f'"{word}"' for word in words)
    return Reader(f"{', '.join(others)} or {last}", convert)


def text(expected: str, pattern: str = r"(?s:.+)") -> Reader:
    """A printable string that a pattern matches whole."""
    matches = re.compile(pattern).fullmatch

    def convert(value: object) -> str:
        if not matches(text_of(value)):
            raise ValueError(value)
        return text_of(value)

    return Reader(expected, convert)


def word_or(word: str, meaning: object, reader: Reader) -> Reader:
    """A word such as "auto", which stands for `meaning`, or what another reader accepts."""

    def convert(value: object) -> object:
        return meaning if value == word else reader.read(value)

    return Reader(f'"{word}" or {reader.expected}', convert)


def each(item: Reader, plural: str, *, at_most: int = 1024) -> Reader:
    """A list; each item read by a reader of its own and returned in a tuple."""

    def convert(value: object) -> tuple[object, ...]:
        if not isinstance(value, list):
            raise ValueError(value)
        if len(value) > at_most:
            raise Mismatch(("", f"{len(value)} items", ""))
        items: list[object] = []
        problems: list[tuple[str, str, str]] = []
        for number, element in enumerate(value, 1):
            try:
                items.append(item.read(element))
            except Mismatch as mismatch:
                problems += ((f" #{number}{where}", found, wanted) for where, found, wanted in mismatch.problems)
        if problems:
            raise Mismatch(*problems)
        return tuple(items)

    return Reader(f"a list of {plural}, at most {at_most}", convert)


SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(first: str, last: str) -> Reader:
    """A number with a unit, such as "20ms": seconds as a float; both ends included."""

    def seconds(value: object) -> float:
        parts = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(us|ms|s|m|h)", text_of(value))
        if not parts:
            raise ValueError(value)
        return float(parts[1]) * SECONDS[parts[2]]

    def convert(value: object) -> float:
        if not seconds(first) <= seconds(value) <= seconds(last):
            raise ValueError(value)
        return seconds(value)

    return Reader(f'a duration from "{first}" to "{last}", with a unit (us, ms, s, m, h)', convert)


WILDCARDS = frozenset("*?[")
USER = r"[A-Za-z_][A-Za-z0-9_.@-]{0,255}\$?"


def user() -> Reader:
    """A user by name (str) or number (int); whether it exists is for those to ask who may open files."""
    named = text("", USER).convert

    def convert(value: object) -> object:
        return one_of((named, lambda number: integer_of(number, 0, 2**32 - 2)), value)

    return Reader('a user, by name or number, such as "root" or 1000', convert)


def group() -> Reader:
    """The name of a group."""
    return text('the name of a group, such as "tunsplit"', USER)


def absolute_path_of(value: object) -> str:
    """Return an absolute path as the kernel would spell it, or raise ValueError."""
    path = text_of(value)
    # POSIX lets two leading slashes mean something else, so normpath() keeps them.
    if not path.startswith("/") or path.startswith("//") or normpath(path) != path:
        raise ValueError(value)
    return path


def program_path() -> Reader:
    """An executable's path or a glob over such paths."""
    return Reader(
        'an absolute path or glob without "." or ".." parts, such as "/usr/bin/firefox" or "/opt/games/**"',
        absolute_path_of,
    )


def program_or_unit() -> Reader:
    """An executable's path, no glob, or the name of a systemd unit."""
    unit = text("", r"[A-Za-z0-9:_.\\@-]+\.(?:service|scope|slice)").convert

    def exact_path_of(value: object) -> str:
        path = absolute_path_of(value)
        if not WILDCARDS.isdisjoint(path):
            raise ValueError(value)
        return path

    return Reader(
        'the absolute path of one program or a systemd unit, such as "/usr/sbin/openvpn" or "openvpn@work.service"',
        lambda value: one_of((unit, exact_path_of), value),
    )


SOCKET_PATH_SIZE = 107  # sun_path without its NUL (unix(7))


def socket_path() -> Reader:
    """The path of a unix socket."""

    def convert(value: object) -> str:
        path = absolute_path_of(value)
        if len(path.encode()) > SOCKET_PATH_SIZE:
            raise ValueError(value)
        return path

    example = "/run/tunsplit/tunsplit.sock"
    return Reader(f'an absolute path of at most {SOCKET_PATH_SIZE} bytes, such as "{example}"', convert)


def regex() -> Reader:
    """A regular expression, kept as text."""

    def convert(value: object) -> str:
        pattern = text_of(value)
        try:
            with warnings.catch_warnings():  # Python warns of notation that may change one day; it still compiles
                warnings.simplefilter("ignore")
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            raise ValueError(value) from None
        return pattern

    return Reader('a regular expression in Python\'s notation, such as "^python3? .*/server\\\\.py"', convert)
